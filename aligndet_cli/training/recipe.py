"""How detectors are trained: rates, lengths and resolutions that the recipes of the detectors are made of."""

from dataclasses import dataclass
from typing import Literal

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
