"""`aligndet proposals`: images -> boxes of possible objects, by selective search, from labels or from a file."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aligndet_cli.artifacts.exchange import GivenBoxes, boxes_from_coco, boxes_from_labels, export_coco, hash_file
from aligndet_cli.artifacts.proposals import STORE_FILES, ImageProposals, ProposalStore, write_store
from aligndet_cli.config import StageConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError, DataError, RunError
from aligndet_cli.files import write_bytes, write_json
from aligndet_cli.logs import Progress, ProgressMode, logger
from aligndet_cli.plotting import never_failing
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.sharing import locked_if_last, taking_part
from aligndet_cli.processes.signals import stop_on_signal
from aligndet_cli.proposals.backends import Backend, Workers, resolve_workers, results_of
from aligndet_cli.proposals.filters import FilterRules
from aligndet_cli.proposals.journal import Found, Journal, Records
from aligndet_cli.proposals.pictures import draw_histograms, draw_recall, draw_sheet
from aligndet_cli.proposals.report import build_report
from aligndet_cli.proposals.selective_search import SearchMode, warm_up
from aligndet_cli.proposals.share import Share, describe_missing
from aligndet_cli.proposals.work import Job, Recipe, find_boxes
from aligndet_cli.stage import Conclusion, Steps
from aligndet_cli.workspace import Output, Workspace

# Settings that only selective search reads.
_SEARCH_SETTINGS = ("mode", "working_size", "min_size", "max_ratio", "max_size", "nms")


class ProposalsConfig(StageConfig):
    """Settings of the stage `proposals`."""

    # The bytes of the imported file are hashed as an input; the others do not change what is found.
    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {
        "import_file",
        "on_error",
        "shard",
        "backend",
        "scheduler",
    }

    source: Literal["selective-search", "ground-truth"] = Field("selective-search", description="Source of the boxes.")
    import_file: Path | None = Field(None, description="COCO json to take boxes from, instead of searching (none).")
    export_file: Path | None = Field(None, exclude=True, description="COCO json to write the boxes to as well (none).")
    mode: SearchMode = Field("fast", description="Variant of selective search.")
    # Memory grows with its fourth power to 0.4 GB.
    working_size: int | None = Field(
        None, ge=32, le=1024, description="Square root of the number of pixels that are searched (by mode)."
    )
    # paper D.1, SoCo: width and height
    min_size: int = Field(32, ge=0, description="Smallest side of a box in pixels.")
    max_ratio: float = Field(3.0, ge=1, description="Largest ratio of a box's sides.")  # paper D.1, `ratio3`
    # paper D.1, `size0008`
    max_size: float = Field(
        0.8, gt=0, le=1, description="Largest size of a box as a share of the image's, in square roots of areas."
    )
    # paper D.1, `@0.5`
    nms: float = Field(0.5, ge=0, le=1, description="IoU above which the later of two boxes is dropped.")
    max_per_image: int | None = Field(None, ge=1, description="Best N boxes per image (all).")
    on_error: Literal["skip", "fail"] = Field("skip", description="Reaction to an image that cannot be read.")
    shard: str | None = Field(None, description="Share I/N of the images; the last of N puts all together (one share).")
    backend: Backend | Literal["auto"] = Field(
        "auto", description="Workers of the search; auto takes threads for up to four, else processes."
    )
    scheduler: str | None = Field(None, description="Address of the Dask scheduler or the Ray head (none).")


@dataclass(frozen=True)
class Plan:
    """What `prepare` resolved.

    Attributes:
        given: the boxes to take over; None where they are searched for.
        share: the images that this process does; all of them unless `output.is_shared`.
    """

    config: ProposalsConfig
    output: Output
    image_set: ImageSet
    given: GivenBoxes | None
    workers: Workers
    share: Share

    @property
    def num_images(self) -> int:
        """How many images this process is to do, finished ones included."""
        return len(self.share.of(np.arange(len(self.image_set))))


def prepare(config: ProposalsConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Open the data and decide what to do; nothing is written.

    Raises:
        ConfigError: settings that cannot take effect together, or a finished run with other settings.
        DataError: data, labels or the imported file cannot be used.
    """
    _check_settings(config)
    if config.shard is not None and not resume:
        raise ConfigError(
            "--no-resume: would throw away what other shards have done; "
            "leave it out, or use --force if data or settings have changed"
        )
    share = Share.parse(config.shard) if config.shard is not None else Share()
    workers = resolve_workers(config.backend, config.scheduler, config.runtime.num_workers)
    image_set = open_images(config.data, purpose="train", index_dir=workspace.index_dir)
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
    output = replace(output, is_shared=config.shard is not None)
    return Plan(config, output, image_set, given, workers, share)


