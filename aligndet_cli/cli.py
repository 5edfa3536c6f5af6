"""The command line: thin commands around `driver.execute`, and the helpers beside them. Imports no torch."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aligndet_cli import __version__
from aligndet_cli.config import STAGES, Sources, StageConfig, assign, did_you_mean, flatten, load_config
from aligndet_cli.driver import Outcome, Request, execute, stage_config_class, with_data
from aligndet_cli.errors import AlignDetError, ConfigError, GateError, Preempted, as_user_error
from aligndet_cli.flags import BENCH, DOCTOR, IMPORT, PREDICT, SPLIT, STAGE_FLAGS, VIEWS, Given, with_flags
from aligndet_cli.training.launch import Shown
from aligndet_cli.training.logs import logger, setup_logging
from aligndet_cli.training.signals import Stopped, ignore_stopping, stop_at_once
from aligndet_cli.workspace import Workspace, write_bytes

SCHEMA_VERSION = 1

app = typer.Typer(
    name="aligndet",
    help="Pre-train an object detector on images nobody has labelled, then fine-tune and evaluate it.\n\n"
    "aligndet proposals DATA, cluster, pretrain-box, finetune, evaluate: each finds what the one before left "
    "in the workspace. Before them, pretrain-image DATA makes the backbone where there is none to download.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
list_app = typer.Typer(help="List what can be chosen.", no_args_is_help=True)
config_app = typer.Typer(help="Look at settings.", no_args_is_help=True)
app.add_typer(list_app, name="ls")
app.add_typer(config_app, name="config")

WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", "-w", help="Folder of the artifacts.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """Entry point of the console script."""
    # Read when torch is loaded: on a busy machine, threads that spin while they wait cost up to four times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


@app.command("pretrain-image")
@with_flags(STAGE_FLAGS["pretrain-image"])
def pretrain_image(data: Path | None, given: Given) -> None:
    """Train a backbone on images, without labels or with one class per folder."""
    run_stage("pretrain-image", data, given)


@app.command("proposals")
@with_flags(STAGE_FLAGS["proposals"])
def proposals(data: Path | None, given: Given) -> None:
    """Find boxes of possible objects in unlabelled images."""
    target = given.control["export"]
    with user_errors(bool(given.control["json"])):
        if target is not None and target.is_dir():
            raise ConfigError(f"--export {target}: is a folder; name a file")
    outcome = run_stage("proposals", data, given)
    if target is not None and outcome.artifact is not None:
        from aligndet_cli.proposals.exchange import export_coco

        with user_errors(is_json=False):  # the result is out already
            export_coco(outcome.artifact.folder, target)
            logger.info(f"exported to {target}")


@app.command("cluster")
@with_flags(STAGE_FLAGS["cluster"])
def cluster(data: Path | None, given: Given) -> None:
    """Group the proposals into pseudo classes (needed by DETR only)."""
    run_stage("cluster", data, given)


@app.command("pretrain-box")
@with_flags(STAGE_FLAGS["pretrain-box"])
def pretrain_box(data: Path | None, given: Given) -> None:
    """Pre-train a detector's neck and head on the proposals."""
    run_stage("pretrain-box", data, given)


@app.command("finetune")
@with_flags(STAGE_FLAGS["finetune"])
def finetune(data: Path | None, given: Given) -> None:
    """Train the detector on labelled images."""
    run_stage("finetune", data, given)


@app.command("evaluate")
@with_flags(STAGE_FLAGS["evaluate"])
def evaluate(data: Path | None, given: Given) -> None:
    """Measure a fine-tuned detector."""
    run_stage("evaluate", data, given)


@app.command("demo")
def demo(
    workspace: WorkspaceOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the pictures and of all training.")] = 0,
    is_json: JsonOption = False,
) -> None:
    """Run all five stages on pictures drawn on the spot, with and without pre-training, in a few minutes."""
    from aligndet_cli.demo import run_demo

    setup_logging(0)
    with user_errors(is_json):
        report = run_demo(workspace or Path("demo"), seed=seed)
        if is_json:
            _print_json({"command": "demo", "status": "done", "result": report.to_json()})
        else:
            _console().print(report.table())
            for line in report.closing_lines():
                typer.echo(line)


@app.command("study")
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
    from aligndet_cli.report.table import render
    from aligndet_cli.study.command import run_study

    setup_logging(int(verbose))
    with user_errors(is_json):
        shown = Shown(_progress_mode({"progress": progress}), int(verbose))
        outcome = run_study(file, Workspace.locate(workspace), jobs=jobs, dry_run=dry_run, shown=shown)
        if is_json:
            _print_json({"command": "study", **outcome.to_json()})
        else:
            typer.echo(outcome.listing() if outcome.report is None else render(outcome.report, "table"))
        for state in outcome.failed:
            typer.echo(f"failed: {state.stage}/{state.name}: {state.message}", err=True)
        if outcome.failure is not None:
            _fail(str(outcome.failure), outcome.failure.exit_code, is_json=False)  # the result is out already


