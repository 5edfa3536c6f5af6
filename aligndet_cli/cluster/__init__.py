"""Boxes -> pseudo classes: features of every proposal, PCA, k-means."""

import sys

from aligndet_cli.stage import StagePackage

sys.modules[__name__].__class__ = StagePackage
