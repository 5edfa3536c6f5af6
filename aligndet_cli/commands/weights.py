"""Weights from other programs, and for them."""

from pathlib import Path
from typing import Annotated

import typer

from aligndet_cli.commands.terminal import JsonOption, WorkspaceOption, print_json, print_outcome, user_errors
from aligndet_cli.errors import ConfigError
from aligndet_cli.flags import IMPORT, Given, with_flags
from aligndet_cli.logs import setup_logging
from aligndet_cli.workspace import Workspace


@with_flags(IMPORT, ("FILE", "Checkpoint of another program."))
def import_weights(file: Path | None, given: Given) -> None:
    """Turn a released checkpoint into a run that finetune --init and evaluate take."""
    from aligndet_cli.tools.conversion import importing

    is_json = bool(given.control["json"])
    setup_logging(0)
    with user_errors(is_json):
        if file is None:
            raise ConfigError("which checkpoint? name it: `aligndet import-weights FILE`")
        asked = {path: value for path, (_, value) in given.settings.items()}
        request = importing.ImportRequest(file, **asked, force=bool(given.control["force"]))
        outcome = importing.import_weights(request, Workspace.locate(given.control["workspace"]))
        print_outcome("import-weights", outcome, is_json)


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

    setup_logging(0)
    with user_errors(is_json):
        exported = export_run(Workspace.locate(workspace), run, target, output, image_size=image_size)
        if is_json:
            print_json({"command": "export", **exported.to_json()})
        else:
            typer.echo("\n".join(exported.lines()))
