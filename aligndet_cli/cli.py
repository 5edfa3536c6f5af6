"""The command line: which commands there are. Imports no torch."""

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from aligndet_cli import __version__
from aligndet_cli.commands import data, results, settings, stages, weights
from aligndet_cli.errors import Preempted
from aligndet_cli.processes.signals import Stopped, ignore_stopping, stop_at_once

app = typer.Typer(
    name="aligndet",
    help="Pre-train an object detector on images nobody has labelled, then fine-tune and evaluate it.\n\n"
    "aligndet proposals DATA, cluster, pretrain-box, finetune, evaluate: each finds what the one before left "
    "in the workspace. Before them, pretrain-image DATA makes the backbone where there is none to download.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STAGES = "Stages, in their order"
RESULTS = "What came of it"
DATA = "Data"
WEIGHTS = "Weights of other programs"
SETTINGS = "Settings and this machine"

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    STAGES: {
        "pretrain-image": stages.pretrain_image,
        "proposals": stages.proposals,
        "cluster": stages.cluster,
        "pretrain-box": stages.pretrain_box,
        "finetune": stages.finetune,
        "evaluate": stages.evaluate,
    },
    RESULTS: {
        "predict": results.predict,
        "status": results.status,
        "report": results.report,
        "figures": results.figures,
        "study": results.study,
        "demo": results.demo,
    },
    DATA: {"doctor": data.doctor, "views": data.views, "split": data.split, "toy": data.toy},
    WEIGHTS: {"import-weights": weights.import_weights, "export": weights.export},
    SETTINGS: {"bench": settings.bench},
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)

list_app = typer.Typer(help="List what can be chosen.", no_args_is_help=True)
list_app.command("detectors")(settings.list_detectors)
list_app.command("backbones")(settings.list_backbones)
app.add_typer(list_app, name="ls", rich_help_panel=SETTINGS)

config_app = typer.Typer(help="Look at settings.", no_args_is_help=True)
config_app.command("show")(settings.config_show)
app.add_typer(config_app, name="config", rich_help_panel=SETTINGS)


def main() -> None:
    """Entry point of the console script."""
    # Read when torch is loaded: on a busy machine, threads that spin while they wait cost up to four times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, io.StringIO())
    stop_at_once()
    try:
        app()
    except Stopped as stop:  # outside of a command's own work
        typer.echo(f"error: {stop}", err=True)
        sys.exit(Preempted.exit_code)
    finally:
        ignore_stopping()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Pre-train an object detector on images nobody has labelled, then fine-tune and evaluate it."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
