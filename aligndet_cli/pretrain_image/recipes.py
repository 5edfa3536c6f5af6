"""Hyper-parameters of each method, from its paper."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from aligndet_cli.data.crops import ViewRecipe
from aligndet_cli.training.recipe import Rates

MethodName = Literal["simsiam", "moco-v2", "byol", "dense-cl", "pixpro", "distill", "supervised"]


@dataclass(frozen=True)
class MethodRecipe:
    """Hyper-parameters of a method.

    Attributes:
        rates: learning rate, schedule and the like.
        views: random changes of an image that make each of the views in a step.
        uses: those of `OF_SOME` that have an effect on it.
        embedding_dim, hidden_dim: widths of projector and predictor, of methods that use these settings.
        momentum: of the averaged backbone, of methods that use it.
        momentum_rises: to 1 at the end, on a cosine.
    """

    rates: Rates
    views: tuple[ViewRecipe, ...]
    uses: tuple[str, ...] = ()
    embedding_dim: int = 0
    hidden_dim: int = 0
    momentum: float = 0.0
    momentum_rises: bool = False


OF_SOME = ("embedding_dim", "hidden_dim", "queue_size", "temperature", "momentum", "teacher")  # settings

_MOCO_VIEW = ViewRecipe(
    min_area=0.2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_p=0.8, gray_p=0.2, blur_p=0.5
)
# BYOL, table 6, and PixPro's code: the views differ in blur and solarization.
_BYOL_VIEW = replace(_MOCO_VIEW, min_area=0.08, saturation=0.2, blur_p=1.0)

_sgd = partial(Rates, weight_decay=1e-4, batch_size=256, warmup="none")
_lars = partial(Rates, batch_size=256, optimizer="lars", decay="cosine", bias_decay_scale=0.0, decays_norms=False)
_like_moco = partial(
    MethodRecipe,
    views=(_MOCO_VIEW, _MOCO_VIEW),
    uses=("embedding_dim", "queue_size", "temperature", "momentum"),
    embedding_dim=128,
    momentum=0.999,
)
_like_byol = partial(
    MethodRecipe,
    views=(_BYOL_VIEW, replace(_BYOL_VIEW, blur_p=0.1, solarize_p=0.2)),
    uses=("embedding_dim", "hidden_dim", "momentum"),
    embedding_dim=256,
    hidden_dim=4096,
    momentum=0.99,
    momentum_rises=True,
)

RECIPES: dict[MethodName, MethodRecipe] = {
    # SimSiam 3 and its official code: 100 epochs, cosine; the predictor keeps its learning rate.
    "simsiam": MethodRecipe(
        _sgd(lr=0.05, origin="SimSiam", schedule="100e", decay="cosine", constant_lr=("predictor",)),
        (_MOCO_VIEW, _MOCO_VIEW),
        uses=("embedding_dim",),
        embedding_dim=2048,
    ),
    # MoCo v2, official code: 200 epochs, cosine.
    "moco-v2": _like_moco(_sgd(lr=0.03, origin="MoCo v2", schedule="200e", decay="cosine")),
    # BYOL 5, the runs of 300 epochs; the warm-up is ten epochs of ImageNet in batches of 4,096.
    "byol": _like_byol(_lars(lr=0.3, weight_decay=1e-6, origin="BYOL", schedule="300e", warmup_steps=3130)),
    # DenseCL's official code, on ImageNet: as MoCo v2.
    "dense-cl": _like_moco(_sgd(lr=0.03, origin="DenseCL", schedule="200e", decay="cosine")),
    # PixPro's official code; the warm-up is five epochs of ImageNet in batches of 1,024.
    "pixpro": _like_byol(_lars(lr=1.0, weight_decay=1e-5, origin="PixPro", schedule="100e", warmup_steps=6255)),
    # The code of LightlyTrain's dense distillation; without its blur, which is below a tenth of a pixel.
    "distill": MethodRecipe(
        _lars(lr=1.5, weight_decay=1e-6, origin="LightlyTrain", schedule="100e", clip_norm=1.0),
        (replace(_BYOL_VIEW, min_area=0.14, blur_p=0.0),),
        uses=("teacher",),
    ),
    # torchvision's classification reference: 90 epochs in three steps; crops and flips.
    "supervised": MethodRecipe(
        _sgd(lr=0.1, origin="torchvision reference", schedule="90e"), (ViewRecipe(min_area=0.08),)
    ),
}

# Ours: the papers' optimizers hardly learn anything in a short run, see `choose_rates`.
SHORT_RUN_STEPS = 10_000
_SHORT_RUN_LR = 1e-3  # for every batch size
_SHORT_RUN_DECAY = 0.05

QUEUE_SIZE = 65_536  # MoCo v2, DenseCL
_STEPS_PER_EPOCH = 8


def choose_rates(
    method: MethodName, optimizer: Literal["sgd", "lars", "adamw"] | None, num_steps: int, batch_size: int
) -> Rates:
    """Return the rates of the paper's optimizer, or of AdamW with a warm-up and a cosine for short runs or on request.

    Measured with labels of five classes of drawn objects, ResNet-18 at 64 px, 400 steps of 16 new images: AdamW gets
    94 % of other images right, the paper's SGD 36 %, chance 20 %.
    """
    rates = RECIPES[method].rates
    if optimizer == rates.optimizer or (optimizer is None and num_steps >= SHORT_RUN_STEPS):
        return rates
    return replace(
        rates,
        lr=_SHORT_RUN_LR,
        weight_decay=_SHORT_RUN_DECAY,
        origin="ours, for short runs" if optimizer is None else "ours, for AdamW",
        batch_size=batch_size,
        optimizer="adamw",
        warmup="linear",
        decay="cosine",
    )


def choose_batch_size(method: MethodName, num_images: int, parts: int) -> int:
    """Return the paper's batch size, halved until an epoch has 8 steps; a multiple of `parts`, at least 2 each."""
    size = RECIPES[method].rates.batch_size
    while size > 2 and size * _STEPS_PER_EPOCH > num_images:
        size //= 2
    return max(math.ceil(size / parts), 2) * parts


def choose_queue(num_images: int, batch_size: int) -> int:
    """Return the size of a queue, at most half the images: an image must not meet its own last embedding."""
    return max(min(QUEUE_SIZE, num_images // 2), batch_size)


def choose_momentum(method: MethodName, num_steps: int) -> float:
    """Return the paper's momentum, less in short runs, so that the copy can follow within a twentieth of the run."""
    return min(RECIPES[method].momentum, max(1.0 - 20.0 / num_steps, 0.9))
