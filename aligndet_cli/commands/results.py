"""Commands that show results: status, studies, reports, figures, detections, the demo."""

from pathlib import Path
from typing import Annotated

import typer

from aligndet_cli import flags
from aligndet_cli.commands import terminal
from aligndet_cli.commands.terminal import JsonOption, WorkspaceOption, print_json, user_errors
from aligndet_cli.config import Sources, did_you_mean, load_config
from aligndet_cli.errors import ConfigError
from aligndet_cli.evaluate.command import RUN, SIZES
from aligndet_cli.files import check_output_file, write_bytes
from aligndet_cli.flags import Given, setting, with_flags
from aligndet_cli.logs import logger
from aligndet_cli.processes.launch import Shown
from aligndet_cli.workspace import Workspace


def status(workspace: WorkspaceOption = None, is_json: JsonOption = False) -> None:
    """Show what is in the workspace, what it was made from, and what is out of date."""
    from aligndet_cli.tools.status import collect_status, status_table

    with user_errors(is_json):
        place = Workspace.locate(workspace)
        rows = collect_status(place)
        if is_json:
            print_json({"command": "status", "workspace": str(place.root), "runs": [vars(row) for row in rows]})
        elif rows:
            terminal.console().print(status_table(rows))
        else:
            typer.echo(f"{place.root}: empty; start with `aligndet proposals DATA`")


def demo(
    workspace: WorkspaceOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the pictures and of all training.")] = 0,
    is_json: JsonOption = False,
) -> None:
    """Run all five stages on pictures drawn on the spot, with and without pre-training, in a few minutes."""
    from aligndet_cli.tools.demo import run_demo

    with user_errors(is_json):
        report = run_demo(workspace or Path("demo"), seed=seed)
        if is_json:
            print_json({"command": "demo", "status": "done", "result": report.to_json()})
        else:
            terminal.console().print(report.table())
            typer.echo(f"report with all pictures: {report.page}")


def study(
    file: Annotated[Path, typer.Argument(help="TOML file: what is compared, and over what.")],
    workspace: WorkspaceOption = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Runs at a time (one per GPU).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="List the runs and what is complete.")] = False,
    progress: Annotated[str, typer.Option("--progress", help="Of single runs: auto | bar | plain | none.")] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="What each run tells, too.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Run detectors, starts, labelled fractions, folds and seeds against each other, and report."""
    from aligndet_cli.tools.report.table import render
    from aligndet_cli.tools.study.command import run_study

    with user_errors(is_json, int(verbose)):
        shown = Shown(terminal.progress_mode(progress), int(verbose))
        outcome = run_study(file, Workspace.locate(workspace), jobs=jobs, dry_run=dry_run, shown=shown)
        if is_json:
            print_json({"command": "study", **outcome.to_json()})
        else:
            typer.echo(outcome.listing() if outcome.report is None else render(outcome.report, "table"))
        for state in outcome.failed:
            typer.echo(f"failed: {state.stage}/{state.name}: {state.message}", err=True)
        if outcome.failure is not None:
            terminal.fail(str(outcome.failure), outcome.failure.exit_code, is_json=False)  # the result is out already


def report(  # noqa: PLR0913  # each is a flag
    workspace: WorkspaceOption = None,
    is_html: Annotated[
        bool, typer.Option("--html", help="One page of tables, commands and pictures (report.html in the workspace).")
    ] = False,
    form: Annotated[str | None, typer.Option("--format", help="table | markdown | csv | json (table).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
    study: Annotated[
        list[str] | None, typer.Option("--study", help="Only the runs of this study file; repeatable (all runs).")
    ] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Start to compare with (backbone only).")] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="AP, AP50, AP75, mask_AP and so on (AP,AP50,AP75).")
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Put the evaluated runs of a workspace side by side, with the paper's numbers where there are any."""
    from aligndet_cli.tools.report.collect import METRICS, check_baseline, collect_report
    from aligndet_cli.tools.report.table import FORMATS, render
    from aligndet_cli.tools.study.command import evaluations_of

    with user_errors(is_json):
        if is_html and form is not None:
            raise ConfigError("--html and --format exclude each other")
        form = form or ("json" if is_json else "table")
        if form not in FORMATS:
            raise ConfigError(f"--format {form}: is not a choice{did_you_mean(form, list(FORMATS))}")
        if is_json and form != "json" and output is None:
            raise ConfigError(f"--json and --format {form} exclude each other without --output")
        if output is not None:
            check_output_file(output)
        place = Workspace.locate(workspace)
        metrics = METRICS if metric is None else [part.strip() for part in metric.split(",")]
        names = evaluations_of(map(Path, study), place) if study else None
        found = collect_report(place, baseline=baseline, metrics=metrics, names=names)
        check_baseline(found, baseline)
        if is_html:
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


def figures(
    workspace: WorkspaceOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Evaluated run (the newest that is pre-trained).")] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="Evaluated run without pre-training (the newest).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder (figures, in the workspace).", show_default=False)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Draw the paper's figures of one's own runs: embeddings, box centres, losses and detections, with and without."""
    from aligndet_cli.tools.figures.command import write_figures

    with user_errors(is_json):
        drawn = write_figures(Workspace.locate(workspace), run, compare, output)
        if is_json:
            print_json({"command": "figures", **drawn.to_json()})
        else:
            typer.echo("\n".join(map(str, drawn.files)))


PREDICT = (
    RUN,
    setting("--weights", "weights"),
    setting("--score", "score"),
    *SIZES,
    setting("--output -o", "output"),
    setting("--annotated/--no-annotated", "annotated"),
    setting("--save-crops", "save_crops"),
    flags.WORKSPACE,
    flags.FORCE,
    flags.JSON,
    flags.PROGRESS,
    flags.QUIET,
    flags.ACCELERATOR,
    flags.WORKERS,
    flags.PRECISION,
)


@with_flags(PREDICT, "predict", ("IMAGES", "Image files, folders, or patterns such as 'photos/*.jpg'."), list[str])
def predict(images: list[str] | None, given: Given) -> None:
    """Detect in any images with a fine-tuned run, and draw what was found."""
    from aligndet_cli.tools.predict.command import PredictConfig, predict_files

    control = given.control
    with user_errors(control.json, control.verbosity):
        if not images:
            raise ConfigError("which images? name them: `aligndet predict IMAGES...`")
        config, _ = load_config(PredictConfig, "predict", Sources(flags=given.settings))
        shown = Shown(terminal.progress_mode(control.progress, is_quiet=control.quiet), control.verbosity)
        place = Workspace.locate(control.workspace)
        terminal.answer("predict", predict_files(images, config, place, force=control.force, shown=shown), control.json)
