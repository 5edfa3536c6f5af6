"""AlignDet: pre-train a detector's neck and head on unsupervised boxes, fine-tune and evaluate it.

`import aligndet_cli as aligndet`: the names in `__all__` are for Python programs, see docs/python.md. They are imported
when they are asked for, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligndet_cli.api.detector import ImageDetector as ImageDetector
    from aligndet_cli.api.load import backbone as backbone
    from aligndet_cli.api.load import load as load
    from aligndet_cli.api.stages import cluster as cluster
    from aligndet_cli.api.stages import evaluate as evaluate
    from aligndet_cli.api.stages import finetune as finetune
    from aligndet_cli.api.stages import pretrain_box as pretrain_box
    from aligndet_cli.api.stages import pretrain_image as pretrain_image
    from aligndet_cli.api.stages import proposals as proposals
    from aligndet_cli.cluster.config import ClusterConfig as ClusterConfig
    from aligndet_cli.driver import Outcome as Outcome
    from aligndet_cli.errors import AlignDetError as AlignDetError
    from aligndet_cli.errors import ConfigError as ConfigError
    from aligndet_cli.errors import DataError as DataError
    from aligndet_cli.errors import GateError as GateError
    from aligndet_cli.errors import Preempted as Preempted
    from aligndet_cli.errors import RunError as RunError
    from aligndet_cli.errors import WeightsError as WeightsError
    from aligndet_cli.evaluate.stage import EvaluateConfig as EvaluateConfig
    from aligndet_cli.finetune.config import FinetuneConfig as FinetuneConfig
    from aligndet_cli.pretrain_box.config import PretrainBoxConfig as PretrainBoxConfig
    from aligndet_cli.pretrain_image.config import PretrainImageConfig as PretrainImageConfig
    from aligndet_cli.proposals.stage import ProposalsConfig as ProposalsConfig

__version__ = "0.1.0"

_STAGES = ("cluster", "evaluate", "finetune", "pretrain_box", "pretrain_image", "proposals")
# Module of each name; the stages are packages that can be called.
_PLACES = {
    "ImageDetector": "api.detector",
    "backbone": "api.load",
    "load": "api.load",
    "Outcome": "driver",
    "ClusterConfig": "cluster.config",
    "EvaluateConfig": "evaluate.stage",
    "FinetuneConfig": "finetune.config",
    "PretrainBoxConfig": "pretrain_box.config",
    "PretrainImageConfig": "pretrain_image.config",
    "ProposalsConfig": "proposals.stage",
    "AlignDetError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "GateError": "errors",
    "Preempted": "errors",
    "RunError": "errors",
    "WeightsError": "errors",
}
__all__ = [*_PLACES, *_STAGES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for."""
    if name in _STAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """Return the names, imported or not."""
    return sorted({*globals(), *__all__})
