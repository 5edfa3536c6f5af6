"""`aligndet proposals`: images -> boxes of possible objects, by selective search, from labels or from a file."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError
from pydantic import Field

from aligndet_cli.config import StageConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError, DataError, RunError
from aligndet_cli.proposals.chunks import (
    Chunk,
    Job,
    Recipe,
    Skipped,
    end_with_parent,
    load_chunk,
    process_chunk,
    save_chunk,
)
from aligndet_cli.proposals.exchange import GivenBoxes, boxes_from_coco, boxes_from_labels, hash_file
from aligndet_cli.proposals.filters import FilterRules
from aligndet_cli.proposals.pictures import draw_histograms, draw_sheet
from aligndet_cli.proposals.report import build_report
from aligndet_cli.proposals.selective_search import SearchMode
from aligndet_cli.proposals.store import STORE_FILES, ImageProposals, ProposalStore, write_store
from aligndet_cli.training.launch import Process
from aligndet_cli.training.logs import Progress, ProgressMode, logger
from aligndet_cli.training.signals import stop_on_signal
from aligndet_cli.workspace import Output, Workspace, write_bytes, write_json

# Settings that only selective search reads.
_SEARCH_SETTINGS = ("mode", "working_size", "min_size", "max_ratio", "max_size", "nms")


class ProposalsConfig(StageConfig):
    """Settings of the stage `proposals`."""

    # The bytes of the imported file are hashed as an input; the other two do not change what is found.
    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"import_file", "on_error", "chunk_images"}

    source: Literal["selective-search", "ground-truth"] = "selective-search"
    import_file: Path | None = None
    mode: SearchMode = "opencv-fast"
    # Square root of the pixels searched. Ours: on 48 minicoco photos 320 px wide (280) keep 82 % recall at IoU 0.5
    # for 0.31 CPU-seconds; 400 px give 84 % for 0.56, 256 px 80 % for 0.19, full resolution 86 % for 1.6.
    working_size: int = Field(280, ge=32)
    min_size: int = Field(32, ge=0)  # paper D.1, SoCo: width and height in pixels
    max_ratio: float = Field(3.0, ge=1)  # paper D.1, `ratio3`
    max_size: float = Field(0.8, gt=0, le=1)  # paper D.1, `size0008`: of the image's square root of area
    nms: float = Field(0.5, ge=0, le=1)  # paper D.1, `@0.5`
    max_per_image: int | None = Field(None, ge=1)
    on_error: Literal["skip", "fail"] = "skip"
    chunk_images: int = Field(8, ge=1)  # what a crash loses per worker: about three seconds of work


@dataclass(frozen=True)
class Plan:
    """What `prepare` resolved. `given` holds the boxes to take over, None where they are searched for."""

    config: ProposalsConfig
    output: Output
    image_set: ImageSet
    given: GivenBoxes | None
    num_workers: int


def prepare(config: ProposalsConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Open the data and decide what to do; nothing is written.

    Raises:
        ConfigError: settings that cannot take effect together, or a finished run with other settings.
        DataError: data, labels or the imported file cannot be used.
    """
    _check_settings(config)
    image_set = open_images(config.data, purpose="train")
    inputs = {"data": image_set.fingerprint}
    if config.import_file is not None:
        inputs["import"] = hash_file(config.import_file)
    name = config.name or _run_name(image_set.split)
    output = workspace.plan_output("proposals", name, config, inputs, resume=resume, force=force)
    given = None
    if output.action == "complete":
        _check_complete(config, output)
    elif config.import_file is not None:
        given = boxes_from_coco(config.import_file, image_set)
    elif config.source == "ground-truth":
        given = boxes_from_labels(image_set)
    workers = config.runtime.num_workers
    num_workers = joblib.cpu_count() if workers == "auto" else max(1, workers)
    return Plan(config, output, image_set, given, num_workers)


