"""Records that a detector's recipe consists of: rates, freezing, projector, resolutions."""

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal[
    "default",
    "self-supervised",
    "moco-v2",
    "pixpro",
    "swav",
    "soco",
    "up-detr",
    "swin",
    "cbnet",
    "simmim",
    "convnext",
    "vit",
]
PolicyName = Literal["resize", "detr", "lsj"]
ScheduleName = Literal["12k", "90k", "1x", "2x", "3x", "4x", "50e", "90e", "100e", "150e", "200e", "300e"]
WarmupName = Literal["linear", "constant", "none"]
DecayName = Literal["steps", "cosine"]
ProjectorStart = Literal["normal", "torch", "kaiming"]
WARMUP_STEPS = 500  # the authors' schedule_1x.py and others
REFERENCE_BATCH = 16
# Short sides of training images to draw from, in pixels.
SINGLE_SCALE = (800,)  # supervised backbones: the authors' coco/*_1x_coco.py
MULTI_SCALE = (640, 672, 704, 736, 768, 800)  # self-supervised backbones: their coco/*_mstrain_1x_coco.py
CBNET_SIDES = tuple(range(400, 1401))  # CBNet v2: their coco/cbnetv2_swin-L_8x2_1x_coco.py
WIDE_SIDES = (480, 512, 544, 576, 608, *MULTI_SCALE)  # Pascal VOC: their voc0712.py; and DETR's crops


@dataclass(frozen=True)
class Rates:
    """Optimizer settings for one kind of run of a detector family.

    Attributes:
        lr: learning rate for `batch_size` images.
        origin: name of the source of these numbers, for messages.
        schedule: default length.
        drops: by schedule, drops of the rate as fractions of the run, if they differ from those in `LENGTHS`.
        warmup_steps: steps until the full rate.
        clip_norm: largest gradient norm; None does not clip.
        bias_lr_scale, bias_decay_scale: factors on learning rate and weight decay of biases.
        decays_norms: weight decay also for norms and for the relative position biases of attention.
        backbone_lr_scale: factor on the learning rate of the backbone.
        layer_decay: factor on the learning rate of each layer of the backbone beside that of the next one, see
            `Backbone.layers`.
        constant_lr: names of parts whose learning rate is not scheduled.
    """

    lr: float
    weight_decay: float
    origin: str
    batch_size: int = REFERENCE_BATCH
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
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
    layer_decay: float = 1.0
    constant_lr: tuple[str, ...] = ()


@dataclass(frozen=True)
class Freezing:
    """Parts of a backbone that fine-tuning freezes; fields as in `BackboneConfig`, none of them "auto"."""

    frozen_stages: int
    norm_eval: bool


@dataclass(frozen=True)
class ProjectorRecipe:
    """The MLP behind the classification features, as in the authors' configs of a family.

    Attributes:
        hidden_dim: width of the hidden layer.
        start: initial weights: `normal` (standard deviation 0.01, no bias), `torch` (those of `nn.Linear`), or
            `kaiming` (for ReLU, no bias; in none of their configs).
    """

    hidden_dim: int = 256
    start: ProjectorStart = "normal"


@dataclass(frozen=True)
class Recipe:
    """Training settings of a detector family. Source: the authors' configs, named where a family defines its recipe.

    Attributes:
        pretrain: box-domain pre-training.
        finetune: fine-tuning after it.
        plain: fine-tuning without it.
        topk: best proposals per image to use in pre-training.
        projector: in pre-training.
        needs_masks: fine-tuning trains on masks if boxes have them, and evaluation measures them.
        needs_clusters: pre-training also trains the class predictor, on the cluster of each proposal.
        momentum_follows: parameters that the momentum detector copies from the online one instead of averaging.
        freezing: of the backbone in fine-tuning; None: it depends on the training of its weights.
        short_sides: of training images if the policy is `resize`; None: they depend on the training of the weights.
        counts_whole_set: an epoch of fine-tuning on a fraction of the images is as long as one of all images.
        name: of this recipe, see `detectors/recipes.py`.
        policy: of resizing and cropping in fine-tuning, see `finetune/views.py`.
        norms_in_heads: fine-tuning adds batch norm to heads that were pre-trained without a norm.
        neck_norm: norm of the neck in fine-tuning, unless one is asked for.
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
    neck_norm: Literal["batch", "none"] = "batch"