def describe(plan: Plan) -> dict[str, Any]:
    """Effective settings by name, for people."""
    config, image_set = plan.config, plan.image_set
    shown: dict[str, Any] = {
        "data": f"{image_set.root} ({image_set.format}, split {image_set.split}, {len(image_set)} images)",
        "source": f"import of {config.import_file}" if config.import_file else config.source,
    }
    if plan.config.import_file is None and config.source == "selective-search":
        shown |= {name: getattr(config, name) for name in _SEARCH_SETTINGS}
    if plan.output.is_shared:
        shown["shard"] = f"{plan.share.index} of {plan.share.count} ({plan.num_images} images)"
    return shown | {
        "max_per_image": config.max_per_image or "no limit",
        "on_error": config.on_error,
        "workers": _describe_workers(plan),
        "output": str(plan.output.folder),
    }


def run(plan: Plan, process: Process) -> None:
    """Find the boxes that are missing, then write the store, the report and the pictures.

    One of several shards does its share only; the one that finds all shares done writes the rest.

    Raises:
        DataError: no image is readable, or one is not and `on_error` is `fail`.
        RunError: a worker was killed, or another process works on the same.
        Preempted: stopped by a signal, with all finished images saved.
    """
    if not process.is_main:
        return
    if not plan.output.is_shared:
        plan.output.begin(plan.config)
        _find_missing(plan, process.progress)
        _finish(plan, _records(plan))
        return
    # The config of the artifact does not say which of its shards came first.
    with taking_part(plan.output, plan.config.model_copy(update={"shard": None})):
        _find_missing(plan, process.progress)
        plan.share.mark_done(_resume_folder(plan))
    with locked_if_last(plan.output) as output:
        if output is not None and not (records := _records(plan)).missing().size:
            _finish(replace(plan, output=output), records)


def conclude(plan: Plan) -> Conclusion:
    """Export the finished boxes where that was asked for, or say which shards are missing."""
    if not (plan.output.is_shared and (plan.output.partial / "manifest.json").exists()):
        if plan.config.export_file is not None:
            export_coco(plan.output.folder, plan.config.export_file)
            logger.info(f"exported to {plan.config.export_file}")
        return Conclusion()
    missing = plan.share.missing_shares(_resume_folder(plan))
    num_done = plan.share.count - len(missing)
    return Conclusion({"shards_done": f"{num_done} of {plan.share.count}", "shards_missing": describe_missing(missing)})


def _check_settings(config: ProposalsConfig) -> None:
    if config.export_file is not None and config.export_file.is_dir():
        raise ConfigError(f"--export {config.export_file}: is a folder; name a file")
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


def _describe_workers(plan: Plan) -> str:
    workers = plan.workers
    if workers.scheduler is not None:
        return f"all of {workers.backend} at {workers.scheduler}"
    what = f"of {workers.backend}" if workers.backend in ("dask", "ray") else workers.backend
    origin = " (all cores)" if plan.config.runtime.num_workers == "auto" else ""
    return f"{workers.count} {what}{origin}"


def _resume_folder(plan: Plan) -> Path:
    return plan.output.partial / "resume"


def _records(plan: Plan) -> Records:
    return Records(_resume_folder(plan), len(plan.image_set))


def _find_missing(plan: Plan, progress_mode: ProgressMode) -> None:
    """Keep in the journal what comes of each image of the share that is not done yet, in whatever order they end."""
    folder = _resume_folder(plan)
    folder.mkdir(exist_ok=True)
    with Journal.open(plan.share.journal_in(folder)) as journal, stop_on_signal() as stop_signal:
        # An earlier try may have skipped what must not be skipped now.
        missing = plan.share.of(_records(plan).missing(skipped_too=plan.config.on_error == "fail"))
        num_done, num_skipped = plan.num_images - len(missing), 0
        if len(missing) and plan.given is None:
            warm_up(plan.config.mode)
        work = functools.partial(find_boxes, _recipe(plan.config))
        with (
            Progress("proposals", plan.num_images, "images", start=num_done, mode=progress_mode) as progress,
            results_of(work, _jobs(plan, missing), plan.workers) as results,
        ):
            try:
                for found in results:
                    if found.reason and plan.config.on_error == "fail":
                        raise _skipped_error(plan, found)
                    journal.append(found)
                    num_skipped += bool(found.reason)
                    progress.advance(skipped=num_skipped)
                    stop_signal.raise_if_requested()
            except RunError:  # workers died: Slurm and `timeout` signal them as well, perhaps before they could listen
                stop_signal.raise_if_requested()
                raise


