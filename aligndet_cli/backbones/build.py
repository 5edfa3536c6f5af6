"""Settings of a backbone, and the module they describe."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainSerializer,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from aligndet_cli.backbones.composite import CompositeBackbone
from aligndet_cli.backbones.convnext import build_convnext
from aligndet_cli.backbones.efficientnet import build_efficientnet
from aligndet_cli.backbones.efficientnet_lite import SIZES as LITE_SIZES
from aligndet_cli.backbones.efficientnet_lite import build_efficientnet_lite
from aligndet_cli.backbones.from_timm import PREFIX as TIMM_PREFIX
from aligndet_cli.backbones.from_timm import build_timm, facts_of, has_drop_path, is_of_timm
from aligndet_cli.backbones.interface import COMPOSITE, Backbone, Family, StagedBackbone
from aligndet_cli.backbones.mobilenet import build_mobilenet
from aligndet_cli.backbones.resnet import build_resnet
from aligndet_cli.backbones.swin import build_swin
from aligndet_cli.backbones.vit import nearest_size
from aligndet_cli.config import NO_WEIGHTS, WORKSPACE_WEIGHTS, FileOr, Frozen
from aligndet_cli.errors import ConfigError

# Training methods that recipes tell apart; `self-supervised` is any other method without labels.
MethodName = Literal["supervised", "self-supervised", "moco-v2", "pixpro", "swav", "simmim"]
NAMES: dict[Family, tuple[str, ...]] = {
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101"),
    "mobilenet": ("mobilenet_v2",),
    "swin": ("swin_t", "swin_s", "swin_b", "swin_l"),
    "convnext": ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    "efficientnet": (
        *(f"efficientnet_b{size}" for size in range(8)),
        *(f"efficientnet_v2_{size}" for size in ("s", "m", "l")),
    ),
    "efficientnet-lite": tuple(LITE_SIZES),
}
FAMILIES = {name: family for family, names in NAMES.items() for name in names}
COMPOSITES = tuple(f"{COMPOSITE}{name}" for family in ("resnet", "swin") for name in NAMES[family])
WEIGHTS_FILE = FileOr((*WORKSPACE_WEIGHTS, NO_WEIGHTS))
# Rates of drop path. Source: docs/paper.md §5.2; the ConvNeXt authors' detectors; EfficientDet.
_DROP_PATH: dict[Family, float] = {"swin": 0.2, "convnext": 0.7, "efficientnet": 0.2, "efficientnet-lite": 0.0}
_CONVNEXT_DROP_PATH = {
    "convnext_tiny": 0.4,
    "convnext_small": 0.6,
    "convnext_base": 0.7,
    "convnext_large": 0.7,
    "convnext_xlarge": 0.8,
}
_OTHER_DROP_PATH = _CONVNEXT_DROP_PATH | {"efficientnet_b0": 0.0}
# Of plain ViTs, by ViTDet's B, L and H. Source: detectron2's configs/common/models/mask_rcnn_vitdet.py and
# projects/ViTDet/configs/COCO.
_VIT_DROP_PATH = {12: 0.1, 24: 0.4, 32: 0.5}


def _or_of_timm(name: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check a name; whether timm has it is found out where it is built, since old files name others."""
    if isinstance(name, str) and name.startswith(COMPOSITE) and name not in COMPOSITES:
        raise ValueError(f"only ResNets and Swins of ours go in twos: {', '.join(COMPOSITES)}")
    return name if isinstance(name, str) and is_of_timm(name) else check(name)


# Marks of a setting that is one of some words, or `timm:NAME`.
_OR_OF_TIMM = (WrapValidator(_or_of_timm), PlainSerializer(str, return_type=str))


def family_of(name: str) -> Family:
    """Return the family of a backbone by its name."""
    return "timm" if is_of_timm(name) else FAMILIES[single_name(name)]


def single_name(name: str) -> str:
    """Return the name of the two backbones of a composite, whose weights both take; of others their own."""
    return name.removeprefix(COMPOSITE)


def require_single(name: str, command: str) -> None:
    """Make sure that a backbone is no composite.

    Raises:
        ConfigError: it is one.
    """
    if name in COMPOSITES:
        raise ConfigError(f"{command}: {name} is two of {single_name(name)}, give --backbone {single_name(name)}")


