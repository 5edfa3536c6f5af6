"""`aligndet bench`: time real steps of the real stages on this machine."""

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.table import Table

from aligndet_cli.config import DataConfig
from aligndet_cli.data.findings import counted
from aligndet_cli.data.images import read_missing_sizes
from aligndet_cli.data.open import open_images
from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors import semantic_classes_of
from aligndet_cli.detectors.recipes import RCNN
from aligndet_cli.errors import ConfigError, DataError, RunError, as_user_error
from aligndet_cli.finetune.views import LabelledViews
from aligndet_cli.logs import logger
from aligndet_cli.pretrain_box.methods.aligndet import TwoViews
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.processes.ends import describe_end, starting_processes
from aligndet_cli.processes.launch import Shown, launch
from aligndet_cli.processes.signals import Stopped
from aligndet_cli.tables import plain_table
from aligndet_cli.tools.bench.clock import PARTS, StepClock
from aligndet_cli.tools.bench.images import write_coco
from aligndet_cli.tools.bench.need import Need, need_of
from aligndet_cli.tools.bench.plan import BenchConfig, BenchPlan, StageName, bench_batches
from aligndet_cli.training import loop
from aligndet_cli.training.fitting import memory_budget, try_fit
from aligndet_cli.training.footprint import gigabytes
from aligndet_cli.training.learner import build_learner, build_to_try
from aligndet_cli.training.recipe import REFERENCE_BATCH, Rates
from aligndet_cli.training.records import Speed, peak_memory
from aligndet_cli.training.schedules import LENGTHS
from aligndet_cli.training.trial import GAPS_IN_FINETUNING, GAPS_IN_PRETRAINING, Trial, worst_sizes

COCO_IMAGES = 118_287  # train2017
FINETUNE_SCHEDULE: Literal["90k"] = "90k"  # the paper's, table 2; DETR's recipe counts epochs
_EPOCH = 8  # batches of drawn images; one batch of an epoch has both orientations, in COCO one of thousands
_WARM_UP = 2
_STEPS = {"cpu": 3, "cuda": 60}  # on a GPU enough to use up what was decoded ahead


@dataclass(frozen=True)
class Timing:
    """Speed of a stage on this machine.

    Attributes:
        data_wait: share of a step spent waiting for data.
        memory_gb: peak memory of tensors on a GPU, or of the process on a CPU.
        parts_s: seconds of a step by part; empty if the model is compiled into one part.
        schedule: the paper's schedule in words.
        schedule_hours: hours that the paper's schedule takes at this speed.
    """

    stage: StageName
    images_per_s: float
    step_s: float
    data_wait: float
    memory_gb: float
    parts_s: dict[str, float]
    schedule: str
    schedule_hours: float


def run_bench(config: BenchConfig, flags: frozenset[str] = frozenset()) -> list[Timing]:
    """Time one or both stages on one device, each in a process of its own, so that their memory does not mix.

    Args:
        flags: flags of the command, for messages.

    Raises:
        AlignDetError: an error of the user.
    """
    if config.stage == "pretrain-box" and semantic_classes_of(config.detector):
        raise ConfigError(
            "detector.semantic_classes: pre-training has no classes of pixels; leave it out, or use --stage finetune"
        )
    stages: list[StageName] = ["pretrain-box", "finetune"] if config.stage == "both" else [config.stage]
    devices = Devices(kind=resolve_devices(config.runtime).kind)
    with tempfile.TemporaryDirectory(prefix="aligndet-bench-") as folder:
        data = config.data
        if data.root is None and data.annotations is None and data.images is None:
            write_coco(Path(folder) / "coco", _EPOCH * config.batch_size)
            data = DataConfig(root=Path(folder) / "coco")
        with_masks = config.detector.RECIPE.needs_masks and "finetune" in stages
        image_set = open_images(data, purpose="train", with_masks=with_masks)
        sizes_hw = read_missing_sizes(image_set.images_dir, image_set.file_names, image_set.sizes_hw)
        image_set = replace(image_set, sizes_hw=sizes_hw)
        if not image_set.has_labels and "finetune" in stages:
            raise DataError(f"{image_set.root}: no labels, so no fine-tuning: use --stage pretrain-box")
        plans = [BenchPlan(config, image_set, stage) for stage in stages]
        needs = [need_of(plan.build_views, plan.rates.optimizer) for plan in plans]
        for plan, need in zip(plans, needs, strict=True):
            logger.info(f"{plan.stage}: {need.describe(config.batch_size)}")
        if devices.kind == "cpu":
            _check_needs(plans, needs, memory_budget(devices))
            for plan in plans:
                _check_memory(plan, devices)
        context = multiprocessing.get_context("spawn")
        with (
            starting_processes("delete what is in /dev/shm"),
            ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool,
        ):
            try:
                return [_result_of(plan, pool.submit(_time_stage, plan, devices, flags)) for plan in plans]
            except (Stopped, KeyboardInterrupt):  # the pool would wait for its process
                for process in multiprocessing.active_children():
                    process.kill()
                raise