@app.command("report")
def report(
    workspace: WorkspaceOption = None,
    form: Annotated[str, typer.Option("--format", help="table | markdown | csv | json.")] = "table",
    is_page: Annotated[
        bool, typer.Option("--html", help="One page of tables, commands and pictures (report.html in the workspace).")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default=False)] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Start to compare with (backbone only).", show_default=False)
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="AP, AP50, AP75, mask_AP and so on.")] = "AP,AP50,AP75",
    study: Annotated[
        list[Path] | None, typer.Option("--study", help="Only the runs of this file (repeatable).", show_default=False)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Put the evaluated runs of a workspace side by side, with the paper's numbers where there are any."""
    from aligndet_cli.report.collect import check_baseline, collect_report
    from aligndet_cli.report.table import check_format, render

    setup_logging(0)
    with user_errors(is_json):
        check_format(form)
        metrics = tuple(part.strip() for part in metric.split(","))
        place, names = Workspace.locate(workspace), None
        if study:
            from aligndet_cli.study.command import evaluations_of

            names = evaluations_of(study, place)
        found = collect_report(place, baseline=baseline, metrics=metrics, names=names)
        check_baseline(found, baseline)
        if is_page:
            from aligndet_cli.report.html import write_page

            written = write_page(place, output, baseline=baseline, metrics=metrics, names=names)
            output, text = None, _json_text({"command": "report", "file": str(written)}) if is_json else str(written)
        elif is_json or form == "json":
            text = _json_text({"command": "report", **found.to_json()})
        else:
            text = render(found, form)
        if output is None:
            typer.echo(text)
        else:
            write_bytes(output, f"{text}\n".encode())
            logger.info(f"written to {output}")


@app.command("toy")
def toy(
    folder: Annotated[Path, typer.Argument(help="Folder to draw into.")],
    num_train: Annotated[int, typer.Option("--train", min=1, help="Pictures to train on.")] = 480,
    num_val: Annotated[int, typer.Option("--val", min=1, help="Pictures to measure on.")] = 96,
    is_single: Annotated[bool, typer.Option("--objects", help="One object each, one folder per class.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the pictures.")] = 0,
) -> None:
    """Draw a small data set to try things on: many objects per picture with COCO labels, or single objects by class."""
    from aligndet_cli.data.toy import draw_toy_data, draw_toy_objects

    with user_errors(is_json=False):
        (draw_toy_objects if is_single else draw_toy_data)(folder, seed=seed, num_train=num_train, num_val=num_val)
        typer.echo(str(folder))


@app.command("import-weights")
@with_flags(IMPORT, ("FILE", "Checkpoint of another program."))
def import_weights(file: Path | None, given: Given) -> None:
    """Turn a released checkpoint into a run that finetune --init and evaluate take."""
    from aligndet_cli.conversion import importing

    is_json = bool(given.control["json"])
    setup_logging(0)
    with user_errors(is_json):
        if file is None:
            raise ConfigError("which checkpoint? name it: `aligndet import-weights FILE`")
        asked = {path: value for path, (_, value) in given.settings.items()}
        request = importing.ImportRequest(file, **asked, force=bool(given.control["force"]))
        outcome = importing.import_weights(request, Workspace.locate(given.control["workspace"]))
        _print_outcome("import-weights", outcome, is_json)


@app.command("predict")
@with_flags(PREDICT, ("IMAGES", "Image files, folders, or patterns such as 'photos/*.jpg'."), list[str])
def predict(images: list[str] | None, given: Given) -> None:
    """Detect in any images with a fine-tuned run, and draw what was found."""
    from aligndet_cli.predict.command import PredictConfig, predict_files

    control = given.control
    is_json, verbosity = bool(control["json"]), -1 if control["quiet"] else 0
    setup_logging(verbosity)
    with user_errors(is_json):
        if not images:
            raise ConfigError("which images? name them: `aligndet predict IMAGES...`")
        config, _ = load_config(PredictConfig, "predict", Sources(flags=given.settings))
        shown = Shown(_progress_mode(control), verbosity)
        place = Workspace.locate(control["workspace"])
        predicted = predict_files(images, config, place, force=bool(control["force"]), shown=shown)
        if is_json:
            _print_json({"command": "predict", **predicted.to_json()})
        else:
            typer.echo("\n".join(predicted.lines()))


@app.command("export")
def export(
    workspace: WorkspaceOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Fine-tuned run (the newest), or pretrain-box/RUN.")] = None,
    target: Annotated[str, typer.Option("--to", help="mmdet | torchvision | onnx.")] = "mmdet",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default=False)] = None,
    image_size: Annotated[str, typer.Option("--image-size", help="HEIGHTxWIDTH of the images, for onnx.")] = "800x1344",
    is_json: JsonOption = False,
) -> None:
    """Write a run's weights for another program."""
    from aligndet_cli.conversion.exporting import export_run

    setup_logging(0)
    with user_errors(is_json):
        exported = export_run(Workspace.locate(workspace), run, target, output, image_size=image_size)
        if is_json:
            _print_json({"command": "export", **exported.to_json()})
        else:
            typer.echo("\n".join(exported.lines()))


