"""Detectors in the layouts of other methods' pre-training, small; examples/smoke_weights.py writes them."""

import importlib.util
import sys

import torch
from torch import Tensor
from torchvision.models import resnet18

from helpers.table_scripts import EXAMPLES

_SPEC = importlib.util.spec_from_file_location("smoke_weights", EXAMPLES / "smoke_weights.py")
assert _SPEC is not None and _SPEC.loader is not None
smoke_weights = importlib.util.module_from_spec(_SPEC)
sys.modules["smoke_weights"] = smoke_weights  # dataclasses look their module up
_SPEC.loader.exec_module(smoke_weights)

RCNN = smoke_weights.RCNNSize(channels=8, convs=4, features=12)
DETR = smoke_weights.DETRSize(dim=16, inner=24, encoder_layers=2, decoder_layers=3, queries=7)


def body() -> dict[str, Tensor]:
    """A ResNet-18 without its classifier."""
    return {name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}


def soco_tensors() -> dict[str, Tensor]:
    """By bare names, with numbers in which no two tensors are alike."""
    torch.manual_seed(7)
    return spread(smoke_weights.soco(body(), RCNN, prefix=""))


def detr_tensors(kind: str, *, pre_norm: bool = True) -> dict[str, Tensor]:
    """Of `up-detr` and `detreg`, and of `detr`, which is fine-tuned on COCO."""
    torch.manual_seed(9)
    if kind == "up-detr":
        return spread(smoke_weights.up_detr(body(), DETR))
    if kind == "detreg":
        return spread(smoke_weights.detreg(body(), DETR, pre_norm=pre_norm))
    return spread(smoke_weights.detr(body(), DETR, classes=91, pre_norm=pre_norm))


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value + 0.1 * torch.rand_like(value) if value.is_floating_point() else value + len(name)
        for name, value in tensors.items()
    }
