"""The command line: which commands there are. Imports no torch."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from aligndet_cli import __version__
from aligndet_cli.commands import data, results, settings, weights
from aligndet_cli.commands.replay import replay
from aligndet_cli.commands.stages import stage_command
from aligndet_cli.commands.terminal import CommandLine
from aligndet_cli.config import STAGES
from aligndet_cli.errors import Preempted
from aligndet_cli.logs import make_streams_sturdy
from aligndet_cli.processes.signals import Stopped, end_if_out_of_reach, ignore_stopping, stop_at_once
from aligndet_cli.stage import find_stage

EXIT_CODES = {
    "0": "done, or complete already",
    "1": "failed while running (out of memory, diverged, a full disk)",
    "2": "a wrong flag or setting, or a missing run",
    "3": "the data cannot be used",
    "4": "the weights or the model cannot be used",
    "6": "a gate was not passed (evaluate --fail-under, doctor --strict)",
    "75": "stopped by SIGTERM, SIGUSR1 or SIGHUP with everything saved",
    "130": "stopped by Ctrl-C",
}


def paragraphs(title: str, *lines: str) -> str:
    """Return the end of a help page, one line each."""
    return "\n".join([title, *lines])


app = typer.Typer(
    name="aligndet",
    cls=CommandLine,
    help="Pre-train an object detector on images nobody has labelled, then fine-tune and evaluate it.\n\n"
    "aligndet proposals DATA, cluster, pretrain-box, finetune, evaluate: each finds what the one before left "
    "in the workspace. Before them, pretrain-image DATA makes the backbone where there is none to download.",
    epilog=paragraphs("Exit codes:", *(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SETTINGS = "Settings and this machine"

for name in STAGES:
    stage = find_stage(name)
    end = paragraphs("Examples:", *stage.examples)
    app.command(name, epilog=end, rich_help_panel="Stages, in their order")(stage_command(stage))

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "What came of it": (results.predict, results.status, results.report, results.figures, results.study, results.demo),
    "Data": (data.doctor, data.views, data.split, data.toy),
    "Weights of other programs": (weights.import_weights, weights.export, weights.push),
    SETTINGS: (settings.bench, replay),
}
# Three of each command: the words that follow its name.
EXAMPLES = {
    "predict": ("photos/", "'photos/*.jpg' --score 0.5 --save-crops", "clip.mp4 --every 5 --csv --weights weights.pt"),
    "status": ("", "-w experiments/", "--json"),
    "report": ("", "--html", "--format csv --output results.csv"),
    "figures": ("", "--run retinanet-resnet50", "--output figures/"),
    "study": ("--quick mydata --hours 0.5", "study.toml --dry-run", "study.toml --jobs 4"),
    "demo": ("", "--photos mydata", "-w somewhere/ --json"),
    "doctor": ("coco/", "voc/ --split trainval", "--strict --json"),
    "views": ("", "--count 16 --output views.jpg", "--detector detr --short-side 800"),
    "split": ("coco/", "coco/ --fractions 1,10 --folds 1,2,3", "voc/ --unlabeled --output folds/"),
    "toy": ("pictures/", "objects/ --objects", "pictures/ --train 100 --val 20 --seed 1"),
    "import-weights": (
        "aligndet_fcos.pth",
        "model_final.pkl --from detectron2 --categories coco",
        "faster_rcnn.pth --detector faster-rcnn --name released",
    ),
    "export": (
        "--to mmdet",
        "--run retinanet-resnet50 --to onnx",
        "--run pretrain-box/retinanet-resnet50 --to torchvision",
    ),
    "push": (
        "--to hub:me/cells",
        "retinanet-resnet50 --to hub:me/cells --private",
        "pretrain-box/retinanet-resnet50 --to hub:me/necks",
    ),
    "replay": ("", "finetune/retinanet-resnet50", "pretrain-box/fcos-resnet50 --accelerator cpu --json"),
    "bench": ("", "--detector detr --stage finetune", "coco/ --precision bf16-mixed --compile"),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        name = command.__name__.replace("_", "-")
        end = paragraphs("Examples:", *(f"aligndet {name} {words}".rstrip() for words in EXAMPLES[name]))
        app.command(name, epilog=end, rich_help_panel=panel)(command)

list_app = typer.Typer(help="List what can be chosen.", no_args_is_help=True)
for name, command in (("detectors", settings.list_detectors), ("backbones", settings.list_backbones)):
    words = (f"aligndet ls {name}", "aligndet finetune --detector fcos", "aligndet finetune --backbone swin_t")
    list_app.command(name, epilog=paragraphs("Examples:", *words))(command)
app.add_typer(list_app, name="ls", rich_help_panel=SETTINGS)

config_app = typer.Typer(help="Look at settings.", no_args_is_help=True)
show = ("finetune", "pretrain-box --origin", "proposals --set max_per_image=100 > proposals.toml")
config_app.command("show", epilog=paragraphs("Examples:", *(f"aligndet config show {words}" for words in show)))(
    settings.config_show
)
app.add_typer(config_app, name="config", rich_help_panel=SETTINGS)


def main() -> None:
    """Run the command line."""
    # Read when torch is loaded: on a busy machine, threads that spin while they wait cost up to four times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Else a types.py in the current folder would be taken for Python's own by the processes that a command starts.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    make_streams_sturdy()
    stop_at_once()
    try:
        with end_if_out_of_reach():
            app()
    except Stopped as stop:  # outside of a command's own work
        typer.echo(f"error: {stop}", err=True)
        sys.exit(Preempted.exit_code)
    finally:
        ignore_stopping()


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Pre-train an object detector on images nobody has labelled, then fine-tune and evaluate it."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