@app.command("status")
def status(workspace: WorkspaceOption = None, is_json: JsonOption = False) -> None:
    """Show what is in the workspace, what it was made from, and what is out of date."""
    from aligndet_cli.status import collect_status
    from aligndet_cli.tables import status_table

    with user_errors(is_json):
        place = Workspace.locate(workspace)
        rows = collect_status(place)
        if is_json:
            _print_json({"command": "status", "workspace": str(place.root), "runs": [row.to_json() for row in rows]})
        elif rows:
            _console().print(status_table(rows))
        else:
            typer.echo(f"{place.root}: empty; start with `aligndet proposals DATA`")


@app.command("doctor")
@with_flags(DOCTOR)
def doctor(data: Path | None, given: Given) -> None:
    """Check images and labels, and say what is wrong with them."""
    from aligndet_cli.data.doctor import check_data
    from aligndet_cli.tables import doctor_table

    is_json = bool(given.control["json"])
    setup_logging(0)
    with user_errors(is_json):
        config, _ = load_config(StageConfig, "doctor", Sources(flags=_with_data_root(data, given)))
        report = check_data(with_data(config, Workspace.locate(given.control["workspace"]), "doctor").data)
        if is_json:
            _print_json({"command": "doctor", **report.to_json()})
        else:
            _console().print(doctor_table(report))
            counts = ", ".join(f"{report.count(severity)} {severity}s" for severity in ("error", "warning"))
            typer.echo(f"{report.summary['format'] or 'unknown'} data at {report.summary['root']}: {counts}")
        if given.control["strict"] and report.count("error") + report.count("warning"):
            raise GateError("doctor --strict: there are findings, see above")


@app.command("split")
@with_flags(SPLIT)
def split(data: Path | None, given: Given) -> None:
    """Write the field's low-data folds as COCO files."""
    from aligndet_cli.data.folds import SplitConfig, write_folds

    setup_logging(0)
    with user_errors(bool(given.control["json"])):
        config, _ = load_config(SplitConfig, "split", Sources(flags=_with_data_root(data, given)))
        written = write_folds(config)
        if given.control["json"]:
            _print_json({"command": "split", "files": [fold.to_json() for fold in written]})
        else:
            typer.echo("\n".join(str(fold.file) for fold in written))


@app.command("bench")
@with_flags(BENCH)
def bench(data: Path | None, given: Given) -> None:
    """Measure how fast this machine trains a detector, and how long the paper's schedule would take on it."""
    from aligndet_cli.bench.measure import BenchConfig, bench_table, run_bench

    is_json = bool(given.control["json"])
    setup_logging(0)
    with user_errors(is_json):
        sources = Sources(None, tuple(given.control["set"] or ()), _with_data_root(data, given))
        config, _ = load_config(BenchConfig, "bench", sources)
        timings = run_bench(config)
        if is_json:
            stages = {timing.stage: timing.to_json() for timing in timings}
            _print_json({"command": "bench", "settings": config.to_json(), "stages": stages})
        else:
            _console().print(bench_table(timings))


@app.command("views")
@with_flags(VIEWS)
def views(data: Path | None, given: Given) -> None:
    """Draw the two views of a few images as pretrain-box will see them, to check boxes before training."""
    from aligndet_cli.pretrain_box.preview import write_views

    control = given.control
    setup_logging(0)
    with user_errors(bool(control["json"])):
        sources = Sources(control["config"], tuple(control["set"] or ()), _with_data_root(data, given))
        file = write_views(sources, Workspace.locate(control["workspace"]), control["output"], control["count"])
        if control["json"]:
            _print_json({"command": "views", "file": str(file)})
        else:
            typer.echo(str(file))


@app.command("figures")
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
    from aligndet_cli.figures.command import write_figures

    setup_logging(0)
    with user_errors(is_json):
        drawn = write_figures(Workspace.locate(workspace), run, compare, output)
        if is_json:
            _print_json({"command": "figures", **drawn.to_json()})
        else:
            typer.echo("\n".join(map(str, drawn.files)))


@list_app.command("detectors")
def list_detectors() -> None:
    """Detector families."""
    from aligndet_cli.detectors import BUILDERS

    typer.echo("\n".join(sorted(BUILDERS)))