def describe(plan: Plan) -> dict[str, Any]:
    """Effective settings by name, for people."""
    config, image_set = plan.config, plan.image_set
    is_auto = config.runtime.num_workers == "auto"
    shown: dict[str, Any] = {
        "data": f"{image_set.root} ({image_set.format}, split {image_set.split}, {len(image_set)} images)",
        "source": f"import of {config.import_file}" if config.import_file else config.source,
    }
    if plan.config.import_file is None and config.source == "selective-search":
        shown |= {name: getattr(config, name) for name in _SEARCH_SETTINGS}
    return shown | {
        "max_per_image": config.max_per_image or "no limit",
        "on_error": config.on_error,
        "workers": f"{plan.num_workers} (all cores)" if is_auto else plan.num_workers,
        "output": str(plan.output.folder),
    }


def run(plan: Plan, process: Process) -> None:
    """Compute what is missing, then write the store, the report and the pictures.

    Raises:
        DataError: no image is readable, or one is not and `on_error` is `fail`.
        Preempted: stopped by a signal, with all finished chunks saved.
    """
    if not process.is_main:
        return
    plan.output.begin(plan.config)
    _compute_chunks(plan, process.progress)
    skipped = _write_store(plan)
    result = _write_report(plan, skipped)
    plan.output.complete(result, content=STORE_FILES)


def _check_settings(config: ProposalsConfig) -> None:
    if config.import_file is not None and config.source != "selective-search":
        raise ConfigError("--import and --source ground-truth exclude each other: leave one out")
    if config.import_file is None and config.source == "selective-search":
        return
    idle = sorted(config.model_fields_set.intersection(_SEARCH_SETTINGS))
    if idle:
        reason = "--import" if config.import_file is not None else "--source ground-truth"
        raise ConfigError(f"{', '.join(idle)}: no effect with {reason}, which takes boxes as they are: leave it out")


def _check_complete(config: ProposalsConfig, output: Output) -> None:
    """A finished run that skipped images does not fulfil `--on-error fail`."""
    if config.on_error == "fail" and (output.folder / "skipped.jsonl").stat().st_size:
        raise DataError(
            f"{output.folder / 'skipped.jsonl'}: lists images that the finished run skipped; "
            "repair them and use --force, or leave out --on-error fail"
        )


