"""`aligndet evaluate`: a fine-tuned detector and labelled images -> metrics, predictions and pictures."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from aligndet_cli.artifacts.starts import Start, find_starts, measured_run, tell_apart
from aligndet_cli.config import StageConfig
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.data.loaders import evaluation_batches, resolve_workers
from aligndet_cli.detectors.checkpoint import WeightsName, load_detector, weights_file
from aligndet_cli.detectors.results import forward_pass, predict_each
from aligndet_cli.errors import ConfigError, GateError
from aligndet_cli.evaluate.analysis import TOUCH_IOU, analyse
from aligndet_cli.evaluate.compare import compare_runs
from aligndet_cli.evaluate.plots import draw_comparison, draw_plots
from aligndet_cli.evaluate.sheets import Drawing
from aligndet_cli.files import hash_files, read_json, write_bytes, write_json
from aligndet_cli.logs import Progress, logger
from aligndet_cli.metrics.coco import COCO_NUMBERS
from aligndet_cli.metrics.measure import Metric, choose_metric, headline, measure, open_measured, open_truths
from aligndet_cli.plotting import COLOURS, never_failing, save_figure
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.signals import stop_on_signal
from aligndet_cli.stage import Conclusion, Steps
from aligndet_cli.tables import percent
from aligndet_cli.training.curves import plot_comparison
from aligndet_cli.training.placement import place
from aligndet_cli.workspace import Artifact, Output, Workspace

# Images per chunk, the unit in which work is saved and given to processes: a crash loses at most a chunk, and a stop
# waits for its end (some 16 s on a CPU at full size).
CHUNK_IMAGES = 8


def _refuse_percent(limit: Any) -> Any:
    if isinstance(limit, int | float) and 1 < limit <= 100:
        raise ValueError(f"should be 0 to 1 (did you mean {limit / 100:g}?)")
    return limit


class EvaluateConfig(StageConfig):
    """Settings of `evaluate`."""

    # `run` and the split are inputs, hashed by content, and name the folder; two only read the result, and nothing is
    # drawn at random.
    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"run", "data.split", "compare", "fail_under", "seed"}

    run: str | None = Field(None, description="Fine-tuned run, by name (the newest).")
    weights: WeightsName = Field("last", description="Weights of the run, best by its evaluations while training.")
    # One is mmdetection's default for tests: an image's padding, and so its result to the last bit, depends on nothing
    # but itself.
    batch_size: int = Field(1, ge=1, description="Images per forward pass on each process.")
    short_side: int | None = Field(None, ge=32, description="Short side of resized images in pixels (the run's).")
    long_side: int | None = Field(None, ge=32, description="Largest long side in pixels (the run's).")
    # the COCO numbers are always there
    metric: Literal["auto", "coco", "voc"] = Field("auto", description="Metric; auto is voc for VOC data, else coco.")
    compare: str | None = Field(None, description="Another evaluated run, to print the difference from it (none).")
    fail_under: Annotated[float | None, BeforeValidator(_refuse_percent)] = Field(
        None, ge=0, le=1, description="Exit with 6 if AP, 0 to 1, is lower (no limit)."
    )
    plots: bool = Field(True, description="Draw the plots of the result.")


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs.

    Attributes:
        weights: file of the weights.
        categories: classes of the model, by class id.
        resolution: short and long side that images are resized to.
        has_masks: True if masks are measured too.
        other: finished evaluation of the same images, to compare with.
    """

    config: EvaluateConfig
    output: Output
    run: Artifact
    weights: Path
    image_set: ImageSet
    categories: tuple[Category, ...]
    resolution: tuple[int, int]
    metric: Metric
    has_masks: bool
    other: Artifact | None


