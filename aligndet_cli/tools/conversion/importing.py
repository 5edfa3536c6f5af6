"""`aligndet import-weights`: turn a checkpoint of another program into a finished run of the workspace."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import StageConfig
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.detectors.checkpoint import DetectorFile, write_detector
from aligndet_cli.driver import Outcome
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import hash_files, write_json
from aligndet_cli.logs import logger
from aligndet_cli.tools.conversion.categories import KNOWN, resolve_categories
from aligndet_cli.tools.conversion.convert import OWN_META, Converted, convert
from aligndet_cli.tools.conversion.mmdet_config import parse_config, test_size
from aligndet_cli.tools.conversion.reading import Checkpoint, read_checkpoint
from aligndet_cli.tools.conversion.recognise import Layout
from aligndet_cli.workspace import Workspace

RESOLUTION = (800, 1333)  # short side and largest long side at which released detectors are tested, in pixels
LAYOUTS = ("auto", *get_args(Layout))


class ImportConfig(StageConfig):
    """Config of an imported run: its origin, detector and backbone."""

    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"file"}

    file: Path
    layout: str
    detector: DetectorConfig
    backbone: BackboneConfig
    categories: str | None
    style: str | None = None


@dataclass(frozen=True)
class ImportRequest:
    """Settings of an import; None and "auto" leave the choice to the file.

    Attributes:
        layout: one of `LAYOUTS`.
        detector, backbone: expected ones; `detector` also tells a pre-trained Faster R-CNN from a Mask R-CNN.
        style: preparation of images, if the file does not tell; see `STYLES`.
        categories: see `resolve_categories`.
        force: replace a run of the same name.
    """

    file: Path
    layout: str = "auto"
    detector: str | None = None
    backbone: str | None = None
    style: str | None = None
    name: str | None = None
    categories: str | None = None
    force: bool = False


def import_weights(request: ImportRequest, workspace: Workspace) -> Outcome:
    """Turn a checkpoint into a finished run of `pretrain-box` or `finetune`.

    Raises:
        ConfigError: the file does not fit the request, or another run has the name.
        WeightsError: the file cannot be read, or no detector of ours equals its detector.
    """
    if request.layout not in LAYOUTS:
        raise ConfigError(f"--from {request.layout}: write one of {', '.join(LAYOUTS)}")
    checkpoint = read_checkpoint(request.file)
    converted = convert(checkpoint, layout=request.layout, family=request.detector, style=request.style)
    backbone = converted.backbone.name
    if request.backbone not in (None, backbone):
        raise ConfigError(f"{request.file}: has a {backbone}, not a {request.backbone}; change --backbone")
    if request.categories is not None and converted.stage == "pretrain-box":
        raise ConfigError(f"--categories: {request.file} is only pre-trained and has no classes; leave it out")
    content = _detector_file(request, checkpoint, converted)
    config, inputs = _recorded(request, converted)
    output = workspace.plan_output(converted.stage, str(config.name), config, inputs, resume=False, force=request.force)
    if output.action == "complete":
        run = workspace.require(converted.stage, config.name)
        return Outcome("already complete", "complete", output.folder, run)
    for line in converted.summary():
        logger.info(line)
    with output.lock():
        output.begin(config)
        write_detector(output.partial / "weights.pt", content)
        write_json(output.partial / "load_report.json", _report(converted))
        run = output.complete(_result(converted, content), content=["weights.pt"])
    return Outcome("done", "start", output.folder, run)


def _recorded(request: ImportRequest, converted: Converted) -> tuple[ImportConfig, dict[str, str]]:
    """Return the config of the run, with paths from the root on, and the hashes of the files it is made from."""
    inputs = {"weights": hash_files([request.file]), "backbone weights": "none"}
    categories = request.categories
    if categories is not None and categories not in KNOWN:
        inputs["categories"] = hash_files([Path(categories)])
        categories = str(Path(categories).absolute())
    config = ImportConfig(
        name=request.name or f"{converted.detector.family}-{converted.backbone.name}-{converted.layout}",
        file=request.file.resolve(),
        layout=converted.layout,
        detector=converted.detector,
        backbone=converted.backbone,
        categories=categories,
        style=request.style,
    )
    return config, inputs


def _detector_file(request: ImportRequest, checkpoint: Checkpoint, converted: Converted) -> DetectorFile:
    own = checkpoint.meta.get(OWN_META) or {}
    categories: tuple[Category, ...] = ()
    resolution = None
    if converted.stage == "finetune":
        resolution = tuple(own.get("resolution") or test_size(parse_config(checkpoint.meta)) or RESOLUTION)
        if "categories" in own and request.categories is None:
            categories = tuple(Category(number, str(label), *rest) for number, label, *rest in own["categories"])
        else:
            categories = resolve_categories(request.categories, converted.num_classes, checkpoint.meta, checkpoint.file)
    return DetectorFile(
        stage=converted.stage,
        detector=converted.detector,
        backbone=converted.backbone,
        categories=categories,
        resolution=resolution,
        state_dict=converted.state_dict,
        extra={"projector": converted.projector} if converted.projector else {},
        recipe=None if converted.pretraining is None else converted.pretraining.recipe,
        backbone_training=None if converted.pretraining is None else converted.pretraining.backbone,
    )


def _report(converted: Converted) -> dict[str, Any]:
    return {
        "layout": converted.layout,
        "tensors": converted.num_tensors,
        "used": converted.num_tensors - len(converted.left_out),
        "left_out": converted.left_out,
    }


def _result(converted: Converted, content: DetectorFile) -> dict[str, Any]:
    report = _report(converted)
    result: dict[str, Any] = {"init": "import", "layout": converted.layout, "detector": converted.detector.family}
    result |= {"backbone": converted.backbone.name, "tensors": report["tensors"], "used": report["used"]}
    if converted.pretraining is not None and converted.pretraining.epochs is not None:
        result["epochs"] = converted.pretraining.epochs
    return {**result, "classes": len(content.categories)} if content.categories else result
