"""Weights from other programs, and for them."""

from pathlib import Path
from typing import Annotated

import typer

from aligndet_cli.commands.terminal import JsonOption, WorkspaceOption, answer, print_outcome, user_errors
from aligndet_cli.errors import ConfigError
from aligndet_cli.flags import FORCE, JSON, RUN, WORKSPACE, Given, setting, with_flags
from aligndet_cli.workspace import Workspace

IMPORT = (
    setting("--from", "layout", text="Layout: auto | mmdet | aligndet | detectron2 | torchvision | detr (auto)."),
    setting("--detector", "detector", text="Detector it must be; tells a pre-trained Faster from a Mask R-CNN."),
    setting("--backbone", "backbone", text="Backbone it must have."),
    setting("--style", "style", text="Images and strides, where the file does not tell: caffe | pytorch."),
    setting("--categories", "categories", text="Classes, where the file does not tell: coco | voc | a COCO json."),
    setting("--name", "name", RUN, "Name of the run."),
    WORKSPACE,
    FORCE,
    JSON,
)


@with_flags(IMPORT, "import-weights", ("FILE", "Checkpoint of another program."))
def import_weights(file: Path | None, given: Given) -> None:
    """Turn a released checkpoint into a run that finetune --init and evaluate take."""
    from aligndet_cli.tools.conversion import importing

    control = given.control
    with user_errors(control.json):
        if file is None:
            raise ConfigError("which checkpoint? name it: `aligndet import-weights FILE`")
        asked = {path: value for path, (_, value) in given.settings.items()}
        request = importing.ImportRequest(file, **asked, force=control.force)
        outcome = importing.import_weights(request, Workspace.locate(control.workspace))
        print_outcome("import-weights", outcome, control.json)


def export(
    workspace: WorkspaceOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Fine-tuned run (the newest), or pretrain-box/RUN.")] = None,
    target: Annotated[str, typer.Option("--to", help="mmdet | torchvision | onnx.")] = "mmdet",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default=False)] = None,
    image_size: Annotated[str, typer.Option("--image-size", help="HEIGHTxWIDTH of the images, for onnx.")] = "800x1344",
    is_json: JsonOption = False,
) -> None:
    """Write a run's weights for another program."""
    from aligndet_cli.tools.conversion.exporting import export_run

    with user_errors(is_json):
        exported = export_run(Workspace.locate(workspace), run, target, output, image_size=image_size)
        answer("export", exported, is_json)
