"""Commands that show results: status, studies, reports, figures, detections, the demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aligndet_cli import flags
from aligndet_cli.commands import terminal
from aligndet_cli.commands.terminal import print_json, user_errors
from aligndet_cli.config import Sources, check_seed, load_config
from aligndet_cli.errors import ConfigError, did_you_mean
from aligndet_cli.evaluate.command import RUN, SIZES
from aligndet_cli.files import check_output_file, write_bytes
from aligndet_cli.flags import Given, control, own, setting, with_flags
from aligndet_cli.logs import logger
from aligndet_cli.processes.launch import Shown
from aligndet_cli.workspace import Workspace

if TYPE_CHECKING:
    from aligndet_cli.tools.study.command import StudyOutcome


@with_flags((flags.WORKSPACE, flags.JSON), "status", None)
def status(_: None, given: Given) -> None:
    """Show what is in the workspace, what it was made from, and what is out of date."""
    from aligndet_cli.tools.status import collect_status, status_table

    with user_errors(given):
        place = Workspace.locate(given.control.workspace)
        rows = collect_status(place)
        if given.control.json:
            print_json({"command": "status", "workspace": str(place.root), "runs": [vars(row) for row in rows]})
        elif rows:
            console = terminal.console()
            table, left_out = status_table(rows, console.width)
            console.print(table)
            if left_out:
                logger.info(f"{' and '.join(left_out)}: in a wider terminal, or with --json")
        else:
            typer.echo(f"{place.root}: empty; start with `aligndet proposals DATA`")


DEMO = (
    own("--photos", Path, "Labelled data set to tell the story on (pictures that are drawn)."),
    own("--backbone", str, "With --photos: backbone, see `aligndet ls backbones` (that of the weights)."),
    own(
        "--backbone-weights", str, "With --photos: file, DEFAULT or another of torchvision's (what torch's cache has)."
    ),
    control("--offline", bool, "With --photos: never download (off).", panel=flags.MACHINE),
    control("--workspace -w", Path, "Folder of pictures and artifacts (./demo)."),
    control("--seed", int, "Seed of the pictures and of all training (0)."),
    flags.JSON,
)
_PHOTO_FLAGS = ("backbone", "backbone_weights", "offline")


@with_flags(DEMO, "demo", None)
def demo(_: None, given: Given, *, seed: int = 0, photos: Path | None = None, **chosen: Any) -> None:
    """Run all stages, with and without pre-training, on pictures drawn on the spot, in a few minutes; or on photos."""
    from aligndet_cli.tools.demo import run_demo, run_photo_demo

    with user_errors(given):
        check_seed(seed)
        _refuse_idle(_PHOTO_FLAGS if photos is None else (), chosen, "goes with --photos DATA")
        folder = given.control.workspace or Path("demo")
        if photos is None:
            report = run_demo(folder, seed=seed)
        else:
            named = {"backbone": chosen.get("backbone"), "weights": chosen.get("backbone_weights")}
            report = run_photo_demo(folder, photos, seed=seed, **named, offline=chosen.get("offline", False))
        if given.control.json:
            print_json({"command": "demo", "status": "done", "result": report.to_json()})
            return
        terminal.console().print(report.table())
        if photos is not None:
            typer.echo(f"one pair is no proof: `aligndet study --quick {photos}` has several, and says how sure it is")
        typer.echo(f"report with all pictures: {report.page}")


def _refuse_idle(names: tuple[str, ...], given: dict[str, Any], reason: str) -> None:
    for name in names:
        if name in given:
            raise ConfigError(f"--{name.replace('_', '-')}: {reason}")


STUDY = (
    own("--quick", bool, "Plan a study of DATA for this machine, run it, and say whether pre-training pays (off)."),
    own("--hours", float, "With --quick: time to plan for (1)."),
    own(
        "--detector",
        str,
        "With --quick: retinanet | fcos | faster-rcnn (retinanet).",
        words="retinanet fcos faster-rcnn",
    ),
    own("--backbone", str, "With --quick: backbone, see `aligndet ls backbones` (that of the weights)."),
    own("--backbone-weights", str, "With --quick: file, DEFAULT or another of torchvision's (what torch's cache has)."),
    control("--offline", bool, "With --quick: never download (off).", panel=flags.MACHINE),
    control("--jobs -j", int, "Runs at a time (one per GPU, else one)."),
    control("--dry-run -n", bool, "List the runs, and which are complete; with --quick, only plan (off)."),
    flags.WORKSPACE,
    flags.JSON,
    flags.PROGRESS,
    control("--verbose -v", bool, "Print the log of each run, too (off)."),
)
_QUICK_FLAGS = ("hours", "detector", "backbone", "backbone_weights", "offline")


@with_flags(
    STUDY,
    "study",
    ("FILE", "TOML file of the starts to compare, and of detectors, fractions, folds, seeds; with --quick, DATA."),
)
def study(file: Path | None, given: Given, *, jobs: int | None = None, quick: bool = False, **chosen: Any) -> None:
    """Run detectors, starts, labelled fractions, folds and seeds against each other, and report.

    With --quick, answer one question in a given time: does box-domain pre-training pay on DATA?
    """
    from aligndet_cli.tools.report.table import render
    from aligndet_cli.tools.study.command import run_study

    asked = given.control
    with user_errors(given):
        _refuse_idle(() if quick else _QUICK_FLAGS, chosen, "goes with --quick; a study file says it itself")
        shown = Shown(terminal.progress_mode(asked.progress), asked.verbosity)
        place = Workspace.locate(asked.workspace)
        if quick:
            _study_quick(file, place, shown, given, jobs, chosen)
            return
        if file is None:
            raise ConfigError("which study? name its file: `aligndet study FILE`, or `aligndet study --quick DATA`")
        outcome = run_study(file, place, jobs=jobs, dry_run=asked.dry_run, shown=shown)
        if asked.json and outcome.report is None and outcome.failure is not None:
            raise outcome.failure
        if asked.json:
            print_json({"command": "study", **outcome.to_json()})
        else:
            typer.echo(outcome.listing() if outcome.report is None else render(outcome.report, "table"))
        _tell_failures(outcome)


def _study_quick(
    data: Path | None, place: Workspace, shown: Shown, given: Given, jobs: int | None, chosen: dict[str, Any]
) -> None:
    from aligndet_cli.tools.report.table import render
    from aligndet_cli.tools.study.quick.command import ask, run_quick

    if data is None:
        raise ConfigError("which data? name it: `aligndet study --quick DATA`")
    offline = chosen.pop("offline", False)
    is_dry = given.control.dry_run
    outcome = run_quick(ask(data, **chosen), place, jobs=jobs, dry_run=is_dry, offline=offline, shown=shown)
    if given.control.json:
        print_json({"command": "study", **outcome.to_json()})
    elif outcome.study.report is None:
        typer.echo(f"dry run: {outcome.file} would be written, and {len(outcome.study.states)} runs started")
    else:
        typer.echo(render(outcome.study.report, "table"))
        if outcome.page is not None:
            typer.echo(f"page with all pictures: {outcome.page}")
    _tell_failures(outcome.study)


def _tell_failures(outcome: "StudyOutcome") -> None:
    for state in outcome.failed:
        typer.echo(f"failed: {state.stage}/{state.name}: {state.message}", err=True)
    if outcome.failure is not None:
        terminal.fail(str(outcome.failure), outcome.failure.exit_code, is_json=False)  # the result is out already


REPORT = (
    own("--html", bool, "One page of tables, commands and pictures (off)."),
    own("--format", str, "table | markdown | csv | json (table).", words="table markdown csv json"),
    own("--output -o", Path, "File to write (stdout; report.html in the workspace)."),
    own("--study", list, "Only the runs of this study file; repeatable (all runs)."),
    own("--baseline", str, "Start to compare with (backbone only)."),
    own("--metric", str, "AP, AP50, AP75, mask_AP and so on (AP, AP50, AP75)."),
    own("--costs", bool, "Also images seen and hours of pre-training, and hours of fine-tuning (off)."),
    flags.WORKSPACE,
    flags.JSON,
)


@with_flags(REPORT, "report", None)
def report(
    _: None, given: Given, *, html: bool = False, output: Path | None = None, costs: bool = False, **chosen: Any
) -> None:
    """Put the evaluated runs of a workspace side by side, with the paper's numbers where there are any."""
    from aligndet_cli.tools.report.collect import METRICS, check_baseline, collect_report
    from aligndet_cli.tools.report.table import FORMATS, render
    from aligndet_cli.tools.study.command import evaluations_of

    is_json, place = given.control.json, Workspace.locate(given.control.workspace)
    with user_errors(given):
        if html and "format" in chosen:
            raise ConfigError("--html and --format exclude each other")
        if html and costs:
            raise ConfigError("--costs: no effect on --html; leave it out")
        form = chosen.get("format") or ("json" if is_json else "table")
        if form not in FORMATS:
            raise ConfigError(f"--format {form}: is not a choice{did_you_mean(form, list(FORMATS))}")
        if is_json and form != "json" and output is None:
            raise ConfigError(f"--json and --format {form} exclude each other without --output")
        if output is not None:
            check_output_file(output)
        metrics = [part.strip() for part in chosen["metric"].split(",")] if "metric" in chosen else METRICS
        names = evaluations_of(map(Path, chosen["study"]), place) if "study" in chosen else None
        baseline = chosen.get("baseline")
        found = collect_report(place, baseline=baseline, metrics=metrics, names=names, with_costs=costs)
        check_baseline(found, baseline)
        if html:
            from aligndet_cli.tools.report.html import write_page

            output = write_page(place, found, output)
            typer.echo(terminal.json_text({"command": "report", "file": str(output)}) if is_json else str(output))
            return
        text = terminal.json_text({"command": "report", **found.to_json()}) if form == "json" else render(found, form)
        if output is None:
            typer.echo(text)
            return
        write_bytes(output, f"{text}\n".encode())
        logger.info(f"written to {output}")
        if is_json:
            print_json({"command": "report", "file": str(output)})


