"""`aligndet export`: write a run's weights in the layout of another program."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from aligndet_cli import __version__
from aligndet_cli.data.batch import PAD_DIVISOR
from aligndet_cli.detectors.checkpoint import DetectorFile, WeightsName, load_detector, read_detector, weights_file
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import check_output_file, write_bytes
from aligndet_cli.tools.conversion import mmdet, torchvision_names
from aligndet_cli.tools.conversion.convert import OWN_META, PROJECTOR
from aligndet_cli.tools.conversion.mmdet import to_mmdet
from aligndet_cli.tools.conversion.torchvision_names import to_torchvision
from aligndet_cli.training.checkpoint import serialise
from aligndet_cli.workspace import Artifact, Workspace

EXPORTABLE = ("finetune", "pretrain-box")
SUFFIXES = {"mmdet": ".pth", "torchvision": ".pth", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        left_out: names of our tensors that have no place in the other program.
        usage: a sentence on how to load the file.
    """

    file: Path
    num_tensors: int
    left_out: list[str]
    usage: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": str(self.file),
            "tensors": self.num_tensors,
            "written": self.num_tensors - len(self.left_out),
            "left_out": self.left_out,
            "usage": self.usage,
        }

    def lines(self) -> list[str]:
        """Return lines for people."""
        lines = [str(self.file), f"  {self.num_tensors - len(self.left_out)} of {self.num_tensors} tensors"]
        if self.left_out:
            modules = sorted({name.rpartition(".")[0].rpartition(".")[0] or name for name in self.left_out})
            lines.append(f"  left out: {', '.join(modules)}")
        return [*lines, f"  {self.usage}"]


def export_run(
    workspace: Workspace,
    run: str | None,
    target: str,
    file: Path | None,
    *,
    which: str = "last",
    image_size: str = "800x1344",
) -> Exported:
    """Write a run of `finetune` or `pretrain-box` for another program.

    Args:
        run: name of a fine-tuned run, or `pretrain-box/NAME`; None: the newest fine-tuned run.
        target: `mmdet`, `torchvision` or `onnx`.
        file: None: `<run>-<target>` in the current folder.
        which: `last` or `best` weights of a fine-tuned run.
        image_size: height and width of the images, for ONNX.

    Raises:
        ConfigError: no such run or target, or the file cannot be written.
        WeightsError: the other program has no such detector.
    """
    if target not in SUFFIXES:
        raise ConfigError(f"--to {target}: write one of {', '.join(SUFFIXES)}")
    if which not in get_args(WeightsName):
        raise ConfigError(f"--weights {which}: write last or best")
    artifact = _find_run(workspace, run)
    weights = weights_file(artifact.folder, cast(WeightsName, which))
    best = "-best" if which == "best" else ""
    file = file or Path(f"{artifact.name}{best}-{target}{SUFFIXES[target]}")
    check_output_file(file)
    if target == "onnx":
        from aligndet_cli.tools.conversion.onnx_graph import export_onnx

        usage = export_onnx(load_detector(weights), file, _parse_size(image_size))
        return Exported(file, len(read_detector(weights).state_dict), [], usage)
    content = read_detector(weights)
    if not content.backbone.name.startswith("resnet"):
        raise WeightsError(
            f"{weights}: has a {content.backbone.name}, whose names differ there; only ResNets can be exported "
            f"--to {target}"
        )
    family = content.detector.family
    if family not in {"mmdet": mmdet.RULES, "torchvision": torchvision_names.RULES}[target]:
        raise WeightsError(f"{weights}: --to {target} knows no names for the tensors of {family}")
    if target == "torchvision":
        saved, left_out, usage = to_torchvision(content)
    else:
        saved, left_out = mmdet_checkpoint(content)
        usage = "mmdetection 2.x: load_from, or init_detector with the config of this detector"
    write_bytes(file, serialise(saved))
    return Exported(file, len(content.state_dict), left_out, usage)


def mmdet_checkpoint(content: DetectorFile) -> tuple[dict[str, Any], list[str]]:
    """Return a checkpoint with mmdetection's names, and the names of our tensors that have no place in it.

    Settings that mmdetection keeps in a config are added to the meta data, so that importing the file gives the same
    run.
    """
    family = content.detector.family
    tensors = {**content.state_dict, **_projector(family, content.extra.get("projector", {}))}
    state_dict, left_out = to_mmdet(family, tensors)
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


def _find_run(workspace: Workspace, run: str | None) -> Artifact:
    stage, _, name = (run or "").rpartition("/")
    if stage not in ("", *EXPORTABLE):
        raise ConfigError(f"--run {run}: write the name of a finetune run, or pretrain-box/NAME")
    return workspace.require(stage or "finetune", name or None)
