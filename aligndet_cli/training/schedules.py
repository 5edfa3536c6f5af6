"""Learning rate, momentum and length of a run: pure functions of the step, and the recipes they start from."""

import math
from dataclasses import dataclass
from typing import Literal

from aligndet_cli.errors import ConfigError

RecipeName = Literal["default", "self-supervised", "moco-v2", "pixpro", "swav", "swin", "simmim"]
PolicyName = Literal["resize", "detr", "lsj"]
ScheduleName = Literal["12k", "90k", "1x", "2x", "3x", "4x", "50e", "90e", "100e", "150e", "200e"]
WarmupName = Literal["linear", "constant", "none"]
DecayName = Literal["steps", "cosine"]
ProjectorStart = Literal["normal", "torch", "kaiming"]
WARMUP_STEPS = 500  # the authors' schedule_1x.py and the others
# Share of the learning rate at the start; `constant`: the authors' semi-coco/fcos_r50_fpn_12k_semi-coco.py.
WARMUP_START = {"linear": 0.001, "constant": 1 / 3, "none": 1.0}
REFERENCE_BATCH = 16
# Short sides of training images, one of which is drawn.
SINGLE_SCALE = (800,)  # supervised backbones: the authors' coco/*_1x_coco.py
MULTI_SCALE = (640, 672, 704, 736, 768, 800)  # self-supervised backbones: their coco/*_mstrain_1x_coco.py
WIDE_SIDES = (480, 512, 544, 576, 608, *MULTI_SCALE)  # Pascal VOC: their voc0712.py; and DETR's crops


@dataclass(frozen=True)
class Length:
    """How long a named schedule is and where the learning rate drops by ten."""

    epochs: int | None
    steps: int | None
    drops: tuple[float, ...]  # fractions of the whole


LENGTHS: dict[ScheduleName, Length] = {
    "12k": Length(None, 12_000, (9 / 12, 11 / 12)),
    "90k": Length(None, 90_000, (60 / 90, 82.5 / 90)),
    "1x": Length(12, None, (8 / 12, 11 / 12)),
    "2x": Length(24, None, (16 / 24, 22 / 24)),
    "3x": Length(36, None, (24 / 36, 33 / 36)),
    "4x": Length(48, None, (32 / 48, 44 / 48)),
    "50e": Length(50, None, (40 / 50,)),
    "90e": Length(90, None, (30 / 90, 60 / 90)),
    "100e": Length(100, None, (80 / 100,)),
    "150e": Length(150, None, (100 / 150,)),
    "200e": Length(200, None, (120 / 200, 160 / 200)),
}


@dataclass(frozen=True)
class Schedule:
    """A run's learning-rate curve, in optimizer steps.

    Attributes:
        num_steps: length of the run.
        warmup_steps: steps until the full rate.
        drop_steps: steps from which the rate is ten times lower.
        warmup: a linear rise, a constant lower rate, or none.
        decay: `cosine` falls from the full rate to nothing instead of dropping.
    """

    num_steps: int
    warmup_steps: int
    drop_steps: tuple[int, ...]
    warmup: WarmupName = "linear"
    decay: DecayName = "steps"

    def lr_factor(self, step: int) -> float:
        """Factor on the base learning rate at a step (0-based)."""
        if self.decay == "cosine":
            drop = (1.0 + math.cos(math.pi * step / self.num_steps)) / 2.0
        else:
            drop = 0.1 ** sum(step >= drop_step for drop_step in self.drop_steps)
        if step >= self.warmup_steps:
            return drop
        start = WARMUP_START[self.warmup]
        return drop * (start + (1 - start) * step / self.warmup_steps if self.warmup == "linear" else start)


