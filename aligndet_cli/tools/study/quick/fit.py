"""Settings that fit a data set, a detector and this machine: for short runs on few labels.

Source: the studies of examples/effect.md, in which these sizes, norms and rates were tried on photographs.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aligndet_cli.errors import ConfigError
from aligndet_cli.tools.study.quick.data import LabelledData, Sizes

Tables = dict[str, dict[str, Any]]  # settings by table of a study: `common`, or a stage

BATCH = 8
TOPK = 15  # proposals of an image in pre-training
PROPOSAL_IMAGES = 2000  # more images than short pre-trainings see
_OBJECT_PX = 40  # side that the median object gets, which the anchors of the finest level fit
_SMALLEST_SIDE = 160
_LARGEST_SIDE = {"cpu": 320, "gpu": 512}
_STEP = 32  # of the coarsest feature map


AFTER_PRETRAINING = 1.5  # times the best rate without it, as in the paper


@dataclass(frozen=True)
class DetectorRates:
    """Learning rates of one detector for batches of 8 with group norms.

    Attributes:
        plain: of fine-tuning without pre-training, to begin the search for the best with.
    """

    pretrain: float
    plain: tuple[float, ...]


RATES = {
    "retinanet": DetectorRates(0.03, (0.005, 0.01, 0.02)),
    "faster-rcnn": DetectorRates(0.03, (0.005, 0.01, 0.02)),
    # Its box branch does not recover from 0.03 in pre-training.
    "fcos": DetectorRates(0.01, (0.005, 0.01, 0.02)),
}


def rates_of(detector: str) -> DetectorRates:
    """Return the learning rates of a detector.

    Raises:
        ConfigError: short runs do not suit it.
    """
    if detector not in RATES:
        raise ConfigError(
            f"--detector {detector}: short runs are known for {', '.join(RATES)}; compare others with a study file"
        )
    return RATES[detector]


def is_gpu() -> bool:
    """Return True if there is a GPU to run on."""
    return torch.cuda.is_available()


def fit_settings(data: LabelledData, detector: str, backbone: str, weights: Path) -> Tables:
    """Return settings of all stages but the numbers of steps, the rates, and where the data is.

    Args:
        weights: file of the backbone's weights.
    """
    sizes = data.sizes()
    short = short_side(sizes)
    long = math.ceil(short * min(sizes.aspect, 2) / _STEP) * _STEP
    tables: Tables = {
        "common": {
            "backbone.name": backbone,
            "backbone.weights": str(weights),
            "detector.neck_channels": 64,
            "detector.neck_norm": "group",  # batches are too small for batch norm
            "detector.head_norm": "group",
            "detector.head_convs": 2,
            "training.batch_size": min(BATCH, data.num_train),
            "runtime.precision": _precision(),
        },
        "proposals": {},
        "pretrain-box": {
            "topk": TOPK,
            "momentum": 0.98,  # short runs
            "views.short_side": [max(short - _STEP, _STEP), max(short - _STEP // 2, _STEP), short],
            "views.long_side": long,
            "training.lr": rates_of(detector).pretrain,
        },
        "finetune": {
            "backbone.frozen_stages": 1,
            "backbone.norm_eval": True,
            "resolution.short_side": [short],
            "resolution.long_side": long,
        },
        "evaluate": {"batch_size": BATCH, "metric": "coco"},
    }
    if detector == "faster-rcnn":
        tables["common"]["detector.head_features"] = 256
        tables["pretrain-box"]["detector.pretext_roi_samples"] = 256
    else:
        tables["pretrain-box"]["detector.pretext_samples"] = 256
    if sizes.short_side < _SMALLEST_SIDE:  # objects of small images are small
        tables["proposals"]["min_size"] = max(int(sizes.short_side / 8), 8)
    if data.num_train > PROPOSAL_IMAGES:
        tables["proposals"]["data.limit"] = PROPOSAL_IMAGES
    return {name: table for name, table in tables.items() if table}


def short_side(sizes: Sizes) -> int:
    """Return the short side to train at: the median object gets 40 pixels; small images are not blown up."""
    largest = min(_LARGEST_SIDE["gpu" if is_gpu() else "cpu"], max(sizes.short_side, 2 * _STEP))
    side = min(max(_OBJECT_PX / max(sizes.object_side, 0.01), _SMALLEST_SIDE), largest)
    return max(round(side / _STEP), 2) * _STEP


def finetune_steps(num_images: int) -> int:
    """Return the least number of steps in which fine-tuning on so many labelled images gets somewhere.

    20 times the root of the number: 110 steps for 29 images, 340 for 283.
    """
    return max(round(2 * math.sqrt(num_images)) * 10, 100)


def _precision() -> str:
    """Return bf16 where the device computes with it."""
    if is_gpu():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    known = torch.cpu.get_capabilities()
    has_bf16 = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"