@list_app.command("backbones")
def list_backbones() -> None:
    """Backbones and the torchvision weights there are for them."""
    from aligndet_cli.backbones import FAMILIES, torchvision_weights

    for name in FAMILIES:
        typer.echo(f"{name:<12} {', '.join(torchvision_weights(name)) or 'none, give a file'}")


@config_app.command("show")
def config_show(
    stage: Annotated[str, typer.Argument(help=" | ".join(STAGES))],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.", show_default=False)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="some.key=value", show_default=False)] = None,
    with_origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Print all settings of a stage, with what its recipe fills in, as TOML, ready for --config."""
    with user_errors(is_json):
        if stage not in STAGES:
            raise ConfigError(f"'{stage}' is not a stage{did_you_mean(stage, list(STAGES))}")
        resolved, origins = load_config(stage_config_class(stage), stage, Sources(config, tuple(set_ or ())))
        values, from_recipe = resolved.to_json(), resolved.from_recipe()
        for key, value in from_recipe.items():
            assign(values, key, value)
            origins.setdefault(key, "recipe")
        if is_json:
            _print_json({"command": "config show", "stage": stage, "config": values, "origins": origins})
            return
        typer.echo(f"[{stage}]")
        for key, value in flatten(values):
            origin = f"  # {origins.get(key, 'default')}" if with_origin else ""
            # TOML has no null: a setting that is not set is shown as a comment.
            line = f"# {key} is not set" if value is None else f"{key} = {json.dumps(value)}"
            typer.echo(line + origin)


def run_stage(stage: str, data: Path | None, given: Given) -> Outcome:
    """Execute a stage as asked, and print what came of it."""
    control = given.control
    is_json = bool(control["json"])
    verbosity = -1 if control["quiet"] else (1 if control["verbose"] else 0)
    setup_logging(verbosity)
    with user_errors(is_json):
        request = Request(
            stage=stage,
            workspace=Workspace.locate(control["workspace"]),
            sources=Sources(control["config"], tuple(control["set"] or ()), _with_data_root(data, given)),
            resume=control["resume"] is not False,
            force=bool(control["force"]),
            dry_run=bool(control["dry-run"]),
            shown=Shown(_progress_mode(control), verbosity),
        )
        outcome = execute(request)
        if outcome.is_main:
            _print_outcome(stage, outcome, is_json)
        if outcome.failed_gate is not None:
            raise outcome.failed_gate
    return outcome


def _with_data_root(data: Path | None, given: Given) -> dict[str, tuple[str, Any]]:
    return given.settings if data is None else {**given.settings, "data.root": ("DATA", data)}


@contextlib.contextmanager
def user_errors(is_json: bool) -> Iterator[None]:
    """Turn what a user can put right into one line and an exit code; let our own bugs through."""
    try:
        yield
    except AlignDetError as error:
        _fail(str(error), error.exit_code, is_json)
    except Stopped as stop:
        _fail(str(stop), Preempted.exit_code, is_json)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130, is_json)
    except OSError as error:
        known = as_user_error(error)
        if known is None:
            raise
        _fail(str(known), known.exit_code, is_json)


def _fail(message: str, exit_code: int, is_json: bool) -> None:
    if is_json and exit_code != GateError.exit_code:  # the result of a failed gate is already out
        _print_json({"status": "error", "exit_code": exit_code, "message": message})
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(exit_code)


def _progress_mode(control: dict[str, Any]) -> Any:
    mode = control["progress"] or ("none" if control["quiet"] else "auto")
    if mode not in ("auto", "bar", "plain", "none"):
        raise ConfigError(f"--progress {mode}: write auto, bar, plain or none")
    return mode


def _print_outcome(stage: str, outcome: Outcome, is_json: bool) -> None:
    result = outcome.artifact.result if outcome.artifact else {}
    if is_json:
        content: dict[str, Any] = {"command": stage, "status": outcome.status, "action": outcome.action}
        content |= {"folder": str(outcome.folder), "result": result}
        _print_json({**content, "effective": outcome.effective, **outcome.conclusion})
        return
    if outcome.status == "dry run":
        would_be = {"start": "would be written", "resume": "would be continued", "complete": "is already complete"}
        typer.echo(f"dry run: {outcome.folder} {would_be[outcome.action]}")
        return
    prefix = "" if outcome.status == "done" else f"{outcome.status}: "
    typer.echo(f"{prefix}{outcome.folder}")
    for key, value in flatten({**result, **outcome.conclusion}):
        if value is not None and not isinstance(value, list | dict):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            typer.echo(f"  {key.replace('_', ' '):<24} {shown}")


def _console() -> Console:
    """For tables: as wide as the terminal, and wide enough not to wrap where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(_json_text(content))


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **content})


if __name__ == "__main__":
    main()