def momentum_at(step: int, num_steps: int, start: float) -> float:
    """EMA coefficient of the momentum network: `start` at step 0, 1.0 at the end, on a cosine.

    Source: docs/paper.md §4.5; the authors' `momentum_update_hook.py`.
    """
    return 1.0 - (1.0 - start) * (math.cos(math.pi * step / num_steps) + 1.0) / 2.0


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Optimizer steps that see every image once; the last, short batch is filled from the next epoch."""
    return max(math.ceil(num_images / batch_size), 1)


@dataclass(frozen=True)
class Rates:
    """How one kind of run of a detector family is trained.

    Attributes:
        lr: learning rate for `batch_size` images.
        origin: where the numbers come from, for people.
        schedule: length, unless another is asked for.
        drops: of the schedules whose rate drops elsewhere than `LENGTHS` says, as fractions of the whole.
        warmup_steps: steps until the full rate.
        clip_norm: largest gradient norm; None does not clip.
        bias_lr_scale, bias_decay_scale: factors on both for biases.
        decays_norms: norms, and the relative position biases of attention, decay like everything else.
        backbone_lr_scale: factor on the learning rate of the backbone.
        constant_lr: names of parts whose learning rate is not scheduled.
    """

    lr: float
    weight_decay: float
    origin: str
    batch_size: int = REFERENCE_BATCH
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: ScheduleName = "1x"
    drops: tuple[tuple[ScheduleName, tuple[float, ...]], ...] = ()
    warmup: WarmupName = "linear"
    warmup_steps: int = WARMUP_STEPS
    decay: DecayName = "steps"
    clip_norm: float | None = None
    bias_lr_scale: float = 1.0
    bias_decay_scale: float = 1.0
    decays_norms: bool = True
    backbone_lr_scale: float = 1.0
    constant_lr: tuple[str, ...] = ()


def build_schedule(
    name: ScheduleName,
    rates: Rates,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    num_images: int,
    batch_size: int,
) -> Schedule:
    """Build the curve of a named schedule, shortened or lengthened to `epochs` or `steps` if one of them is given.

    The warm-up is never more than a tenth of the run, so that short runs train at their full rate.

    Args:
        rates: whose warm-up, decay and drops are used.

    Raises:
        ConfigError: both `epochs` and `steps` are given.
    """
    if epochs is not None and steps is not None:
        raise ConfigError("--epochs and --steps: give one of them")
    length = LENGTHS[name]
    if steps is None and epochs is None:
        steps, epochs = length.steps, length.epochs
    num_steps = steps or (epochs or 0) * steps_per_epoch(num_images, batch_size)
    fractions = dict(rates.drops).get(name, length.drops) if rates.decay == "steps" else ()
    drop_steps = tuple(round(fraction * num_steps) for fraction in fractions)
    warmup_steps = 0 if rates.warmup == "none" else min(rates.warmup_steps, num_steps // 10)
    return Schedule(num_steps, warmup_steps, drop_steps, rates.warmup, rates.decay)


@dataclass(frozen=True)
class Freezing:
    """What of a backbone fine-tuning leaves alone; fields as in `BackboneConfig`, with nothing left "auto"."""

    frozen_stages: int
    norm_eval: bool


@dataclass(frozen=True)
class ProjectorRecipe:
    """The MLP behind the classification features, as the authors' configs of a family have it.

    Attributes:
        hidden_dim: width of the layer between.
        start: initial weights: `normal` of standard deviation 0.01 without bias, `torch` as `nn.Linear` has them, or
            `kaiming` for ReLU without bias, which no config of theirs has.
    """

    hidden_dim: int = 256
    start: ProjectorStart = "normal"


@dataclass(frozen=True)
class Recipe:
    """How a detector family is trained. Source: the authors' configs, by file name where they are given.

    Attributes:
        pretrain: box-domain pre-training.
        finetune: fine-tuning after it.
        plain: fine-tuning without it.
        topk: proposals per image in pre-training, best first.
        projector: of pre-training.
        needs_masks: fine-tuning trains on masks where boxes have them, and evaluation measures them.
        needs_clusters: pre-training also trains the class predictor, on the cluster of each proposal.
        momentum_follows: parameters that the momentum detector takes over from the online one instead of averaging.
        freezing: of the backbone in fine-tuning, whatever its weights; None: by how they were trained.
        short_sides: of training images where the policy is `resize`; None: by how the weights were trained.
        counts_whole_set: epochs of fine-tuning on a fraction of the images are as long as those of all of them.
        name: which of the recipes of the family this is; see `detectors/recipes.py`.
        policy: how fine-tuning resizes and crops; see `finetune/views.py`.
        norms_in_heads: fine-tuning puts batch norm into the heads of a pre-training that had no norm there.
    """

    pretrain: Rates
    finetune: Rates
    plain: Rates
    topk: int
    projector: ProjectorRecipe = ProjectorRecipe()
    needs_masks: bool = False
    needs_clusters: bool = False
    momentum_follows: tuple[str, ...] = ()
    freezing: Freezing | None = None
    short_sides: tuple[int, ...] | None = None
    counts_whole_set: bool = False
    name: RecipeName = "default"
    policy: PolicyName = "resize"
    norms_in_heads: bool = False
