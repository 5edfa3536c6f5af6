"""Looking at data, drawing some, and splitting it."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from aligndet_cli import flags
from aligndet_cli.commands.terminal import console, print_json, user_errors, with_data_root
from aligndet_cli.config import Sources, StageConfig, check_seed, load_config
from aligndet_cli.driver import with_data
from aligndet_cli.errors import ConfigError, DataError, GateError
from aligndet_cli.flags import Given, own, setting, with_flags
from aligndet_cli.stage import find_stage
from aligndet_cli.tables import plain_table
from aligndet_cli.workspace import Workspace

if TYPE_CHECKING:
    from aligndet_cli.data.doctor import DoctorReport

_SEVERITY_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}

DOCTOR = (
    flags.WORKSPACE,
    flags.JSON,
    own("--strict", bool, "Exit 6 on warnings too; errors are always 3 (off)."),
    *flags.DATA,
)
VIEWS = (
    flags.WORKSPACE,
    flags.CONFIG,
    flags.SET,
    flags.JSON,
    flags.SEED,
    *flags.DATA[:-1],
    own("--count", int, "Number of images to show (4)."),
    own("--output -o", Path, "File to write (views.jpg in the workspace)."),
    setting("--method", "method"),
    flags.DETECTOR,
    setting("--topk", "topk"),
    setting("--short-side", "views.short_side"),
    setting("--long-side", "views.long_side"),
)
FOLDS = (
    flags.JSON,
    *flags.DATA[:-1],
    setting("--fractions", "fractions"),
    setting("--folds", "folds"),
    setting("--output -o", "output"),
    setting("--unlabeled", "unlabeled"),
)


@with_flags(DOCTOR, "doctor", ("DATA", f"{flags.LAYOUTS}, or a folder of images (the workspace's)."))
def doctor(data: Path | None, given: Given, *, strict: bool = False) -> None:
    """Check images and labels, and say what is wrong with them; exit code 3 on errors."""
    from aligndet_cli.data.doctor import check_data
    from aligndet_cli.data.findings import counted

    with user_errors(given):
        config, _ = load_config(StageConfig, "doctor", Sources(flags=with_data_root(data, given)))
        report = check_data(with_data(config, Workspace.locate(given.control.workspace), "doctor").data)
        if given.control.json:
            print_json({"command": "doctor", **report.to_json()})
        else:
            console().print(_finding_table(report))
            counts = ", ".join(counted(report.count(severity), severity) for severity in ("error", "warning"))
            typer.echo(f"{report.summary['format'] or 'unknown'} data at {report.summary['root']}: {counts}")
    with user_errors(given, is_json=False):  # the result is out already
        if errors := report.count("error"):
            others = f" (and {counted(errors - 1, 'more error')}, see above)" if errors > 1 else ""
            raise DataError(report.findings[0].message + others)
        if strict and (warnings := report.count("warning")):
            raise GateError(f"doctor --strict: {counted(warnings, 'warning')}, see above")


@with_flags(VIEWS, "pretrain-box", ("DATA", find_stage("pretrain-box").data))
def views(data: Path | None, given: Given, *, output: Path | None = None, count: int | None = None) -> None:
    """Draw the two views of a few images as pretrain-box will see them, to check boxes before training."""
    from aligndet_cli.tools.views import write_views

    asked = given.control
    with user_errors(given):
        sources = Sources(asked.config, asked.set, with_data_root(data, given))
        file = write_views(sources, Workspace.locate(asked.workspace), output, count)
        if asked.json:
            print_json({"command": "views", "file": str(file)})
        else:
            typer.echo(str(file))


@with_flags(FOLDS, "split", ("DATA", f"{flags.LAYOUTS} with labels."))
def split(data: Path | None, given: Given) -> None:
    """Write the field's low-data folds as COCO files."""
    from aligndet_cli.data.folds import SplitConfig, write_folds

    with user_errors(given):
        config, _ = load_config(SplitConfig, "split", Sources(flags=with_data_root(data, given)))
        written = write_folds(config)
        if given.control.json:
            print_json({"command": "split", "files": [fold.to_json() for fold in written]})
        else:
            typer.echo("\n".join(str(fold.file) for fold in written))


TOY = (
    own("--train", int, "Number of pictures to train on (480)."),
    own("--val", int, "Number of pictures to measure on (96)."),
    own("--objects", bool, "One object in each picture, one folder per class (off)."),
    own("--seed", int, "Seed of the pictures (0)."),
    flags.JSON,
)


@with_flags(TOY, "toy", ("FOLDER", "Folder to draw into."))
def toy(
    folder: Path | None, given: Given, *, train: int = 480, val: int = 96, objects: bool = False, seed: int = 0
) -> None:
    """Draw a small data set to try things on: many objects per picture with COCO labels, or single objects by class."""
    from aligndet_cli.data.toy import draw_toy_data, draw_toy_objects

    with user_errors(given):
        if folder is None:
            raise ConfigError("which folder? name it: `aligndet toy FOLDER`")
        check_seed(seed)
        if min(train, val) < 1:
            raise ConfigError("--train and --val: 1 at least")
        if folder.is_dir() and any(folder.iterdir()):  # perhaps somebody's own data
            raise ConfigError(f"{folder}: is not empty; name a new folder")
        (draw_toy_objects if objects else draw_toy_data)(folder, seed=seed, num_train=train, num_val=val)
        if given.control.json:
            print_json({"command": "toy", "folder": str(folder), "train": train, "val": val})
        else:
            typer.echo(str(folder))


def _finding_table(report: "DoctorReport") -> Table:
    """Draw one line per finding."""
    table = plain_table("", "count", "finding", "example")
    for finding in report.findings:
        severity = Text(finding.severity, _SEVERITY_COLOURS[finding.severity])
        table.add_row(severity, str(finding.count), Text(finding.message), Text(finding.example))
    return table