def prepare(config: EvaluateConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Find the run and the images and check that they fit together.

    Raises:
        ConfigError: no such run, or the run to compare with was not evaluated on these images.
        DataError: images have no labels, or other classes than the run was trained on.
        WeightsError: the run's weights cannot be read.
    """
    _check_settings(config)
    run_artifact = workspace.require("finetune", config.run)
    weights = weights_file(run_artifact.folder, config.weights)
    loaded = load_detector(weights)
    image_set = open_measured(
        config.data,
        loaded.categories,
        run_artifact.name,
        has_masks=loaded.has_masks,
        index_dir=workspace.index_dir,
    )
    inputs = {"data": image_set.fingerprint, "weights": run_artifact.content_hash}
    if config.weights == "best":
        inputs["best weights"] = hash_files([weights])
    name = config.name or f"{run_artifact.name}{_suffix(config)}-{image_set.split}"
    output = workspace.plan_output("evaluate", name, config, inputs, resume=resume, force=force)
    return Plan(
        config=config,
        output=output,
        run=run_artifact,
        weights=weights,
        image_set=image_set,
        categories=tuple(loaded.categories),
        resolution=loaded.sides(config.short_side, config.long_side),
        metric=choose_metric(config.metric, image_set),
        has_masks=loaded.has_masks,
        other=_find_other(config, workspace, image_set, name) if config.compare is not None else None,
    )


def look_ahead(config: EvaluateConfig, workspace: Workspace, _pending: Collection[str]) -> None:
    """See `Steps`."""
    _check_settings(config)
    choose_metric(config.metric, open_truths(config.data, with_masks=False, index_dir=workspace.index_dir))


def _check_settings(config: EvaluateConfig) -> None:
    if config.runtime.compile:
        raise ConfigError("runtime.compile: evaluate passes over the images once and does not compile; leave it out")


def _suffix(config: EvaluateConfig) -> str:
    return "-best" if config.weights == "best" else ""


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings and where they come from, for people."""
    config, image_set = plan.config, plan.image_set
    own_resolution = "own setting" if config.short_side or config.long_side else f"from {plan.run.name}"
    return {
        "run": f"{plan.run.name} ({'--run' if config.run else 'newest finetune run'})",
        "weights": f"best, {plan.weights}" if config.weights == "best" else None,
        "data": f"{image_set.root} ({image_set.format}, {image_set.split}, {len(image_set)} images)",
        "classes": len(plan.categories),
        "resolution": f"{plan.resolution[0]} to {plan.resolution[1]} ({own_resolution})",
        "batch_size": config.batch_size,
        "metric": f"{plan.metric} ({'by the data' if config.metric == 'auto' else '--metric'})",
        "compare": plan.other.name if plan.other else None,
        "fail_under": config.fail_under,
        "output": str(plan.output.folder),
    }


def run(plan: Plan, process: Process) -> None:
    """Detect in all images, then measure and draw on the main process.

    Every finished chunk of images is a file under `resume/`: a killed run continues after the last one, and any number
    of processes gives the same bytes.
    """
    if process.is_main:
        plan.output.begin(plan.config)
        (plan.output.partial / "resume").mkdir(exist_ok=True)
    wait_for_all(process)
    _predict_missing(plan, process)
    wait_for_all(process)
    if process.is_main:
        _finish(plan)


def conclude(plan: Plan) -> Conclusion:
    """Compare a finished evaluation with another and apply `--fail-under`, each where it was asked for.

    Returns:
        `{"compare": ...}`, see `compare_runs`, and the gate that was not passed.
    """
    metrics = read_json(plan.output.folder / "metrics.json")
    result: dict[str, Any] = {}
    lines: tuple[str, ...] = ()
    if plan.other is not None:
        comparison = compare_runs(metrics, read_json(plan.other.folder / "metrics.json"))
        result["compare"] = {"with": plan.other.name, **comparison}
        lines = tuple(_comparison_lines(plan.output.folder.name, plan.other.name, comparison))
        if plan.config.plots:
            _draw_comparison(plan, plan.other)
    return Conclusion(result, lines, _failed_gate(plan, metrics))


def _failed_gate(plan: Plan, metrics: dict[str, Any]) -> GateError | None:
    name, value = headline(metrics, plan.metric)
    limit = plan.config.fail_under
    if limit is None or (value is not None and value >= limit):
        return None
    return GateError(f"{plan.output.folder.name}: {name} is {_from_0_to_1(value)}, below --fail-under {limit:g}")


def _find_other(config: EvaluateConfig, workspace: Workspace, image_set: ImageSet, own: str) -> Artifact:
    """Find the evaluation that `--compare` names, by its own name or by the name of its finetune run.

    Args:
        own: name of the evaluation that is to be compared with it.
    """
    asked = str(config.compare)
    for name in (asked, f"{asked}{_suffix(config)}-{image_set.split}"):
        if name == own:
            raise ConfigError(f"--compare {asked}: is the run itself; name another, or another with --run")
        found = workspace.find("evaluate", name)
        if found is not None:
            if found.manifest["inputs"].get("data") != image_set.fingerprint:
                raise ConfigError(f"--compare {asked}: {found.folder} was evaluated on other images or labels")
            return found
    if workspace.find("finetune", asked) is None:
        known = ", ".join(artifact.name for artifact in workspace.artifacts("finetune"))
        raise ConfigError(f"--compare {asked}: no run of that name; finetune runs here: {known}")
    best = " --weights best" if config.weights == "best" else ""
    raise ConfigError(
        f"--compare {asked}: not evaluated on {image_set.split}{' with its best weights' if best else ''} yet: "
        f"run `aligndet evaluate --run {asked} --split {image_set.split}{best}` first"
    )


def _predict_missing(plan: Plan, process: Process) -> None:
    """Write the missing chunks of this process; chunk i belongs to rank i modulo the world size."""
    own = list(_chunks(plan).items())[process.rank :: process.world_size]
    missing = [(file, images) for file, images in own if not file.exists()]
    if not missing:
        return
    # Chunks are whole batches, and only the last of all may be short, so a pass over the missing chunks makes the same
    # batches as an uninterrupted run.
    indices = [index for _, images in missing for index in images]
    loaded = load_detector(plan.weights)
    device = torch.device(process.device)
    model = loaded.model.eval()
    place(model, process)
    batches = evaluation_batches(
        plan.image_set,
        indices=indices,
        batch_size=plan.config.batch_size,
        resolution=plan.resolution,
        num_workers=resolve_workers(plan.config.runtime.num_workers, process),
        device=device,
    )
    num_images = sum(len(images) for _, images in own)
    unit = "images" if process.world_size == 1 else "images per process"
    progress = Progress("evaluate", num_images, unit, start=num_images - len(indices), mode=process.progress)
    finished: dict[int, list[dict[str, Any]]] = {}
    with stop_on_signal() as stop, progress, forward_pass(device, plan.config.runtime.precision):
        for index, found in predict_each(model, batches, plan.image_set, plan.categories):
            finished[index] = found
            progress.advance()
            file, images = missing[0]
            if len(finished) == len(images):
                write_bytes(file, json.dumps([entry for image in images for entry in finished[image]]).encode())
                finished = {}
                missing = missing[1:]
                stop.raise_if_requested()


def _chunks(plan: Plan) -> dict[Path, range]:
    """Return the images of each chunk by the file of its predictions."""
    batch_size, num_images = plan.config.batch_size, len(plan.image_set)
    starts = range(0, num_images, batch_size * max(CHUNK_IMAGES // batch_size, 1))
    folder = plan.output.partial / "resume"
    return {
        folder / f"predictions-{number:06d}.json": range(start, min(start + starts.step, num_images))
        for number, start in enumerate(starts)
    }


def _finish(plan: Plan) -> None:
    """Measure and draw what is in the saved chunks, so that the numbers follow from `predictions.json` alone."""
    partial = plan.output.partial
    predictions = [entry for file in _chunks(plan) for entry in read_json(file)]
    measured = measure(plan.image_set, predictions, metric=plan.metric, has_masks=plan.has_masks, loose_iou=TOUCH_IOU)
    ground_truth, evaluation = measured.ground_truth, measured.evaluation
    lines = ",\n".join(json.dumps(entry) for entry in predictions)
    write_bytes(partial / "predictions.json", f"[\n{lines}\n]\n".encode())
    write_json(partial / "ground_truth.json", ground_truth)
    metrics: dict[str, Any] = {**evaluation.metrics, "run": plan.run.name, "split": plan.image_set.split}
    if plan.config.weights != "last":
        metrics["weights"] = plan.config.weights
    metrics.update(measured.metrics)
    if plan.has_masks:
        logger.info(f"masks: AP {percent(metrics['segm']['AP'])}, AP50 {percent(metrics['segm']['AP50'])}")
        without = metrics["segm"]["counts"]["ground_truths_without_mask"]
        if without:
            logger.info(f"masks: {without} of {metrics['counts']['ground_truths']} boxes have none that can be drawn")
    write_json(partial / "metrics.json", metrics)
    analysis = analyse(evaluation, ground_truth, predictions)
    write_json(partial / "analysis.json", analysis)
    if plan.config.plots:
        title = f"{plan.run.name}{_suffix(plan.config)} on {plan.image_set.split}"
        draw_plots(partial / "plots", Drawing(evaluation, analysis, ground_truth, predictions, plan.image_set, title))
    _warn_if_nothing_found(metrics, plan.image_set)
    plan.output.complete(_result(metrics, plan.metric), content=["metrics.json", "predictions.json"])


def _draw_comparison(plan: Plan, other: Artifact) -> None:
    """Draw curves and errors of both evaluations on the same axes, and losses if both runs have a log."""
    file = plan.output.folder / "plots" / f"compare-{other.name}.png"
    with never_failing(file):
        workspace = Workspace(plan.run.folder.parents[1])
        starts, its_run = find_starts(workspace), measured_run(other, workspace.artifacts("finetune"))
        runs_of = {plan.output.folder: plan.run.name, other.folder: "" if its_run is None else its_run.name}
        unknown = Start("", "", "import", "", is_labelled=False, colour=COLOURS[0])  # its run has gone
        found = [replace(starts.get(run, unknown), run=folder.name) for folder, run in runs_of.items()]
        names = tell_apart(found)
        analyses = {name: read_json(folder / "analysis.json") for name, folder in zip(names, runs_of, strict=True)}
        title, colours = " against ".join(names), list(names.values())
        save_figure(draw_comparison(analyses, title, colours), file)
        runs = (plan.run.name, str(read_json(other.folder / "metrics.json")["run"]))
        logs = {name: plan.run.folder.with_name(run) / "metrics.jsonl" for name, run in zip(names, runs, strict=True)}
        if len(set(runs)) > 1 and all(log.exists() for log in logs.values()):  # imported runs have none
            training = file.with_name(f"compare-{other.name}-training.png")
            plot_comparison(logs, training, f"Fine-tuning, {title}", colours=colours)


def _from_0_to_1(value: float | None) -> str:
    """Format a number as gates and files have it."""
    return "not measurable" if value is None else f"{value:.4f}"


def _warn_if_nothing_found(metrics: dict[str, Any], image_set: ImageSet) -> None:
    counts = metrics["counts"]
    if metrics["AP"] is None:
        logger.warning("no number could be measured: none of the %d images has a labelled box", counts["images"])
    elif metrics["AP"] == 0:
        is_relative = "relative boxes" in image_set.problems
        cause = "the labelled boxes are all within one pixel;" if is_relative else "was the run trained long enough?"
        logger.warning(
            "AP is exactly 0 with %d predictions on %d images: %s predictions.json and plots/ show what it finds",
            counts["predictions"],
            counts["images"],
            cause,
        )


def _result(metrics: dict[str, Any], metric: Metric) -> dict[str, Any]:
    name, value = headline(metrics, metric)
    return {
        "metric": name,
        "value": value,
        **{key: metrics[key] for key in COCO_NUMBERS[:3]},
        **({f"mask_{key}": metrics["segm"][key] for key in COCO_NUMBERS[:3]} if "segm" in metrics else {}),
        **({key: metrics["voc"][key] for key in ("AP07", "AP12")} if metric == "voc" else {}),
        **metrics["counts"],
    }


def _comparison_lines(name: str, other: str, comparison: dict[str, Any]) -> Iterator[str]:
    yield f"{name} against {other}:"
    yield f"  {'':<24} {'this':>6} {'other':>6} {'difference':>11}"
    rows = [(name, comparison[name]) for name in COCO_NUMBERS]
    rows += [(f"VOC {name}", entry) for name, entry in comparison.get("voc", {}).items()]
    rows += [(f"mask {name}", entry) for name, entry in comparison.get("segm", {}).items()]
    for key, entry in rows:
        if entry["delta"] is not None:
            this, those, delta = percent(entry["this"]), percent(entry["other"]), percent(entry["delta"], "+")
            yield f"  {key:<24} {this:>6} {those:>6} {delta:>11}"


STEPS = Steps[EvaluateConfig, Plan](EvaluateConfig, prepare, describe, run, conclude, look_ahead=look_ahead)