def _check_needs(plans: Sequence[BenchPlan], needs: Sequence[Need], budget: int | None) -> None:
    """Make sure that this machine has the memory that steps need at least, before anything is built."""
    if budget is None:
        return
    fitting = {plan.stage: need.most_images(budget) for plan, need in zip(plans, needs, strict=True)}
    alone = [f"--stage {stage} --batch-size {images}" for stage, images in fitting.items() if images]
    way_out = "take a smaller --backbone, or lower --short-side"
    if len(alone) == len(plans):
        way_out = f"use --batch-size {min(fitting.values())}"
    elif alone:
        way_out += f"; alone there is room for {alone[0]}"
    for plan, need in zip(plans, needs, strict=True):
        batch = plan.config.batch_size
        if need.of(batch) > budget:
            raise RunError(
                f"{plan.stage}: a step with {counted(batch, 'image')} of {need.largest} needs at least "
                f"{gigabytes(need.of(batch))} of memory and there are {gigabytes(budget)} for it: {way_out}"
            )


def _check_memory(plan: BenchPlan, devices: Devices) -> None:
    """Make sure that steps fit into the memory of this machine."""
    config, images = plan.config, plan.image_set
    largest = config.model_copy(update={"short_side": (max(plan.short_sides),)})
    is_pretraining = plan.stage == "pretrain-box"
    trial = Trial(
        build=partial(
            build_to_try, replace(plan, config=largest).build_views, plan.rates, plan.settings, config.runtime
        ),
        settings=plan.settings,
        sizes_hw=worst_sizes(largest.short_side or (), config.long_side),
        num_boxes=config.num_proposals if is_pretraining else int(np.diff(images.offsets).max()),
        num_classes=plan.num_classes,
        num_images=len(images),
        gaps=GAPS_IN_PRETRAINING if is_pretraining else GAPS_IN_FINETUNING,
        pools_regions=config.detector.family in RCNN,
        with_masks=config.detector.RECIPE.needs_masks and not is_pretraining,
        semantic_classes=plan.semantic_classes,
    )
    fit = try_fit(trial, devices, config.batch_size)
    if fit is not None and fit.footprint.of(config.batch_size) > fit.budget:
        raise RunError(f"{plan.stage}: {fit.problem(config.batch_size, 1, devices)}: {fit.advice(1)}")


def _result_of(plan: BenchPlan, running: "Future[Timing]") -> Timing:
    processes = multiprocessing.active_children()
    try:
        return running.result()
    except BrokenProcessPool:
        codes = [process.exitcode for process in processes if process.exitcode]
        reason = f"its process {describe_end(codes[0] if codes else None, 'lower --batch-size')}"
    except RuntimeError as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise RunError(f"{plan.stage}: {reason}")


def _time_stage(plan: BenchPlan, devices: Devices, flags: frozenset[str]) -> Timing:
    found: list[Timing] = []
    try:
        with loop.known_errors(flags):
            launch(lambda plan, process: found.append(_take_time(plan, process)), plan, devices, Shown(flags=flags))
    except Exception as error:
        known = as_user_error(error, flags)
        if known is None:
            raise
        raise known from None  # a torch.compile error cannot be sent to the other process
    return found[0]


