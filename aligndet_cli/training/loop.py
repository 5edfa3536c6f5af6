"""The one training loop, for `pretrain-box` and `finetune` alike."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from aligndet_cli.config import Frozen
from aligndet_cli.data.transforms import Sample, mix_seed
from aligndet_cli.errors import RunError
from aligndet_cli.training.checkpoint import load_checkpoint, save_checkpoint
from aligndet_cli.training.distributed import any_rank, mean_over_ranks, wait_for_all
from aligndet_cli.training.launch import Process
from aligndet_cli.training.logs import Progress, logger
from aligndet_cli.training.schedules import Schedule
from aligndet_cli.training.signals import StopSignal, stop_on_signal
from aligndet_cli.workspace import write_bytes

# How numbers are called where there is little room; those without a short name are in metrics.jsonl only.
_SHOWN = {
    "positive_similarity": "sim+",
    "negative_similarity": "sim-",
    "embedding_rank": "rank",
    "embedding_spread": "spread",
    "contrast_accuracy": "",
    "grad_norm": "",
}


class CheckpointConfig(Frozen):
    """How often progress is made safe."""

    every_steps: int = Field(1000, ge=1)
    every_seconds: float = Field(120.0, ge=0)


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one run of the loop.

    Attributes:
        base_lr: learning rate that the schedule's factor is applied to.
        weight_decay: of the optimizer.
        clip_norm: largest gradient norm, None does not clip.
        accumulate: micro-batches per step.
        log_every: steps between lines of metrics.jsonl.
    """

    schedule: Schedule
    base_lr: float
    weight_decay: float
    seed: int
    precision: str = "32-true"
    clip_norm: float | None = None
    accumulate: int = 1
    log_every: int = 10
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: Literal["none", "tensorboard"] = "none"

    def is_logged(self, step: int) -> bool:
        """Whether the numbers of a step (0-based) go into the log."""
        return (step + 1) % self.log_every == 0 or step + 1 == self.schedule.num_steps


@dataclass(frozen=True)
class Learner:
    """What the loop trains.

    Attributes:
        model: called with the samples of a micro-batch and the step; returns `(losses, shown)`: scalars already
            weighted, which are summed and differentiated, and scalars that are only logged. May be wrapped (DDP).
        state: modules by name that go into the checkpoint.
        after_step: called after every optimizer step with its number; the pretext's momentum update lives here.
        between: called after every step with the number of finished steps, for what happens now and then
            (evaluation); returns scalars to log, or nothing.
    """

    model: Callable[[Sequence[Sample], int], tuple[dict[str, Tensor], dict[str, Tensor]]]
    optimizer: torch.optim.Optimizer
    state: Mapping[str, nn.Module]
    after_step: Callable[[int], None] = lambda step: None
    between: Callable[[int], dict[str, float] | None] = lambda step: None


@dataclass
class _Speed:
    """Seconds since the last line, and how many of them went into waiting for data."""

    began: float = field(default_factory=time.perf_counter)
    waiting: float = 0.0
    images: int = 0