def _skipped_error(plan: Plan, found: Found) -> DataError:
    path = plan.image_set.images_dir / plan.image_set.file_names[found.position]
    return DataError(f"{path}: {found.reason} (--on-error skip leaves it out)")


def _recipe(config: ProposalsConfig) -> Recipe:
    rules = FilterRules(config.min_size, config.max_ratio, config.max_size, config.nms, config.max_per_image)
    return Recipe(config.mode, config.working_size, rules)


def _jobs(plan: Plan, positions: NDArray[np.int64]) -> Iterator[Job]:
    for position in positions.tolist():
        record = plan.image_set.record(position)
        boxes = plan.given.of(position) if plan.given is not None else None
        yield Job(position, record.path, record.file_name, record.size_hw, boxes)


def _finish(plan: Plan, records: Records) -> None:
    """Make the artifact of what is in the journals."""
    digests, num_skipped = _write_store(plan, records)
    plan.output.complete(_write_report(plan, digests, num_skipped), content=STORE_FILES)


def _write_store(plan: Plan, records: Records) -> tuple[list[int], int]:
    """Put the images together in the order of the data set; returns the digests of their files, and how many were not.

    Raises:
        DataError: no image was readable.
    """
    skipped: list[dict[str, Any]] = []
    digests: list[int] = []
    image_set = plan.image_set

    def all_images() -> Iterator[ImageProposals]:
        for found in records.in_order():
            image_id, name = int(image_set.image_ids[found.position]), image_set.file_names[found.position]
            if not found.reason:
                digests.append(found.digest)
                yield ImageProposals(image_id, name, found.size_hw, found.boxes)
            elif plan.config.on_error == "fail":
                raise _skipped_error(plan, found)
            else:
                skipped.append({"image_id": image_id, "file": name, "reason": found.reason})

    write_store(plan.output.partial, all_images())
    lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
    write_bytes(plan.output.partial / "skipped.jsonl", lines.encode())
    if not digests:
        # Nothing worth resuming: once the images are repaired, the same command must look at them again. Without
        # its manifest the partial folder is started anew, not refused because the data has changed.
        (plan.output.partial / "manifest.json").unlink()
        reason = skipped[0]["reason"] if skipped else "there are none"
        raise DataError(f"{image_set.images_dir}: none of {len(skipped)} images could be used; the first: {reason}")
    if skipped:
        logger.warning("%d images skipped, see %s", len(skipped), plan.output.folder / "skipped.jsonl")
    return digests, len(skipped)


def _write_report(plan: Plan, digests: list[int], num_skipped: int) -> dict[str, Any]:
    """Write report and pictures; returns the summary for the manifest."""
    image_set, partial = plan.image_set, plan.output.partial
    store = ProposalStore.open(partial)
    report = build_report(store, image_set, plan.config.min_size, digests)
    write_json(partial / "report.json", {"skipped_images": num_skipped, **report})
    with never_failing(partial / "sheet.jpg"):
        draw_sheet(partial / "sheet.jpg", store, image_set)
    with never_failing(partial / "plots"):
        draw_histograms(partial / "plots", store)
    result = {
        "images": len(store),
        "proposals": store.total,
        "proposals_per_image": round(store.total / len(store), 2),
        "images_without_proposals": report["images_without_proposals"],
        "skipped_images": num_skipped,
    }
    labels = report["labels"]
    if labels is not None and labels["all"]["objects"]:
        with never_failing(partial / "plots" / "recall.png"):
            draw_recall(partial / "plots" / "recall.png", labels)
        result["recall_at_iou_0.5"] = labels["all"]["recall_at_iou_0.5"]["all"]
        result["mean_best_overlap"] = labels["all"]["mean_best_overlap"]["all"]
    return result


STEPS = Steps[ProposalsConfig, Plan](ProposalsConfig, prepare, describe, run, conclude, has_own_workers=True)
