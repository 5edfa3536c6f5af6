"""Write and read `weights.pt`: the tensors of a detector and the settings to build it again."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, WeightsTraining, build_backbone
from aligndet_cli.backbones.plain import is_dense, read_plain, require_finite
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import Detector, DetectorConfig
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import check_parts, refuse_newer, write_bytes
from aligndet_cli.training.best import FILE as BEST
from aligndet_cli.training.checkpoint import serialise
from aligndet_cli.training.recipe import RecipeName

KIND = "aligndet-detector"
FORMAT_VERSION = 1
OBJECTNESS = "objectness"
MAX_OBJECTS = 1000  # per image, of `load_finder`
WeightsName = Literal["last", "best"]


@dataclass(frozen=True)
class DetectorFile:
    """Content of a `weights.pt`.

    Attributes:
        stage: `pretrain-box` (`state_dict` then lacks the class predictor) or `finetune`.
        categories: the classes by class id; empty after pre-training.
        resolution: short and long side to test at, in pixels; None after pre-training.
        extra: further state dicts by name: the projector of pre-training, and `OBJECTNESS`, the class predictor that
            tells objects from background, or clusters, if it was asked for.
        recipe: name of the training recipe; None if the file does not say.
        backbone_training: origin of the weights that the backbone started from; None if the file does not say.
    """

    stage: str
    detector: DetectorConfig
    backbone: BackboneConfig
    categories: tuple[Category, ...]
    resolution: tuple[int, int] | None
    state_dict: dict[str, Tensor]
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    recipe: RecipeName | None = None
    backbone_training: WeightsTraining | None = None


@dataclass(frozen=True)
class LoadedDetector:
    """A fine-tuned detector in evaluation mode on the CPU; fields as in `DetectorFile`."""

    model: Detector
    categories: tuple[Category, ...]
    resolution: tuple[int, int]
    has_masks: bool  # its detections have masks

    def sides(self, short_side: int | None, long_side: int | None) -> tuple[int, int]:
        """Return the short and long side in pixels to test at: what was asked for, else the detector's own."""
        return short_side or self.resolution[0], long_side or self.resolution[1]


def weights_file(run: Path, which: WeightsName) -> Path:
    """Return the file of a run's last or best weights.

    Raises:
        ConfigError: the run has no best weights.
    """
    file = run / ("weights.pt" if which == "last" else BEST)
    if which == "best" and not file.exists():
        raise ConfigError(f"--weights best: {run} has no {BEST}; finetune --evaluate-every keeps one")
    return file


def kept_state(model: Detector, stage: str) -> dict[str, Tensor]:
    """Return the state dict entries to save, of any shapes.

    After pre-training, modules that fine-tuning always restarts (such as the class predictor) are left out.
    """
    left_out = {"class_predictor", *model.fresh_modules} if stage == "pretrain-box" else set()
    return {name: value for name, value in model.state_dict().items() if name.partition(".")[0] not in left_out}


def write_detector(file: Path, content: DetectorFile) -> None:
    """Write a `weights.pt`; the same content gives the same bytes."""
    plain = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "stage": content.stage,
        "detector": content.detector.model_dump(mode="json"),
        "backbone": content.backbone.model_dump(mode="json"),
        "categories": [_plain_category(category) for category in content.categories],
        "resolution": content.resolution,
        "recipe": content.recipe,
        "backbone_training": None if content.backbone_training is None else asdict(content.backbone_training),
        "state_dict": _on_cpu(content.state_dict),
        "extra": {name: _on_cpu(part) for name, part in content.extra.items()},
    }
    write_bytes(file, serialise(plain))