class BackboneConfig(Frozen):
    """Choose a backbone, where its weights come from, and what of it stays fixed while training."""

    name: Annotated[
        Literal[
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "mobilenet_v2",
            "swin_t",
            "swin_s",
            "swin_b",
            "swin_l",
            "convnext_tiny",
            "convnext_small",
            "convnext_base",
            "convnext_large",
            "efficientnet_b0",
            "efficientnet_b1",
            "efficientnet_b2",
            "efficientnet_b3",
            "efficientnet_b4",
            "efficientnet_b5",
            "efficientnet_b6",
            "efficientnet_b7",
            "efficientnet_v2_s",
            "efficientnet_v2_m",
            "efficientnet_v2_l",
            "efficientnet_lite0",
            "efficientnet_lite1",
            "efficientnet_lite2",
            "cb-resnet18",
            "cb-resnet34",
            "cb-resnet50",
            "cb-resnet101",
            "cb-swin_t",
            "cb-swin_s",
            "cb-swin_b",
            "cb-swin_l",
        ],
        *_OR_OF_TIMM,
    ] = Field(
        "resnet50",
        description="Network that makes features of an image; timm:NAME is of timm, cb-NAME are two, linked.",
    )
    # "none", a torchvision name (`DEFAULT`, `IMAGENET1K_V2`, `ResNet50_Weights.IMAGENET1K_V1`), a weights file,
    # "timm", or "workspace": the newest `pretrain-image` run of this backbone. "auto": that if there is one, else none.
    weights: Annotated[str, WEIGHTS_FILE] = Field(
        "auto", description="Weights: torchvision name, timm, file, none, workspace (made here), auto."
    )
    # How the weights were trained, which decides recipe, freezing and image sizes of fine-tuning. "auto": what their
    # file tells: its layout names a method, and an ImageNet classifier beside the backbone means "supervised".
    method: MethodName | Literal["auto"] = Field(
        "auto", description="Training that the weights come from; auto takes what their file tells."
    )
    # "auto": the stage decides, here and in `norm_eval` (docs/paper.md §5.6).
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] | Literal["auto"] = Field(
        "auto", description="Frozen part: -1 nothing, 0 the stem, 1 to 4 that many stages as well, or auto."
    )
    norm_eval: bool | Literal["auto"] = Field(
        "auto", description="Keep the running statistics of batch norms while training: true, false, or auto."
    )
    # ResNet-50 and 101 only: where stages begin, the 1x1 convolution makes steps of two and not the 3x3 one, as in the
    # first ("caffe") weights, which detectron2 starts from; import-weights sets this for theirs.
    stride_in_1x1: bool = Field(False, description="Stride in the 1x1 convolutions, as caffe's ResNet-50 and 101.")
    # For each image by itself.
    drop_path: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto", description="Rate at which the last block is left out in training; auto is that of its paper."
    )
    recompute: bool = Field(False, description="Run Swin's blocks again in the backward pass, which saves memory.")

    @property
    def family(self) -> Family:
        """The family of networks, on which recipes and weight layouts depend."""
        return family_of(self.name)

    @property
    def slug(self) -> str:
        """The name as a part of the names of folders."""
        return self.name.replace(":", "-")

    @field_validator("stride_in_1x1")
    @classmethod
    def _check_stride(cls, stride_in_1x1: bool, info: ValidationInfo) -> bool:
        name = info.data.get("name")
        if stride_in_1x1 and name is not None and single_name(name) not in ("resnet50", "resnet101"):
            raise ValueError(f"only ResNet-50 and 101 have 1x1 convolutions before the 3x3 ones, not {name}")
        return stride_in_1x1

    @field_validator("recompute")
    @classmethod
    def _check_recompute(cls, recompute: bool, info: ValidationInfo) -> bool:
        name = info.data.get("name")
        if recompute and name is not None and family_of(name) != "swin":
            raise ValueError(f"only Swin can, not {name}; leave it out, or name one with --backbone")
        return recompute

    @field_validator("drop_path")
    @classmethod
    def _check_drop_path(cls, drop_path: float | str, info: ValidationInfo) -> float | str:
        name = info.data.get("name")
        if drop_path == "auto" or name is None:
            return drop_path
        if not (has_drop_path(name) if is_of_timm(name) else family_of(name) in _DROP_PATH):
            raise ValueError(
                f"only Swin, ConvNeXt, EfficientNet and most of timm have it, not {name}; leave it out, or name one "
                "with --backbone"
            )
        return drop_path

    @property
    def drop_path_rate(self) -> float:
        """The rate of drop path of a family of ours that has it, with the family's own in place of "auto"."""
        return _OTHER_DROP_PATH.get(self.name, _DROP_PATH[self.family]) if self.drop_path == "auto" else self.drop_path

    @property
    def drop_path_of_timm(self) -> float | None:
        """The rate for a network of timm; where "auto" knows none of detectors, None: what timm builds it with."""
        if self.drop_path != "auto":
            return self.drop_path
        facts, model = facts_of(self.name), self.name.removeprefix(TIMM_PREFIX).partition(".")[0]
        if facts.is_vit:
            return nearest_size(_VIT_DROP_PATH, facts.num_blocks)
        if facts.kind.startswith("swin_transformer"):
            return _DROP_PATH["swin"]
        return _CONVNEXT_DROP_PATH.get(model)


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build the named backbone with fresh weights, frozen as the config says; "auto" freezes nothing.

    Weights are not read here (see `load_backbone_weights`): a detector that is filled from a checkpoint needs none.
    """
    backbone = _build(config)
    frozen_stages = -1 if config.frozen_stages == "auto" else config.frozen_stages
    backbone.freeze(frozen_stages, norm_eval=config.norm_eval is True)
    return backbone


def _build(config: BackboneConfig) -> Backbone:
    if config.name in COMPOSITES:
        assistant, lead = (_build(config.model_copy(update={"name": single_name(config.name)})) for _ in range(2))
        assert isinstance(assistant, StagedBackbone) and isinstance(lead, StagedBackbone)
        return CompositeBackbone(assistant, lead)
    if config.family == "swin":
        return build_swin(config.name, drop_path=config.drop_path_rate, recompute=config.recompute)
    if config.family == "convnext":
        return build_convnext(config.name, drop_path=config.drop_path_rate)
    if config.family == "efficientnet":
        return build_efficientnet(config.name, drop_path=config.drop_path_rate)
    if config.family == "efficientnet-lite":
        return build_efficientnet_lite(config.name, drop_path=config.drop_path_rate)
    if config.family == "timm":
        return build_timm(config.name, drop_path=config.drop_path_of_timm)
    if config.family == "mobilenet":
        return build_mobilenet()
    return build_resnet(config.name, stride_in_1x1=config.stride_in_1x1)
