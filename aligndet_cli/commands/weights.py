"""Weights from other programs, and for them."""

from pathlib import Path
from typing import Any

from aligndet_cli.commands.terminal import answer, print_outcome, user_errors
from aligndet_cli.errors import ConfigError
from aligndet_cli.flags import FORCE, JSON, RUN, WORKSPACE, Given, own, setting, with_flags
from aligndet_cli.workspace import Workspace

LAYOUTS = ("auto", "mmdet", "aligndet", "detectron2", "torchvision", "detr", "up-detr", "detreg", "soco")
IMPORT = (
    setting("--from", "layout", text=f"Layout of the file: {' | '.join(LAYOUTS)} (auto).", words=" ".join(LAYOUTS)),
    setting("--detector", "detector", text="Detector, needed where an R-CNN may be Faster or Mask (the file's)."),
    setting("--backbone", "backbone", text="Backbone, checked (the file's)."),
    setting(
        "--style", "style", text="Style of images and strides: caffe | pytorch (the file's).", words="caffe pytorch"
    ),
    setting("--categories", "categories", text="Classes: coco | voc | a COCO json (the file's).", words="coco voc"),
    setting("--name", "name", RUN, "Name of the run (made from its settings)."),
    WORKSPACE,
    FORCE,
    JSON,
)


@with_flags(IMPORT, "import-weights", ("FILE", "Checkpoint of another program."))
def import_weights(file: Path | None, given: Given) -> None:
    """Turn a released checkpoint into a run that finetune --init and evaluate take."""
    from aligndet_cli.tools.conversion import importing

    asked_for = given.control
    with user_errors(given):
        if file is None:
            raise ConfigError("which checkpoint? name it: `aligndet import-weights FILE`")
        asked = {path: value for path, (_, value) in given.settings.items()}
        request = importing.ImportRequest(file, **asked, force=asked_for.force)
        outcome = importing.import_weights(request, Workspace.locate(asked_for.workspace))
        print_outcome("import-weights", outcome, asked_for.json)


EXPORT = (
    own("--run", str, "Fine-tuned run, or pretrain-box/RUN (the newest).", runs="finetune/*"),
    own("--weights", str, "Weights of the run: last | best (last).", words="last best"),
    own("--to", str, "Program: mmdet | torchvision | onnx (mmdet).", words="mmdet torchvision onnx"),
    own("--output -o", Path, "File to write (RUN-PROGRAM here)."),
    own("--with-nms/--no-with-nms", bool, "Suppress overlapping boxes in the onnx file (on)."),
    own("--image-size", str, "HEIGHTxWIDTH, for an onnx file that takes one image of it (any number and size)."),
    WORKSPACE,
    JSON,
)


@with_flags(EXPORT, "export", None)
def export(
    _: None,
    given: Given,
    *,
    run: str | None = None,
    weights: str = "last",
    to: str = "mmdet",
    output: Path | None = None,
    **for_onnx: Any,
) -> None:
    """Write a run's weights for another program."""
    from aligndet_cli.tools.conversion.exporting import export_run

    with user_errors(given):
        place = Workspace.locate(given.control.workspace)
        exported = export_run(place, run, to, output, which=weights, **for_onnx)
        answer("export", exported, given.control.json)


PUSH = (
    own("--to", str, "Place: hub:OWNER/NAME on the Hugging Face Hub."),
    own("--private/--public", bool, "Make a new place private (public)."),
    WORKSPACE,
    JSON,
)


@with_flags(PUSH, "push", ("RUN", "Fine-tuned run, or pretrain-box/RUN, pretrain-image/RUN (the newest)."), str)
def push(run: str | None, given: Given, *, to: str | None = None, private: bool = False) -> None:
    """Put a run's weights on a hub, with a card that says what they are."""
    from aligndet_cli.tools.push import push as put

    with user_errors(given):
        if to is None:
            raise ConfigError("where? name the place: `aligndet push RUN --to hub:OWNER/NAME`")
        pushed = put(Workspace.locate(given.control.workspace), run, to, is_private=private)
        answer("push", pushed, given.control.json)
