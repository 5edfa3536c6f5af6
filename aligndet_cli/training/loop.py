"""The one training loop, for `pretrain-image`, `pretrain-box` and `finetune` alike."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from aligndet_cli.config import Frozen
from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.errors import ConfigError, Preempted, RunError, as_user_error, memory_that_ran_out
from aligndet_cli.logs import Progress, logger
from aligndet_cli.processes.collectives import any_rank, mean_over_ranks, wait_for_all
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.memory import give_back_freed_memory, keep_few_primitives
from aligndet_cli.processes.signals import StopSignal, stop_on_signal
from aligndet_cli.training.checkpoint import load_checkpoint, save_checkpoint
from aligndet_cli.training.divergence import Divergence
from aligndet_cli.training.dump import StepDump
from aligndet_cli.training.loggers import LoggerName, Loggers
from aligndet_cli.training.placement import autocast
from aligndet_cli.training.records import Records, Speed
from aligndet_cli.training.schedules import Schedule

_MANY_PIXELS = 200_000  # steps with micro-batches of more pixels take seconds on a CPU


class CheckpointConfig(Frozen):
    """Steps and seconds between checkpoints; whichever is over first counts."""

    every_steps: int = Field(1000, ge=1, description="Steps between checkpoints, unless the time comes first.")
    every_seconds: float = Field(120.0, ge=0, description="Seconds between checkpoints.")


@dataclass(frozen=True)
class LoopSettings:
    """Resolved settings of one run.

    Attributes:
        base_lr: learning rate, to be multiplied by the schedule's factor.
        layer_decay: see `Rates`.
        clip_norm: largest gradient norm; None does not clip.
        batch_size: images per step, of all processes and micro-batches.
        accumulate: micro-batches per step.
        log_every: steps between lines of metrics.jsonl.
        spares_memory: return freed memory to the system at once, which takes time.
    """

    schedule: Schedule
    base_lr: float
    weight_decay: float
    seed: int
    precision: str = "32-true"
    layer_decay: float = 1.0
    clip_norm: float | None = None
    batch_size: int = 1
    accumulate: int = 1
    log_every: int = 10
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loggers: tuple[LoggerName, ...] = ()
    spares_memory: bool = False

    def is_logged(self, step: int) -> bool:
        """Return True if the numbers of a step (0-based) go into the log."""
        return (step + 1) % self.log_every == 0 or step + 1 == self.schedule.num_steps


@dataclass(frozen=True)
class Learner:
    """A model to train, and the calls that go with it.

    Attributes:
        model: called with the samples of a micro-batch and the step; returns `(losses, shown)`: scalars already
            weighted, which are summed and differentiated, and scalars that are only logged. May be wrapped (DDP).
        state: modules by name that go into the checkpoint.
        scaler: of the losses of float16 runs; without effect in other precisions.
        after_step: called after every optimizer step with its number; updates the pretext's momentum network.
        between: called after every step with the number of finished steps; may evaluate, and return numbers to log.
        is_over: called after `between`; True, on all processes alike, ends the run before the end of its schedule.
        largest_hw: height and width of the largest images, for messages.
    """

    model: Callable[[Sequence[Sample], int], tuple[dict[str, Tensor], dict[str, Tensor]]]
    optimizer: torch.optim.Optimizer
    state: Mapping[str, nn.Module]
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    after_step: Callable[[int], None] = lambda step: None
    between: Callable[[int], dict[str, float] | None] = lambda step: None
    is_over: Callable[[], bool] = lambda: False
    largest_hw: tuple[int, int] | None = None


def train(
    learner: Learner,
    batches_from: Callable[[int], Iterator[list[Sample]]],
    settings: LoopSettings,
    folder: Path,
    process: Process,
    loggers: Loggers | None = None,
) -> None:
    """Train from the last checkpoint in `folder/resume`, or from the start, to the end of the schedule.

    Writes `metrics.jsonl` (same seed, same lines, however often interrupted) and `speed.jsonl`. Random numbers in a
    step depend on seed, step and rank alone, so a resumed run repeats the uninterrupted one exactly.

    Args:
        batches_from: returns the batches of this rank from a step on.

    Raises:
        Preempted: a signal asked to stop, and a checkpoint was written.
        RunError: the loss is not finite, or memory ran out.
    """
    start = _restore(learner, folder)
    record = Records(folder, process, start, loggers)
    divergence = watch_divergence(learner, process, folder, settings.seed)
    total = settings.schedule.num_steps
    last_save, speed = time.monotonic(), Speed()
    progress = Progress("training", total, "steps", start=start, mode=process.progress, first="loss")
    with stop_on_signal() as stop, progress, known_errors(process.flags):
        batches = batches_from(start)
        for step, done in pairwise(range(start, total + 1)):
            with _saved_if_stopped(learner, folder, step, divergence, stop if step > start else None):
                samples = next_batch(batches, speed)
            record.skipped(samples)
            if step == start:
                _before_first(learner, len(samples), step, settings, process)
            losses, shown = train_step(learner, samples, step, settings, divergence)
            learner.after_step(step)
            process.callbacks.on_step(done, losses)
            told: dict[str, float | str] = {}
            if settings.is_logged(step):
                divergence.check()
                told, speed = record.metrics(done, losses, shown, learner.optimizer, speed), Speed()
            progress.advance(1, **told)
            record.between(done, learner.between(done))
            if learner.is_over():
                divergence.check()
                break
            if done < total and _save_is_due(done, last_save, settings, stop, process):
                divergence.check()
                _save(learner, folder, done, process)
                last_save = time.monotonic()
                if any_rank(stop.received is not None, process):
                    stop.received = stop.received or "SIGTERM on another rank"
                    stop.raise_if_requested()


def _before_first(learner: Learner, num_images: int, step: int, settings: LoopSettings, process: Process) -> None:
    """Set up memory for steps of this size, and announce the first one, which takes long on a CPU.

    oneDNN's many compiled operations are worth their memory only if steps take no longer than compiling them.
    """
    height, width = learner.largest_hw or (0, 0)
    if process.device == "cpu" and num_images // settings.accumulate * height * width >= _MANY_PIXELS:
        keep_few_primitives()
    if settings.spares_memory:
        give_back_freed_memory()
    if process.is_main:
        sizes = f" of up to {height}x{width}" if height else ""
        parts = f", in {settings.accumulate} parts" if settings.accumulate > 1 else ""
        ranks = f" on each of {process.world_size} processes" if process.world_size > 1 else ""
        logger.info(f"first step ({step + 1}): {num_images} images{sizes}{ranks}{parts}")


def watch_divergence(learner: Learner, process: Process, folder: Path | None = None, seed: int = 0) -> Divergence:
    """Build the watch that `train_step` reports to; on a GPU the loop checks it before it logs or saves.

    Args:
        folder: for the files about a bad step; None writes none.
        seed: of the run, for these files.
    """
    is_fused = all(group.get("fused") for group in learner.optimizer.param_groups)
    dump = None
    if folder is not None:
        dump = StepDump(folder, learner.state, learner.optimizer, learner.scaler, seed, process.world_size)
    return Divergence(process, folder, is_deferred=is_fused and process.device.startswith("cuda"), dump=dump)


def train_step(
    learner: Learner, samples: Sequence[Sample], step: int, settings: LoopSettings, divergence: Divergence
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take one optimizer step on the samples of this rank, without `after_step`.

    Returns:
        The losses (mean over micro-batches) with the gradient norm, and the numbers to show; all scalars.
    """
    process, scaler = divergence.process, learner.scaler
    divergence.begin_step()
    torch.manual_seed(mix_seed(settings.seed, step, process.rank))
    for group in learner.optimizer.param_groups:
        factor = 1.0 if group.get("constant_lr") else settings.schedule.lr_factor(step)
        group["lr"] = settings.base_lr * factor * group.get("lr_scale", 1.0)
    learner.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    shown: dict[str, Tensor] = {}
    micro_batches = split(samples, settings.accumulate)
    for number, micro in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        with _gradient_sync(learner.model, is_last):
            with autocast(torch.device(process.device), settings.precision):
                losses, shown = learner.model(micro, step)
            total = torch.stack(list(losses.values())).sum() / len(micro_batches)
            # Not under autocast: it would lower the gradients of what the model keeps in float32.
            scaler.scale(total).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach() / len(micro_batches)
    scaler.unscale_(learner.optimizer)
    gradients = [p.grad for group in learner.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm(gradients)
    is_finite = norm.isfinite()
    if scaler.is_enabled():  # it skips steps whose gradients overflow, so only the losses count
        is_finite = mean_over_ranks(torch.stack(list(sums.values())), process).isfinite().all()
    divergence.watch(learner.optimizer, is_finite, sums, samples, step)
    if settings.clip_norm is not None:
        parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
        clip_grads_with_norm_(parameters, settings.clip_norm, norm)
    scaler.step(learner.optimizer)
    scaler.update()
    return {**sums, "grad_norm": norm.detach()}, shown


def split(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """Return the micro-batches of a step."""
    size = -(-len(samples) // parts)
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def _gradient_sync(model: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context that averages gradients over processes only in the last micro-batch of a step."""
    return model.no_sync() if not is_last and hasattr(model, "no_sync") else contextlib.nullcontext()


def next_batch(batches: Iterator[list[Sample]], speed: Speed) -> list[Sample]:
    """Return the next batch, and add the wait for it and its images to `speed`."""
    began = time.perf_counter()
    samples = next(batches)
    speed.waiting += time.perf_counter() - began
    speed.images += len(samples)
    return samples


@contextlib.contextmanager
def _saved_if_stopped(
    learner: Learner, folder: Path, done: int, divergence: Divergence, stop: StopSignal | None
) -> Iterator[None]:
    """Save if a first signal interrupts the block, which waits for a batch after `done` steps.

    Only the main process does, alone: others may be in the middle of a step. `stop` is None if nothing is new.
    """
    try:
        yield
    except (Preempted, KeyboardInterrupt):
        if divergence.process.is_main and stop is not None and stop.num_seen == 1:
            divergence.check()
            _save_alone(learner, folder, done, divergence.process)
        raise


def _save_is_due(done: int, last_save: float, settings: LoopSettings, stop: StopSignal, process: Process) -> bool:
    """Return True on all ranks alike if it is time to save."""
    is_due = done % settings.checkpoint.every_steps == 0 or stop.received is not None
    is_due |= time.monotonic() - last_save >= settings.checkpoint.every_seconds
    return any_rank(is_due, process)


def _save(learner: Learner, folder: Path, done: int, process: Process) -> None:
    if process.is_main:
        _save_alone(learner, folder, done, process)
    wait_for_all(process)


def _save_alone(learner: Learner, folder: Path, done: int, process: Process) -> None:
    state = {name: module.state_dict() for name, module in learner.state.items()}
    state |= {"optimizer": learner.optimizer.state_dict(), "scaler": learner.scaler.state_dict()}
    process.callbacks.on_checkpoint(done, save_checkpoint(folder / "resume", done, state))


def _restore(learner: Learner, folder: Path) -> int:
    found = load_checkpoint(folder / "resume")
    if found is None:
        return 0
    step, state = found
    for name, module in learner.state.items():
        module.load_state_dict(state[name])
    groups = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    if groups != [len(group["params"]) for group in learner.optimizer.param_groups]:
        raise ConfigError(
            f"{folder}: was begun by an older aligndet, whose recipe had other rates or decays in this backbone: "
            "--no-resume begins again, --set training.layer_decay=1 with it has one rate in all layers"
        )
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    logger.info(f"continuing after step {step}")
    return step


def too_small_for_norms(error: ValueError, flags: Collection[str] = ()) -> RunError | None:
    """Return what to do, with those of the flags that help, if batch norm met a single value; None for other errors."""
    if "more than 1 value per channel" not in str(error):
        return None
    larger = [flag for flag in ("--batch-size", "--short-side", "--image-size") if flag in flags]
    group = ", or use --set detector.neck_norm=group" if {"--detector", "--set"} <= set(flags) else ""
    return RunError(
        "batch norm cannot train on a single image per process this small: raise "
        f"{' or '.join(larger) or 'the batch size'}{group}"
    )


@contextlib.contextmanager
def known_errors(flags: Collection[str]) -> Iterator[None]:
    """Turn errors that settings cause in the block into a RunError, which names those of the flags that help."""
    try:
        yield
    except ValueError as error:
        known = too_small_for_norms(error, flags)
        if known is None:
            raise
        raise known from error
    except (MemoryError, OSError, RuntimeError) as error:
        known = as_user_error(error, flags) if memory_that_ran_out(error) else None
        if known is None:
            raise
        raise known from error
