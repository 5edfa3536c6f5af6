"""`aligndet export`: write a run's weights in the layout of another program."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from torch import Tensor

from aligndet_cli import __version__
from aligndet_cli.backbones import COMPOSITES
from aligndet_cli.config import DataConfig
from aligndet_cli.data.batch import PAD_DIVISOR
from aligndet_cli.detectors.checkpoint import DetectorFile, WeightsName, load_detector, read_detector, weights_file
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import check_output_file, write_bytes
from aligndet_cli.logs import logger
from aligndet_cli.tools.conversion import mmdet, torchvision_names
from aligndet_cli.tools.conversion.backbone_names import to_cbnet
from aligndet_cli.tools.conversion.convert import OWN_META, PROJECTOR
from aligndet_cli.tools.conversion.mmdet import to_mmdet
from aligndet_cli.tools.conversion.torchvision_names import to_torchvision
from aligndet_cli.training.checkpoint import serialise
from aligndet_cli.workspace import Artifact, Workspace

_FEW = 10  # detections of a comparison

if TYPE_CHECKING:
    from aligndet_cli.tools.conversion.onnx_check import Comparison

EXPORTABLE = ("finetune", "pretrain-box")
SUFFIXES = {"mmdet": ".pth", "torchvision": ".pth", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        left_out: names of our tensors that have no place in the other program.
        usage: a sentence on how to load the file.
        comparison: detections of the file and ours, for ONNX.
        compared_in: the images of the comparison.
    """

    file: Path
    num_tensors: int
    left_out: list[str]
    usage: str
    comparison: "Comparison | None" = None
    compared_in: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": str(self.file),
            "tensors": self.num_tensors,
            "written": self.num_tensors - len(self.left_out),
            "left_out": self.left_out,
            "usage": self.usage,
            **({} if self.comparison is None else {"comparison": {**vars(self.comparison), "in": self.compared_in}}),
        }

    def lines(self) -> list[str]:
        """Return lines for people."""
        lines = [str(self.file), f"  {self.num_tensors - len(self.left_out)} of {self.num_tensors} tensors"]
        if self.left_out:
            modules = sorted({name.rpartition(".")[0].rpartition(".")[0] or name for name in self.left_out})
            lines.append(f"  left out: {', '.join(modules)}")
        if self.comparison is not None:
            lines.append(f"  same as ours in {self.compared_in}: {self.comparison}")
        return [*lines, f"  {self.usage}"]


def export_run(
    workspace: Workspace,
    run: str | None,
    target: str,
    file: Path | None,
    *,
    which: str = "last",
    image_size: str | None = None,
    with_nms: bool | None = None,
) -> Exported:
    """Write a run of `finetune` or `pretrain-box` for another program.

    Args:
        run: name of a fine-tuned run, or `pretrain-box/NAME`; None: the newest fine-tuned run.
        target: `mmdet`, `torchvision` or `onnx`.
        file: None: `<run>-<target>` in the current folder.
        which: `last` or `best` weights of a fine-tuned run.
        image_size: height and width of the only image that an ONNX file takes; None: any number of any size.
        with_nms: suppress overlapping boxes in the ONNX file (None: yes).

    Raises:
        ConfigError: no such run or target, an option of another target, or the file cannot be written.
        WeightsError: the other program has no such detector.
        RunError: the ONNX file finds something else than we do.
    """
    if target not in SUFFIXES:
        raise ConfigError(f"--to {target}: write one of {', '.join(SUFFIXES)}")
    for flag, value in (("--image-size", image_size), ("--with-nms", with_nms)):
        if target != "onnx" and value is not None:
            raise ConfigError(f"{flag}: only --to onnx has a choice there; leave it out")
    if which not in get_args(WeightsName):
        raise ConfigError(f"--weights {which}: write last or best")
    artifact = workspace.require_of(
        EXPORTABLE, run, f"--run {run}: write the name of a finetune run, or pretrain-box/NAME"
    )
    weights = weights_file(artifact.folder, cast(WeightsName, which))
    best = "-best" if which == "best" else ""
    file = file or Path(f"{artifact.name}{best}-{target}{SUFFIXES[target]}")
    check_output_file(file)
    if target == "onnx":
        return _export_onnx(artifact, weights, file, image_size, with_nms is not False)
    return _export_tensors(weights, file, target)