def _take_time(plan: BenchPlan, process: Process) -> Timing:
    config, device = plan.config, torch.device(process.device)
    views = plan.build_views()
    learner = build_learner(views, plan.rates, plan.settings, config.runtime, process)
    num_steps = config.steps or _STEPS[device.type]
    batches = bench_batches(plan, 2 * num_steps + _WARM_UP, process)
    steps = BenchSteps(learner, batches, plan.settings, process)
    with contextlib.closing(batches):
        steps.take(_WARM_UP)
        # On a GPU the clock waits after every part, so the parts are timed in further steps.
        clock = None if device.type == "cuda" else clock_of(config, learner, views)
        seconds, waiting = steps.take(num_steps, clock)
        memory = peak_memory(device)
        if device.type == "cuda" and (clock := clock_of(config, learner, views)) is not None:
            steps.take(num_steps, clock)
    rate = num_steps * config.batch_size / seconds
    schedule, num_images = paper_schedule(plan.stage, plan.rates)
    return Timing(
        stage=plan.stage,
        images_per_s=rate,
        step_s=seconds / num_steps,
        data_wait=waiting / seconds,
        memory_gb=memory / 1e9,
        parts_s={} if clock is None else {part: value / num_steps for part, value in clock.seconds.items()},
        schedule=schedule,
        schedule_hours=num_images / rate / 3600,
    )


@dataclass
class BenchSteps:
    """Steps of the loop, without its files."""

    learner: loop.Learner
    batches: Iterator[list[Sample]]
    settings: loop.LoopSettings
    process: Process
    done: int = 0

    def take(self, count: int, clock: StepClock | None = None) -> tuple[float, float]:
        """Take `count` steps, and return their seconds, and the seconds spent waiting for data."""
        divergence = loop.watch_divergence(self.learner, self.process)
        speed = Speed()
        if clock is not None:
            clock.start()
        for step in range(self.done, self.done + count):
            samples = loop.next_batch(self.batches, speed)
            if clock is not None:
                clock.lap("data")
            loop.train_step(self.learner, samples, step, self.settings, divergence)
            self.learner.after_step(step)
            if clock is not None:
                clock.lap("optimizer")
        divergence.check()
        if clock is not None:
            clock.close()
        self.done += count
        if self.process.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - speed.began, speed.waiting


def clock_of(config: BenchConfig, learner: loop.Learner, views: TwoViews | LabelledViews) -> StepClock | None:
    """Return the clock of the parts of a step; None where they are compiled: hooks would be compiled with them."""
    if config.runtime.compile:
        return None
    if isinstance(views, TwoViews):
        return StepClock(views.pretext, views.pretext.online.backbone, learner.optimizer)
    return StepClock(views.model, views.model.backbone, learner.optimizer)


def paper_schedule(stage: StageName, rates: Rates) -> tuple[str, int]:
    """Return the paper's schedule of a stage in words, and its number of images."""
    length = LENGTHS[rates.schedule if stage == "pretrain-box" or rates.schedule == "50e" else FINETUNE_SCHEDULE]
    if length.epochs is not None:
        return f"{length.epochs} epochs of COCO", length.epochs * COCO_IMAGES
    steps = length.steps or 0
    return f"{steps:,} steps of {REFERENCE_BATCH} images", steps * REFERENCE_BATCH


def bench_table(timings: list[Timing]) -> Table:
    """Return a column per stage: speed, memory, the time of the paper's schedule, and the parts of a step."""
    table = plain_table("", *(timing.stage for timing in timings))
    rows = {
        "images/s": [f"{t.images_per_s:.3g}" for t in timings],
        "step": [_seconds(t.step_s) for t in timings],
        "peak memory": [f"{t.memory_gb:.2f} GB" for t in timings],
        "waiting for data": [f"{t.data_wait:.0%}" for t in timings],
        **{f"  {part}": [_share(t, part) for t in timings] for part in PARTS if any(t.parts_s for t in timings)},
        "the paper's schedule": [t.schedule for t in timings],
        "takes, on one device": [hours_or_days(t.schedule_hours) for t in timings],
    }
    for title, cells in rows.items():
        table.add_row(title, *cells)
    return table


def _share(timing: Timing, part: str) -> str:
    seconds = timing.parts_s[part]
    return f"{_seconds(seconds)}  {seconds / sum(timing.parts_s.values()):.0%}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def hours_or_days(hours: float) -> str:
    """Return a long time in words."""
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
