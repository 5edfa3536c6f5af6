"""Conversion of another program's tensors to a detector of ours; every tensor is used, or left out with a reason."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.tools.conversion.backbone_names import INDEX, PREFIX, is_composite, rename_backbone
from aligndet_cli.tools.conversion.input_style import STYLES, apply_style, style_of_mmdet
from aligndet_cli.tools.conversion.mmdet import DETR_3X, MARKS, RULES, from_mmdet
from aligndet_cli.tools.conversion.mmdet_config import Tree, model_of, parse_config, told_settings
from aligndet_cli.tools.conversion.published_detectron2 import from_detectron2
from aligndet_cli.tools.conversion.published_detr import from_detr
from aligndet_cli.tools.conversion.published_soco import from_soco
from aligndet_cli.tools.conversion.published_torchvision import from_torchvision
from aligndet_cli.tools.conversion.reading import Checkpoint
from aligndet_cli.tools.conversion.recognise import Layout, find_layout, find_shape
from aligndet_cli.tools.conversion.rules import Pretraining, Renamed, translate, value_of_mark

PROJECTOR = "projector."
STYLED = ("mmdet", "aligndet", "detectron2")  # layouts of programs that know several styles of images
# Key under which our own `export --to mmdet` adds settings to the meta data, so that nothing is lost on the way back.
OWN_META = "aligndet"
# What `--style` says about a detector of mmdetection without a config, besides the style.
_USUAL = {
    "fcos": " (no norm_on_bbox, no centerness_on_reg)",
    "htc": " (NMS that is not soft; on two linked backbones CBNet's, which is)",
}
_WHY_UNUSED = {
    "class_predictor": "classes of pre-training",
    "box_predictor": "box offsets by number of the instance, which mean nothing elsewhere",
    "projector": "projector of another form",
}


@dataclass(frozen=True)
class Converted:
    """A detector from another program.

    Attributes:
        stage: `pretrain-box` (no classes yet) or `finetune`.
        num_classes: number of classes; 0 after pre-training.
        state_dict: all tensors of our detector; after pre-training only those that fine-tuning can use.
        projector: tensors of pre-training's projector; empty if ours has another form.
        left_out: reasons by the file's names, of tensors that were not used.
        pretraining: of another method than AlignDet's.
    """

    layout: Layout
    stage: str
    detector: DetectorConfig
    backbone: BackboneConfig
    num_classes: int
    state_dict: dict[str, Tensor]
    projector: dict[str, Tensor]
    num_tensors: int
    left_out: dict[str, str] = field(default_factory=dict)
    pretraining: Pretraining | None = None

    def summary(self) -> list[str]:
        """Return lines for people on the tensors used and left out."""
        lines = [f"{self.num_tensors - len(self.left_out)} of {self.num_tensors} tensors used"]
        lines += [f"{count} left out: {reason}" for reason, count in Counter(self.left_out.values()).items()]
        if self.pretraining is not None and self.pretraining.absent:
            lines.append(f"not pre-trained, and fresh in fine-tuning: {', '.join(self.pretraining.absent)}")
        return lines


def convert(
    checkpoint: Checkpoint, *, layout: str = "auto", family: str | None = None, style: str | None = None
) -> Converted:
    """Recognise a checkpoint and rename its tensors.

    Args:
        layout: expected layout, or "auto".
        family: expected detector; needed only for a pre-trained Faster R-CNN, which has the tensors of a Mask R-CNN.
        style: what the user says about its images; see `STYLES`.

    Raises:
        ConfigError: layout, detector or style is not the expected one.
        WeightsError: no detector of ours equals it, it is not complete, or does not tell how it is set.
    """
    if style not in (None, *STYLES):
        raise ConfigError(f"--style {style}: write {' or '.join(STYLES)}")
    file, found = checkpoint.file, find_layout(checkpoint.tensors, checkpoint.file)
    if layout not in ("auto", found) and {layout, found} != {"mmdet", "aligndet"}:
        raise ConfigError(f"--from {layout}: {file} is of {found}; leave out --from")
    if style is not None and found not in STYLED:
        raise ConfigError(f"--style: {file} is of {found}, which has one only; leave it out")
    renamed = _rename(checkpoint, found, family, style)
    if family not in (None, renamed.family):
        way_out = "change --detector"
        if found == "soco":
            way_out += f", or take its backbone alone: pretrain-box --detector {family} --backbone-weights {file}"
        raise ConfigError(f"{file}: is a {renamed.family}, not a {family}; {way_out}")
    if renamed.unknown:
        some = _some(renamed.unknown)
        raise WeightsError(f"{file}: {some} belong to no {renamed.family} of ours; this variant is not supported")
    converted = _fit(checkpoint, found, renamed)
    if converted.stage == "finetune" and renamed.untold:
        raise WeightsError(f"{file}: {renamed.untold}")
    return converted


def _rename(checkpoint: Checkpoint, layout: Layout, family: str | None, style: str | None) -> Renamed:
    """Return the detector under our names; arguments as in `convert`, with the layout that was found."""
    tensors, file = checkpoint.tensors, checkpoint.file
    if layout == "torchvision":
        return from_torchvision(tensors, checkpoint.digest, file)
    if layout == "detectron2":
        return from_detectron2(tensors, style, file)
    if layout in ("detr", "up-detr", "detreg"):
        return from_detr(checkpoint, layout)
    if layout == "soco":
        return from_soco(checkpoint, family)
    return _of_mmdet(checkpoint, family, style)


def _of_mmdet(checkpoint: Checkpoint, asked: str | None, style: str | None) -> Renamed:
    """Return a detector that has mmdetection's names, as AlignDet's checkpoints do, under our names."""
    inner, left_out = _inner_detector(checkpoint.tensors)
    inner, computed = rename_backbone(inner)
    family = _family_of(inner, checkpoint, asked)
    tensors, unknown = from_mmdet(family, inner)
    file, config = checkpoint.file, parse_config(checkpoint.meta)
    model = model_of(config)
    told = told_settings(family, model, file)
    if family == "htc" and (model or not is_composite(inner)):
        told.setdefault("nms_type", "nms")  # mmdetection's; CBNet's suppresses softly, as ours
    found = style_of_mmdet(config, model, style, file)
    tensors, backbone = apply_style(tensors, found or STYLES["pytorch"], file)
    untold = "" if OWN_META in checkpoint.meta or style else _untold(family, model, has_style=found is not None)
    return Renamed(family, tensors, unknown, left_out | computed, told, backbone, untold)


def _untold(family: str, model: Tree, *, has_style: bool) -> str:
    """Return the message about a config of mmdetection that does not tell enough; "" if it does."""
    if model and has_style:
        return ""
    lacks = "no mean, deviation and order of channels in its config" if model else "no config beside its tensors"
    usual = "" if model else f" and all else is mmdetection's default{_USUAL.get(family, '')}"
    return (
        f"has {lacks}, so it may detect something else here; take the file that mmdetection wrote, or add --style "
        f"pytorch (RGB, torchvision's mean and deviation) or caffe (BGR, deviation 1) if that is its style{usual}"
    )


def _inner_detector(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the online detector, and reasons to leave out AlignDet's other copies and mmdetection's averages."""
    left_out = {name: "running averages of mmdetection's EMA" for name in tensors if name.startswith("ema_")}
    if not any(name.startswith("online_backbone.") for name in tensors):
        return {name: tensor for name, tensor in tensors.items() if name not in left_out}, left_out
    online = {n.removeprefix("online_backbone."): t for n, t in tensors.items() if n.startswith("online_backbone.")}
    for name in tensors:
        if name.startswith("target_backbone."):
            left_out[name] = "momentum copy of the detector"
        elif name.startswith("backbone."):
            left_out[name] = "second name of the detector"
        elif not name.startswith("online_backbone."):
            online[name] = tensors[name]  # unknown, to be refused by its name
    return online, left_out