def _export_tensors(weights: Path, file: Path, target: str) -> Exported:
    content = read_detector(weights)
    name = content.backbone.name
    if not name.startswith("resnet") and not (name in COMPOSITES and target == "mmdet"):
        raise WeightsError(
            f"{weights}: has a {name}, whose names differ there; only ResNets can be exported --to {target}"
        )
    family = content.detector.family
    if family not in {"mmdet": mmdet.RULES, "torchvision": torchvision_names.RULES}[target]:
        raise WeightsError(f"{weights}: --to {target} knows no names for the tensors of {family}")
    if target == "torchvision":
        saved, left_out, usage = to_torchvision(content)
    else:
        saved, left_out = mmdet_checkpoint(content)
        place = "CBNetV2" if name in COMPOSITES else "mmdetection 2.x"
        usage = f"{place}: load_from, or init_detector with the config of this detector"
    write_bytes(file, serialise(saved))
    return Exported(file, len(content.state_dict), left_out, usage)


def _export_onnx(artifact: Artifact, weights: Path, file: Path, image_size: str | None, with_nms: bool) -> Exported:
    from aligndet_cli.tools.conversion import onnx_file

    options = onnx_file.OnnxOptions(with_nms, None if image_size is None else _parse_size(image_size))
    content = read_detector(weights)
    options.check(content.detector.family, content.backbone.name)
    detector = load_detector(weights)
    images, origin = onnx_file.comparison_images(_data_of(artifact))
    usage, comparison = onnx_file.export_onnx(detector, file, options, images)
    if comparison.num_detections < _FEW:
        logger.warning(f"the comparison says little: only {comparison.num_detections} detections in {origin}")
    return Exported(file, len(content.state_dict), [], usage, comparison, origin)


def _data_of(artifact: Artifact) -> DataConfig | None:
    """Return the data that a run was trained on; None if it does not say."""
    found = artifact.config().get("data") if (artifact.folder / "config.json").exists() else None
    return None if found is None else DataConfig.model_validate(found)


def mmdet_checkpoint(content: DetectorFile) -> tuple[dict[str, Any], list[str]]:
    """Return a checkpoint with mmdetection's names, and the names of our tensors that have no place in it.

    Settings that mmdetection keeps in a config are added to the meta data, so that importing the file gives the same
    run.
    """
    family = content.detector.family
    tensors = {**content.state_dict, **_projector(family, content.extra.get("projector", {}))}
    state_dict, left_out = to_mmdet(family, tensors)
    if content.backbone.name in COMPOSITES:
        state_dict = to_cbnet(state_dict, content.backbone.family)
    own: dict[str, Any] = {
        "version": __version__,
        "detector": content.detector.model_dump(mode="json"),
        "backbone": content.backbone.model_dump(mode="json"),
    }
    meta: dict[str, Any] = {OWN_META: own}
    if content.categories:
        meta["CLASSES"] = tuple(category.name for category in content.categories)
        own["categories"] = [
            [category.category_id, category.name, *([True] if category.is_unused else [])]
            for category in content.categories
        ]
        own["resolution"] = list(content.resolution or ())
    return {"meta": meta, "state_dict": state_dict}, left_out


def _projector(family: str, projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projector as AlignDet saves it: RetinaNet's as 1x1 convolutions, FCOS's not at all."""
    if family == "fcos":
        return {}
    is_conv = family == "retinanet"
    return {
        f"{PROJECTOR}{name}": tensor[:, :, None, None] if is_conv and tensor.dim() == 2 else tensor
        for name, tensor in projector.items()
    }


def _parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of `HEIGHTxWIDTH`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(side and side % PAD_DIVISOR == 0 for side in size):
        raise ConfigError(f"--image-size {text}: write HEIGHTxWIDTH, both multiples of {PAD_DIVISOR}, as 800x1344")
    return size