FIGURES = (
    own("--run", str, "Evaluated run (the newest that is pre-trained).", runs="evaluate/* finetune/*"),
    own("--compare", str, "The same without pre-training (the newest).", runs="evaluate/* finetune/*"),
    own("--format", str, "png | pdf | svg (png).", words="png pdf svg"),
    own("--output -o", Path, "Folder to write to (figures, in the workspace)."),
    flags.WORKSPACE,
    flags.JSON,
)


@with_flags(FIGURES, "figures", None)
def figures(
    _: None,
    given: Given,
    *,
    run: str | None = None,
    compare: str | None = None,
    format: str = "png",
    output: Path | None = None,
) -> None:
    """Draw the paper's figures of your runs: embeddings, box centres, losses and detections of two starts."""
    from aligndet_cli.tools.figures.command import write_figures

    with user_errors(given):
        drawn = write_figures(Workspace.locate(given.control.workspace), run, compare, output, form=format)
        if given.control.json:
            print_json({"command": "figures", **drawn.to_json()})
        else:
            typer.echo("\n".join(map(str, drawn.files)))


PREDICT = (
    RUN,
    setting("--weights", "weights", words="last best"),
    setting("--score", "score"),
    *SIZES,
    setting("--output -o", "output"),
    setting("--annotated/--no-annotated", "annotated"),
    setting("--save-crops", "save_crops"),
    setting("--save-txt", "save_txt"),
    setting("--save-conf", "save_conf"),
    setting("--csv", "csv"),
    setting("--every", "every"),
    flags.WORKSPACE,
    flags.FORCE,
    flags.JSON,
    flags.PROGRESS,
    flags.QUIET,
    flags.ACCELERATOR,
    flags.WORKERS,
    flags.PRECISION,
)


@with_flags(
    PREDICT, "predict", ("IMAGES", "Images and videos: files, folders, or patterns such as 'photos/*.jpg'."), list[str]
)
def predict(images: list[str] | None, given: Given) -> None:
    """Detect in any images and videos with a fine-tuned run, and draw what was found."""
    from aligndet_cli.tools.predict.command import PredictConfig, predict_files

    asked = given.control
    with user_errors(given):
        if not images:
            raise ConfigError("which images? name them: `aligndet predict IMAGES...`")
        config, _ = load_config(PredictConfig, "predict", Sources(flags=given.settings))
        shown = Shown(terminal.progress_mode(asked.progress, is_quiet=asked.quiet), asked.verbosity, given.flags)
        place = Workspace.locate(asked.workspace)
        terminal.answer("predict", predict_files(images, config, place, force=asked.force, shown=shown), asked.json)