def _plain_category(category: Category) -> dict[str, Any]:
    plain = asdict(category)
    if not category.is_unused:  # the file of a detector without such classes is that of earlier versions
        del plain["is_unused"]
    return plain


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def read_detector(file: Path) -> DetectorFile:
    """Read a `weights.pt` that `write_detector` wrote.

    Raises:
        WeightsError: the file is missing, damaged or of a newer format, or holds something else, or numbers that are
            none.
    """
    content = read_plain(file, str(file))
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise WeightsError(
            f"{file}: not a detector of aligndet; name a weights.pt of pretrain-box or finetune, or make it one by "
            "`aligndet import-weights`"
        )
    refuse_newer(file, content.get("format_version", 1), FORMAT_VERSION, WeightsError)
    try:
        check_parts(file)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{file}: damaged ({error}); get it again, or run the stage that made it again") from None
    try:
        found = _parsed(content)
    except (AttributeError, KeyError, TypeError, ValueError):  # pydantic's errors are ValueErrors
        raise WeightsError(
            f"{file}: written by another version of aligndet, or by hand; use the version that wrote it"
        ) from None
    require_finite(found.state_dict.items(), str(file))
    return found


def _resolution(pair: Sequence[int] | None) -> tuple[int, int] | None:
    if not pair:
        return None
    short, long = pair
    return int(short), int(long)


def _tensors(part: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(part, Mapping) or not all(is_dense(value) for value in part.values()):
        raise ValueError("no tensors")
    return dict(part)


def _parsed(content: Mapping[str, Any]) -> DetectorFile:
    adapter: TypeAdapter[DetectorConfig] = TypeAdapter(DetectorConfig)
    training = content.get("backbone_training")
    return DetectorFile(
        stage=content["stage"],
        detector=adapter.validate_python(content["detector"]),
        backbone=BackboneConfig.model_validate(content["backbone"]),
        categories=tuple(Category(**category) for category in content["categories"]),
        resolution=_resolution(content["resolution"]),
        state_dict=_tensors(content["state_dict"]),
        extra={name: _tensors(part) for name, part in content["extra"].items()},
        recipe=content.get("recipe"),
        backbone_training=WeightsTraining(**training) if training else None,
    )


def load_finder(file: Path) -> Detector:
    """Build a pre-trained detector from its file, in evaluation mode on the CPU, to find objects of no class with.

    Raises:
        WeightsError: the file is missing or damaged, or has no score for such objects.
    """
    content = read_detector(file)
    predictor, num_classes = content.extra.get(OBJECTNESS), 1
    if predictor is not None and content.detector.RECIPE.needs_clusters:
        num_classes = len(predictor["bias"]) - 1  # "no object" is last
    # All boxes with a score, however low: what uses them decides how many it takes.
    config = content.detector.model_copy(update={"score_threshold": 0.0, "max_detections": MAX_OBJECTS})
    model = config.build(build_backbone(content.backbone), num_classes)
    trained = {name.partition(".")[0] for name in content.state_dict}
    has_rpn = model.has_objectness and set(model.box_branch) <= trained
    if content.stage != "pretrain-box" or (predictor is None and not has_rpn):
        raise WeightsError(
            f"{file}: has no score for objects without classes; `aligndet pretrain-box --method aligndet --objectness` "
            "makes one, `aligndet pretrain-box --method aligndet --detector faster-rcnn` in any case"
        )
    unused = model.state_dict().keys() - kept_state(model, "pretrain-box").keys()
    state = {name: value for name, value in model.state_dict().items() if name in unused}
    state |= content.state_dict | {f"class_predictor.{name}": value for name, value in (predictor or {}).items()}
    _load_state(model, state, file, content)
    return model.eval()


def load_detector(file: Path) -> LoadedDetector:
    """Build a fine-tuned detector from its file.

    Raises:
        WeightsError: the file is missing or damaged, or its detector is only pre-trained and has no classes yet.
    """
    content = read_detector(file)
    if content.stage != "finetune" or content.resolution is None:
        raise WeightsError(
            f"{file}: only pre-trained, it has no classes yet; run `aligndet finetune` first, or in "
            "Python aligndet_cli.load(file, num_classes=...), see docs/python.md"
        )
    model = content.detector.build(build_backbone(content.backbone), len(content.categories))
    _load_state(model, content.state_dict, file, content)
    return LoadedDetector(model.eval(), content.categories, content.resolution, content.detector.RECIPE.needs_masks)


def _load_state(model: Detector, state: Mapping[str, Tensor], file: Path, content: DetectorFile) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n")[1].split())
        raise WeightsError(
            f"{file}: its tensors are not those of its {content.detector.family} ({detail}); get it again"
        ) from None
