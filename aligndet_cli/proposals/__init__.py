"""Unlabelled images -> boxes."""

import sys

from aligndet_cli.stage import StagePackage

sys.modules[__name__].__class__ = StagePackage