def _run_name(split: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", split).strip("-._") or "images"


def _ranges(plan: Plan) -> list[tuple[int, int]]:
    """First and behind-the-last image of each chunk."""
    num_images, step = len(plan.image_set), plan.config.chunk_images
    return [(start, min(start + step, num_images)) for start in range(0, num_images, step)]


def _chunk_file(plan: Plan, start: int, stop: int) -> Path:
    return plan.output.partial / "resume" / f"{start:08d}-{stop:08d}.npz"


def _is_done(plan: Plan, start: int, stop: int) -> bool:
    file = _chunk_file(plan, start, stop)
    # An earlier try may have skipped what must not be skipped now.
    return file.exists() and not (plan.config.on_error == "fail" and load_chunk(file).skipped)


def _compute_chunks(plan: Plan, progress_mode: ProgressMode) -> None:
    """Save one file per chunk that is not there yet, in whatever order they end."""
    num_images = len(plan.image_set)
    (plan.output.partial / "resume").mkdir(exist_ok=True)
    missing = [(start, stop) for start, stop in _ranges(plan) if not _is_done(plan, start, stop)]
    num_done = num_images - sum(stop - start for start, stop in missing)
    num_skipped = 0
    with (
        stop_on_signal() as stop_signal,
        Progress("proposals", num_images, "images", start=num_done, mode=progress_mode) as progress,
        _closing_quietly(_work(plan, missing)) as finished,
    ):
        try:
            for start, stop, chunk in finished:
                _refuse_skipped(plan, chunk)
                save_chunk(_chunk_file(plan, start, stop), chunk)
                num_skipped += len(chunk.skipped)
                progress.advance(stop - start, skipped=num_skipped)
                stop_signal.raise_if_requested()
        except TerminatedWorkerError:
            stop_signal.raise_if_requested()  # Slurm and `timeout` signal the workers as well
            raise RunError(
                "a worker process was killed, most likely for lack of memory: try a smaller --num-workers; "
                "finished chunks are saved and the same command continues"
            ) from None


def _refuse_skipped(plan: Plan, chunk: Chunk) -> None:
    if chunk.skipped and plan.config.on_error == "fail":
        first = chunk.skipped[0]
        raise DataError(f"{plan.image_set.images_dir / first.file}: {first.reason} (--on-error skip leaves it out)")


Results = Generator[tuple[int, int, Chunk], None, None]


def _work(plan: Plan, missing: list[tuple[int, int]]) -> Results:
    """Yield `(start, stop, chunk)` for ranges of images as the workers finish them."""
    num_jobs = max(1, min(plan.num_workers, len(missing)))
    parallel = joblib.Parallel(n_jobs=num_jobs, return_as="generator_unordered", batch_size=1)
    recipe, pid = _recipe(plan.config), os.getpid()
    tasks = (joblib.delayed(_do_range)(start, stop, _jobs(plan, start, stop), recipe, pid) for start, stop in missing)
    results: Results = parallel(tasks)
    return results


@contextlib.contextmanager
def _closing_quietly(results: Results) -> Iterator[Results]:
    """End the workers when the loop is left early, without joblib's warning that their tasks are lost."""
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(cancelled|executed  but not used)", category=UserWarning)
            results.close()


def _do_range(start: int, stop: int, jobs: list[Job], recipe: Recipe, main_pid: int) -> tuple[int, int, Chunk]:
    end_with_parent(main_pid)
    return start, stop, process_chunk(jobs, recipe)


def _recipe(config: ProposalsConfig) -> Recipe:
    rules = FilterRules(config.min_size, config.max_ratio, config.max_size, config.nms, config.max_per_image)
    return Recipe(config.mode, config.working_size, rules)


def _jobs(plan: Plan, start: int, stop: int) -> list[Job]:
    jobs = []
    for index in range(start, stop):
        record = plan.image_set.record(index)
        boxes = plan.given.of(index) if plan.given is not None else None
        jobs.append(Job(record.image_id, record.path, record.file_name, record.size_hw, boxes))
    return jobs


def _write_store(plan: Plan) -> list[Skipped]:
    """Put the chunks together in the order of the data set.

    Raises:
        DataError: no image was readable.
    """
    skipped: list[Skipped] = []

    def all_images() -> Iterator[ImageProposals]:
        for start, stop in _ranges(plan):
            chunk = load_chunk(_chunk_file(plan, start, stop))
            skipped.extend(chunk.skipped)
            yield from chunk.images

    write_store(plan.output.partial, all_images())
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in skipped)
    write_bytes(plan.output.partial / "skipped.jsonl", lines.encode())
    if len(skipped) == len(plan.image_set):
        # Nothing worth resuming: once the images are repaired, the same command must look at them again. Without
        # its manifest the partial folder is started anew, not refused because the data has changed.
        (plan.output.partial / "manifest.json").unlink()
        reason = skipped[0].reason if skipped else "there are none"
        raise DataError(
            f"{plan.image_set.images_dir}: none of {len(skipped)} images could be used; the first: {reason}"
        )
    if skipped:
        logger.warning("%d images skipped, see %s", len(skipped), plan.output.folder / "skipped.jsonl")
    return skipped


def _write_report(plan: Plan, skipped: list[Skipped]) -> dict[str, Any]:
    """Write report and pictures; returns the summary for the manifest."""
    image_set, partial = plan.image_set, plan.output.partial
    store = ProposalStore.open(partial)
    report = build_report(store, image_set, len(skipped), plan.config.min_size)
    write_json(partial / "report.json", report)
    paths = [image_set.images_dir / name for name in image_set.file_names]
    draw_sheet(partial / "sheet.jpg", store, dict(zip(image_set.image_ids.tolist(), paths, strict=True)))
    draw_histograms(partial / "plots", store)
    result = {
        "images": len(store),
        "proposals": store.total,
        "proposals_per_image": round(store.total / len(store), 2),
        "images_without_proposals": report["images_without_proposals"],
        "skipped_images": len(skipped),
    }
    labels = report["labels"]
    if labels is not None and labels["all"]["objects"]:
        result["recall_at_iou_0.5"] = labels["all"]["recall_at_iou_0.5"]["all"]
        result["mean_best_overlap"] = labels["all"]["mean_best_overlap"]
    return result