def train(
    learner: Learner,
    batches_from: Callable[[int], Iterator[list[Sample]]],
    settings: LoopSettings,
    folder: Path,
    process: Process,
) -> None:
    """Train from the last checkpoint in `folder/resume`, or from the start, to the end of the schedule.

    Writes `metrics.jsonl` (what was learned: the same for the same seed, however often interrupted) and
    `speed.jsonl` (how fast: never the same). Random numbers in a step depend on the seed, the step and the rank
    alone, so a resumed run repeats the uninterrupted one exactly.

    Args:
        batches_from: the batches of this rank from a step on.

    Raises:
        Preempted: asked to stop; a checkpoint was written.
        RunError: the loss is not finite, or memory ran out.
    """
    device_type = torch.device(process.device).type
    scaler = torch.amp.GradScaler(device_type, enabled=settings.precision == "16-mixed")
    start = _restore(learner, scaler, folder)
    record = _Records(folder, process, start, settings.logger)
    total = settings.schedule.num_steps
    last_save, speed = time.monotonic(), _Speed()
    progress = Progress("training", total, "steps", start=start, mode=process.progress)
    with stop_on_signal() as stop, progress, _known_errors():
        batches = batches_from(start)
        for step in range(start, total):
            samples = _next(batches, speed)
            record.skipped(samples)
            losses, shown = _step(learner, scaler, samples, step, settings, process)
            learner.after_step(step)
            done = step + 1
            if settings.is_logged(step):
                progress.advance(1, **record.metrics(done, losses, shown, learner.optimizer, speed))
                speed = _Speed()
            else:
                progress.advance(1)
            extra = learner.between(done)
            if extra and process.is_main:
                record.line("metrics.jsonl", {"step": done, **extra})
            if done < total and _save_is_due(done, last_save, settings, stop, process):
                _save(learner, scaler, folder, done, process)
                last_save = time.monotonic()
                if any_rank(stop.received is not None, process):
                    stop.received = stop.received or "SIGTERM on another rank"
                    stop.raise_if_requested()


def merge_skipped(folder: Path) -> None:
    """Make one sorted `skipped.jsonl` of what the ranks could not read, before and after interruptions."""
    files = sorted((folder / "resume").glob("skipped-rank*.jsonl"))
    lines = sorted({line for file in files for line in file.read_text().splitlines(keepends=True)})
    write_bytes(folder / "skipped.jsonl", "".join(lines).encode())


