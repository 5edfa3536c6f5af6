"""`aligndet proposals`: images -> boxes of possible objects, by selective search, from labels or from a file."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aligndet_cli.artifacts.exchange import GivenBoxes, boxes_from_coco, boxes_from_labels, export_coco, hash_file
from aligndet_cli.config import NO_WEIGHTS, WORKSPACE_WEIGHTS, FileOr, StageConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.data.splits import as_split_name
from aligndet_cli.errors import ConfigError, DataError, RunError
from aligndet_cli.logs import Progress, ProgressMode, logger
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.sharing import locked_if_last, taking_part
from aligndet_cli.processes.signals import interruptible, stop_on_signal
from aligndet_cli.proposals.artifact import skipped_error, write_artifact
from aligndet_cli.proposals.backends import Backend, Workers, choose_workers, results_of
from aligndet_cli.proposals.cue import CUE_INPUT, Cue, check_cue, plan_cue
from aligndet_cli.proposals.filters import FilterRules
from aligndet_cli.proposals.journal import ImageResult, Journal, Journals
from aligndet_cli.proposals.rounds import EarlierBoxes, Round, plan_round
from aligndet_cli.proposals.selective_search import SearchMode, warm_up
from aligndet_cli.proposals.share import Share, describe_missing
from aligndet_cli.proposals.work import Job, find_boxes
from aligndet_cli.stage import Conclusion, Steps
from aligndet_cli.workspace import Output, Workspace

# Settings that only selective search reads, and those that the boxes of a run have to pass, too.
_OF_SEARCH = ("mode", "working_size", "cue_backbone", "cue_weights")
_FILTERS = ("min_size", "max_ratio", "max_size", "nms")


class ProposalsConfig(StageConfig):
    """Settings of the stage `proposals`."""

    # The first four are inputs, hashed by content; the others do not change what is found.
    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {
        "import_file",
        "from_run",
        "merge",
        "cue_weights",
        "on_error",
        "shard",
        "backend",
        "scheduler",
        # nothing is drawn at random, and no GPU is used
        "seed",
        "runtime.precision",
        "runtime.deterministic",
    }

    source: Literal["selective-search", "ground-truth"] = Field("selective-search", description="Source of the boxes.")
    import_file: Path | None = Field(None, description="COCO json to take boxes from, instead of searching (none).")
    from_run: str | None = Field(None, description="Pre-trained run that finds the boxes, by name (none).")
    merge: str | None = Field(
        None, description="Proposals to merge with those of the run, by name, or none (those it was trained on)."
    )
    cue_backbone: str | None = Field(
        None, description="Backbone whose features have a say in the order of the search's boxes (none)."
    )
    cue_weights: Annotated[str, FileOr((*WORKSPACE_WEIGHTS, NO_WEIGHTS))] = Field(
        "auto", description="Its weights: torchvision name, file, workspace (made here), auto."
    )
    export_file: Path | None = Field(None, exclude=True, description="COCO json to write the boxes to as well (none).")
    mode: SearchMode = Field("fast", description="Variant of selective search.")
    # Memory grows with its fourth power to 0.4 GB.
    working_size: int | None = Field(None, ge=32, le=1024, description="Square root of the pixels searched (by mode).")
    # paper D.1, SoCo: width and height
    min_size: int = Field(32, ge=0, description="Smallest side of a box in pixels.")
    max_ratio: float = Field(3.0, ge=1, description="Largest ratio of a box's sides.")  # paper D.1, `ratio3`
    # paper D.1, `size0008`
    max_size: float = Field(0.8, gt=0, le=1, description="Largest box by the image, in square roots of their areas.")
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
    """Everything that `run` needs.

    Attributes:
        given: boxes to take over, or to merge with those of a run; None if there are none.
        round: the run that finds boxes; None without `from_run`.
        cue: the backbone that has a say in their order; None without `cue_backbone`.
        share: the images that this process does; all images unless `output.is_shared`.
    """

    config: ProposalsConfig
    output: Output
    image_set: ImageSet
    given: GivenBoxes | EarlierBoxes | None
    round: Round | None
    cue: Cue | None
    workers: Workers
    share: Share

    @property
    def num_images(self) -> int:
        """Number of images that this process does, including finished ones."""
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
    workers = choose_workers(config.backend, config.scheduler, config.runtime.num_workers)
    image_set = open_images(config.data, purpose="train", index_dir=workspace.index_dir)
    inputs = {"data": image_set.fingerprint}
    if config.import_file is not None:
        inputs["import"] = hash_file(config.import_file)
    name = config.name or _default_name(image_set.split, config)
    of_run = None
    if config.from_run is not None:
        of_run = plan_round(workspace, config.from_run, config.merge, image_set, name)
        inputs |= of_run.inputs()
    cue = None
    if config.cue_backbone is not None:
        cue = plan_cue(config.cue_backbone, config.cue_weights, workspace, offline=config.runtime.offline)
        inputs[CUE_INPUT] = cue.content_hash
    output = workspace.plan_output("proposals", name, config, inputs, resume=resume, force=force)
    given: GivenBoxes | EarlierBoxes | None = None
    if output.action == "complete":
        if config.on_error == "fail" and (output.folder / "skipped.jsonl").stat().st_size:
            raise DataError(
                f"{output.folder / 'skipped.jsonl'}: lists images that the finished run skipped; "
                "repair them and use --force, or leave out --on-error fail"
            )
    elif of_run is not None:
        given = of_run.boxes_for(image_set)
    else:
        given = _boxes_to_take(config, image_set)
    output = replace(output, is_shared=config.shard is not None)
    return Plan(config, output, image_set, given, of_run, cue, workers, share)


def _default_name(split: str, config: ProposalsConfig) -> str:
    """Return a name of the split, and of the run and the backbone that have a say in the boxes."""
    parts = [as_split_name(part or "").rstrip("-._") for part in (split, config.from_run, config.cue_backbone)]
    return "-".join([parts[0] or "images", *filter(None, parts[1:])])


def _boxes_to_take(config: ProposalsConfig, image_set: ImageSet) -> GivenBoxes | None:
    if config.import_file is not None:
        return boxes_from_coco(config.import_file, image_set)
    return boxes_from_labels(image_set) if config.source == "ground-truth" else None


def look_ahead(config: ProposalsConfig, workspace: Workspace, pending: Collection[str]) -> None:
    """See `Steps`."""
    _check_settings(config)
    choose_workers(config.backend, config.scheduler, config.runtime.num_workers)
    image_set = open_images(config.data, purpose="train", index_dir=workspace.index_dir)
    if config.from_run is not None and "from_run" not in pending:
        plan_round(workspace, config.from_run, config.merge, image_set, config.name or "")
    if config.import_file is not None:
        hash_file(config.import_file)
    _boxes_to_take(config, image_set)
    if config.cue_backbone is not None:
        check_cue(config.cue_backbone, config.cue_weights, workspace, offline=config.runtime.offline)


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings by name, for people."""
    config, image_set = plan.config, plan.image_set
    shown: dict[str, Any] = {
        "data": f"{image_set.root} ({image_set.format}, split {image_set.split}, {len(image_set)} images)",
        "source": _describe_source(plan),
    }
    if plan.round is not None:
        shown["resized to"] = "short side {}, long side {}".format(*plan.round.finder.resolution)
    used = () if _takes_boxes(config) else _FILTERS if plan.round is not None else (*_OF_SEARCH, *_FILTERS)
    shown |= {name: getattr(config, name) for name in used}
    shown.pop("cue_weights", None)
    if plan.cue is not None:
        shown["cue_backbone"] = f"{plan.cue.name}, weights {plan.cue.origin}"
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

    A shard does its share of the images; the shard that finds all shares done writes the artifact.

    Raises:
        DataError: no image is readable, or one is not and `on_error` is `fail`.
        RunError: a worker was killed, or another process works on the same share.
        Preempted: stopped by a signal; all finished images are saved.
    """
    if not process.is_main:
        return
    if not plan.output.is_shared:
        plan.output.begin(plan.config)
        _find_missing(plan, process.progress)
        _finish(plan, plan.output, _journals(plan))
        return
    # The saved config must not depend on which shard came first.
    with taking_part(plan.output, plan.config.model_copy(update={"shard": None})):
        _find_missing(plan, process.progress)
        plan.share.mark_done(_resume_folder(plan))
    with locked_if_last(plan.output) as output:
        if output is not None and not (journals := _journals(plan)).missing().size:
            _finish(plan, output, journals)


def conclude(plan: Plan) -> Conclusion:
    """Export the finished boxes where that was asked for, or say which shards are missing."""
    file = plan.config.export_file
    if not plan.output.lacks_shares:
        if file is not None:
            try:
                export_coco(plan.output.folder, file)
            except ConfigError as error:
                return Conclusion(error=error)
            logger.info(f"exported to {file}")
        return Conclusion()
    if file is not None:
        logger.info(f"--export {file}: the last shard writes it")
    missing = plan.share.missing_shares(_resume_folder(plan))
    num_done = plan.share.count - len(missing)
    return Conclusion({"shards_done": f"{num_done} of {plan.share.count}", "shards_missing": describe_missing(missing)})


def _check_settings(config: ProposalsConfig) -> None:
    if config.export_file is not None and config.export_file.is_dir():
        raise ConfigError(f"--export {config.export_file}: is a folder; name a file")
    sources = {
        "--import": config.import_file is not None,
        "--source ground-truth": config.source == "ground-truth",
        "--from-run": config.from_run is not None,
    }
    given = [flag for flag, is_given in sources.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: leave {'one' if len(given) == 2 else 'two'} out")
    if config.cue_weights != "auto" and config.cue_backbone is None:
        raise ConfigError("--backbone-weights: no effect without --backbone, whose features order boxes; leave it out")
    if config.merge is not None and config.from_run is None:
        raise ConfigError(f"--merge {config.merge}: no effect without --from-run, whose boxes are merged; leave it out")
    if not given:
        return
    reason = (
        f"{given[0]}, which takes boxes as they are" if _takes_boxes(config) else "--from-run, which does not search"
    )
    idle = sorted(config.model_fields_set.intersection((*_OF_SEARCH, *(_FILTERS if _takes_boxes(config) else ()))))
    if idle:
        raise ConfigError(f"{', '.join(idle)}: no effect with {reason}: leave it out")


def _takes_boxes(config: ProposalsConfig) -> bool:
    """Return True if boxes are taken as they are."""
    return config.import_file is not None or config.source == "ground-truth"


def _describe_source(plan: Plan) -> str:
    if plan.round is not None:
        earlier = plan.round.earlier
        merged = f"merged with proposals/{earlier.name}" if earlier is not None else "merged with none"
        return f"boxes of pretrain-box/{plan.round.finder.name}, {merged}"
    return f"import of {plan.config.import_file}" if plan.config.import_file else plan.config.source


def _describe_workers(plan: Plan) -> str:
    workers = plan.workers
    if workers.scheduler is not None:
        return f"all of {workers.backend} at {workers.scheduler}"
    what = f"of {workers.backend}" if workers.backend in ("dask", "ray") else workers.backend
    origin = " (all cores)" if plan.config.runtime.num_workers == "auto" else ""
    return f"{workers.count} {what}{origin}"


def _resume_folder(plan: Plan) -> Path:
    return plan.output.partial / "resume"


def _journals(plan: Plan) -> Journals:
    return Journals(_resume_folder(plan), len(plan.image_set), with_origins=plan.round is not None)


def _find_missing(plan: Plan, progress_mode: ProgressMode) -> None:
    """Find the boxes of all images of the share that are not done yet, and save each result in the journal."""
    config, folder = plan.config, _resume_folder(plan)
    folder.mkdir(exist_ok=True)
    own = Journal.open(plan.share.journal_in(folder), with_origins=plan.round is not None)
    with own as journal, _work_of(plan) as work, stop_on_signal() as stop_signal:
        # An earlier run may have skipped images that must not be skipped now.
        missing = plan.share.of(_journals(plan).missing(skipped_too=config.on_error == "fail"))
        num_done, num_skipped = plan.num_images - len(missing), 0
        if len(missing) and plan.given is None and plan.round is None:
            warm_up(config.mode)
        with (
            Progress("proposals", plan.num_images, "images", start=num_done, mode=progress_mode) as progress,
            results_of(work, _jobs(plan, missing), plan.workers) as results,
        ):
            try:
                for result in interruptible(results):
                    if result.reason and config.on_error == "fail":
                        raise skipped_error(plan.image_set, result)
                    journal.append(result)
                    num_skipped += bool(result.reason)
                    progress.advance(skipped=num_skipped)
                    stop_signal.raise_if_requested()
            except RunError:  # workers died, perhaps of the signal that Slurm or `timeout` sends to all processes
                stop_signal.raise_if_requested()
                raise


@contextlib.contextmanager
def _work_of(plan: Plan) -> Iterator[Callable[[Job], ImageResult]]:
    """Yield the function that finds the boxes of an image, for workers that end before the block does."""
    config = plan.config
    rules = FilterRules(config.min_size, config.max_ratio, config.max_size, config.nms, config.max_per_image)
    search = functools.partial(find_boxes, config.mode, config.working_size)
    if plan.round is None and plan.cue is None:
        yield functools.partial(search, rules)
        return
    from aligndet_cli.proposals.features import find_boxes_with_cue  # these need torch
    from aligndet_cli.proposals.learned import find_objects, one_thread

    with one_thread():
        if plan.round is not None:
            yield functools.partial(find_objects, plan.round.finder, rules)
        else:
            assert plan.cue is not None
            all_boxes = functools.partial(search, replace(rules, max_per_image=None))
            yield functools.partial(find_boxes_with_cue, all_boxes, plan.cue, config.max_per_image)


def _jobs(plan: Plan, positions: NDArray[np.int64]) -> Iterator[Job]:
    for position in positions.tolist():
        record = plan.image_set.record(position)
        boxes = plan.given.of(position) if plan.given is not None else None
        yield Job(position, record.path, record.file_name, record.size_hw, boxes)


def _finish(plan: Plan, output: Output, journals: Journals) -> None:
    config = plan.config
    write_artifact(output, journals, plan.image_set, min_size=config.min_size, on_error=config.on_error)


STEPS = Steps[ProposalsConfig, Plan](
    ProposalsConfig, prepare, describe, run, conclude, has_own_workers=True, look_ahead=look_ahead
)