def _family_of(tensors: Mapping[str, Tensor], checkpoint: Checkpoint, asked: str | None) -> str:
    family = value_of_mark(tensors, MARKS)
    if any(name.startswith(DETR_3X) for name in tensors):
        raise WeightsError(
            f"{checkpoint.file}: a DETR of mmdetection 3.x, whose tensors are not known here; one of 2.x or of "
            "facebookresearch/detr can be imported"
        )
    if family is None:
        raise WeightsError(f"{checkpoint.file}: none of the detectors that can be imported: {', '.join(RULES)}")
    # AlignDet pre-trains both with the config of Mask R-CNN.
    if family == "faster-rcnn" and asked != family and _is_pretrained(from_mmdet(family, tensors)[0]):
        return "mask-rcnn"
    return family


def _is_pretrained(tensors: Mapping[str, Tensor]) -> bool:
    has_classes = "class_predictor.bias" in tensors or "class_predictor.0.bias" in tensors
    return not has_classes or any(name.startswith(PROJECTOR) for name in tensors)


def _fit(checkpoint: Checkpoint, layout: Layout, renamed: Renamed) -> Converted:
    """Build the detector that follows from the shapes of the tensors, and check the tensors against it."""
    family, tensors, left_out = renamed.family, renamed.tensors, renamed.left_out
    backbone_name, settings, num_classes = find_shape(family, tensors, checkpoint.file)
    own = checkpoint.meta.get(OWN_META) or {}
    detector = _validated(own.get("detector", {**settings, **renamed.detector}), checkpoint.file)
    named = {"name": backbone_name, "weights": "none", **renamed.backbone}
    backbone = BackboneConfig.model_validate(own.get("backbone", named))
    with torch.device("meta"):
        model = detector.build(build_backbone(backbone), num_classes or 1)
    unused: set[str] = set()
    may_lack: set[str] = set()
    projector: dict[str, Tensor] = {}
    if (pretraining := renamed.pretraining) is not None:
        may_lack = {"class_predictor", *model.fresh_modules, *pretraining.absent}
    elif layout in ("mmdet", "aligndet") and _is_pretrained(tensors):
        unused = {"class_predictor", "projector", *model.fresh_modules}
        unused |= {"box_predictor"} if detector.family in ("faster-rcnn", "mask-rcnn") else set()
        may_lack = {*unused, "box_predictor"}  # the authors' converter drops the box predictor
        projector = _linear_projector(tensors)
    is_pretrained = bool(may_lack)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    idle = {n for n, p in model.named_parameters() if not p.requires_grad}  # norms of levels that are not used
    kept = {n: t for n, t in tensors.items() if _module_of(n) not in unused}
    kept = {**_known_values(backbone, wanted, idle), **_with_counters(kept, wanted)}
    needed = {n: size for n, size in wanted.items() if n in kept or _module_of(n) not in may_lack}
    _check_fit(kept, needed, family, checkpoint.file)
    gone = [name for name in tensors if _module_of(name) in unused and name not in projector]
    prefix = "online_backbone." if layout == "aligndet" else ""
    their_names = [f"{prefix}{translate(name, RULES[family], to_ours=False)}" for name in gone]
    reasons = [_WHY_UNUSED.get(_module_of(name), "not pre-trained") for name in gone]
    return Converted(
        layout=layout,
        stage="pretrain-box" if is_pretrained else "finetune",
        detector=detector,
        backbone=backbone,
        num_classes=0 if is_pretrained else num_classes or 0,
        state_dict={name: kept[name] for name in needed},
        projector={name.removeprefix(PROJECTOR): tensor for name, tensor in projector.items()},
        num_tensors=len(checkpoint.tensors),
        left_out=left_out | dict(zip(their_names, reasons, strict=True)),
        pretraining=pretraining,
    )