def _step(
    learner: Learner,
    scaler: torch.amp.GradScaler,
    samples: Sequence[Sample],
    step: int,
    settings: LoopSettings,
    process: Process,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(mix_seed(settings.seed, step, process.rank))
    for group in learner.optimizer.param_groups:
        group["lr"] = settings.base_lr * settings.schedule.lr_factor(step) * group.get("lr_scale", 1.0)
    learner.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    shown: dict[str, Tensor] = {}
    micro_batches = _split(samples, settings.accumulate)
    for number, micro in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        with _gradient_sync(learner.model, is_last), _autocast(settings.precision, process):
            losses, shown = learner.model(micro, step)
            total = torch.stack(list(losses.values())).sum() / len(micro_batches)
            scaler.scale(total).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach() / len(micro_batches)
    scaler.unscale_(learner.optimizer)
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    norm = clip_grad_norm_(parameters, settings.clip_norm if settings.clip_norm is not None else float("inf"))
    if not scaler.is_enabled() and not bool(norm.isfinite()):
        values = ", ".join(f"{name} {float(loss):.4g}" for name, loss in sums.items())
        images = [sample.index for sample in samples]
        raise RunError(f"diverged at step {step}: gradient is not finite ({values}; images {images}); lower --lr")
    scaler.step(learner.optimizer)
    scaler.update()
    return {**sums, "grad_norm": norm.detach()}, shown


def _split(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    size = -(-len(samples) // parts)
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def _gradient_sync(model: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Average gradients over processes once per step, with its last micro-batch."""
    return model.no_sync() if not is_last and hasattr(model, "no_sync") else contextlib.nullcontext()


def _autocast(precision: str, process: Process) -> contextlib.AbstractContextManager[Any]:
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(process.device).type, dtype=dtype)


def _next(batches: Iterator[list[Sample]], speed: _Speed) -> list[Sample]:
    began = time.perf_counter()
    samples = next(batches)
    speed.waiting += time.perf_counter() - began
    speed.images += len(samples)
    return samples


def _save_is_due(done: int, last_save: float, settings: LoopSettings, stop: StopSignal, process: Process) -> bool:
    """Whether to save now; all ranks get the same answer."""
    is_due = done % settings.checkpoint.every_steps == 0 or stop.received is not None
    is_due |= time.monotonic() - last_save >= settings.checkpoint.every_seconds
    return any_rank(is_due, process)


def _save(learner: Learner, scaler: torch.amp.GradScaler, folder: Path, done: int, process: Process) -> None:
    if process.is_main:
        state = {name: module.state_dict() for name, module in learner.state.items()}
        state |= {"optimizer": learner.optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_checkpoint(folder / "resume", done, state)
    wait_for_all(process)


def _restore(learner: Learner, scaler: torch.amp.GradScaler, folder: Path) -> int:
    found = load_checkpoint(folder / "resume")
    if found is None:
        return 0
    step, state = found
    for name, module in learner.state.items():
        module.load_state_dict(state[name])
    learner.optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    logger.info(f"continuing after step {step}")
    return step


@contextlib.contextmanager
def _known_errors() -> Iterator[None]:
    """What the chosen settings make impossible, as errors that name the settings."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RunError(
            "batch norm cannot train on a single image per process this small: raise --batch-size or --short-side, or "
            "use --set detector.neck_norm=group"
        ) from error
    except torch.OutOfMemoryError as error:
        raise RunError(
            "out of GPU memory: lower --batch-size (or raise --accumulate), --short-side, or use --precision bf16-mixed"
        ) from error


class _Records:
    """The run's log files, cut back to the step that is resumed from."""

    def __init__(self, folder: Path, process: Process, start: int, logger_name: str) -> None:
        self.folder, self.process = folder, process
        self._board: Any = None
        if logger_name == "tensorboard" and process.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._skipped: set[str] = set()
        if process.is_main:
            for name in ("metrics.jsonl", "speed.jsonl"):
                _cut_back(folder / name, start)

    def skipped(self, samples: Sequence[Sample]) -> None:
        """List images that could not be read, each once."""
        for file, reason in (entry for sample in samples for entry in sample.skipped):
            if file not in self._skipped:
                self._skipped.add(file)
                logger.warning(f"skipped {file}: {reason}")
                (self.folder / "resume").mkdir(exist_ok=True)
                with (self.folder / "resume" / f"skipped-rank{self.process.rank}.jsonl").open("a") as handle:
                    handle.write(json.dumps({"file": file, "reason": reason}) + "\n")

    def metrics(
        self,
        done: int,
        losses: Mapping[str, Tensor],
        shown: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        speed: _Speed,
    ) -> dict[str, float | str]:
        """Write one line of both logs; returns what the progress display shows."""
        names = [*losses, *shown]
        values = torch.stack([value.detach().float().reshape(()) for value in (*losses.values(), *shown.values())])
        numbers = dict(zip(names, mean_over_ranks(values).tolist(), strict=True))
        seconds = time.perf_counter() - speed.began
        rate = speed.images * self.process.world_size / seconds
        if self.process.is_main:
            lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in optimizer.param_groups)
            self.line("metrics.jsonl", {"step": done, "lr": lr, **numbers})
            self.line("speed.jsonl", {"step": done, **_speed_fields(rate, speed.waiting / seconds)})
        fields = {_SHOWN.get(name, name.removeprefix("loss_")): value for name, value in numbers.items()}
        fields.pop("", None)
        return {**fields, "img/s": rate, "data-wait": f"{speed.waiting / seconds:.0%}"}

    def line(self, name: str, content: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        with (self.folder / name).open("a") as handle:
            handle.write(json.dumps(content) + "\n")
        if self._board is not None:
            for key, value in content.items():
                self._board.add_scalar(f"{Path(name).stem}/{key}", value, content["step"])
            self._board.flush()


def _speed_fields(images_per_s: float, waiting: float) -> dict[str, float]:
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"images_per_s": round(images_per_s, 2), "data_wait": round(waiting, 3), "gpu_mib": round(peak)}


def _cut_back(file: Path, last_step: int) -> None:
    """Drop lines after a step, and a last line that a crash cut in half."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line).get("step", 0) <= last_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_bytes(file, "".join(kept).encode())