def _validated(settings: Mapping[str, object], file: Path) -> DetectorConfig:
    adapter: TypeAdapter[DetectorConfig] = TypeAdapter(DetectorConfig)
    try:
        return adapter.validate_python(settings)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"][1:])) or "its settings"
        raise WeightsError(f"{file}: no detector of ours has {name} = {wrong['input']} ({wrong['msg']})") from None


def _linear_projector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projector's 1x1 convolutions as linear layers; empty for FCOS, whose convolutions are larger."""
    parts = {name: tensor for name, tensor in tensors.items() if name.startswith(PROJECTOR)}
    if any(tensor.shape[2:].numel() != 1 for tensor in parts.values()):
        return {}
    return {name: tensor.flatten(1) if tensor.dim() == 4 else tensor for name, tensor in parts.items()}


def _known_values(backbone: BackboneConfig, wanted: Iterable[str], idle: Collection[str]) -> dict[str, Tensor]:
    """Return tensors of a Swin that follow from its size, and the initial values of its unused norms."""
    if backbone.family != "swin":
        return {}
    fresh = {f"{PREFIX}{name}": value for name, value in build_backbone(backbone).state_dict().items()}
    return {name: fresh[name] for name in wanted if name in idle or name.endswith(INDEX)}


def _with_counters(tensors: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Add counts of batches to norms without one, as frozen norms are; with a fixed momentum the count is not used."""
    counters = [name for name in wanted if name.endswith(".num_batches_tracked")]
    of_norms = [name for name in counters if f"{name.removesuffix('num_batches_tracked')}weight" in tensors]
    return {**{name: torch.zeros((), dtype=torch.int64) for name in of_norms}, **tensors}


def _check_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], family: str, file: Path) -> None:
    missing = [name for name in wanted if name not in tensors]
    surplus = [name for name in tensors if name not in wanted]
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(size)}"
        for name, size in wanted.items()
        if name in tensors and tensors[name].shape != size
    ]
    for problem, names in (("missing", missing), ("too many", surplus), ("of another shape", reshaped)):
        if names:
            raise WeightsError(f"{file}: not one of our {family}: {_some(names)} {problem}")


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _module_of(name: str) -> str:
    return name.partition(".")[0]
