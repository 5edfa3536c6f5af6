"""Settle the batch size of a run: "auto" becomes a number, and the batch fits into memory."""

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.files import read_json
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices, Process
from aligndet_cli.training.fitting import try_fit
from aligndet_cli.training.loop import Learner, LoopSettings, train_step, watch_divergence
from aligndet_cli.training.recipe import Rates
from aligndet_cli.training.settings import TrainingConfig, check_batch_split
from aligndet_cli.training.trial import Trial
from aligndet_cli.workspace import Workspace

MAX_IMAGES = 512  # per GPU; no recipe goes beyond
# Share of the GPU's memory; the rest is for its other users, fragments, and batches with more proposals.
USED_SHARE = 0.9
_STEPS = 2  # the optimizer allocates its state in the first


class Split(NamedTuple):
    """Batch size over all processes and number of micro-batches of a run, and True if it is complete."""

    batch_size: int
    accumulate: int
    is_complete: bool


def recorded_split(
    workspace: Workspace, stage: str, name: str, *, resume: bool = True, force: bool = False
) -> Split | None:
    """Return the split of the run of this name that is complete or would be continued; None if a new run begins."""
    folder = workspace.begun(stage, name, resume=resume, force=force)
    if folder is None:
        return None
    training = read_json(folder / "config.json")["training"]
    return Split(int(training["batch_size"]), int(training["accumulate"]), folder.name == name)


class Settled(NamedTuple):
    """Settings whose batch fits into memory; with `spares_memory` only if freed memory is given back at once."""

    training: TrainingConfig
    spares_memory: bool = False


def settle_batch_size(
    training: TrainingConfig, rates: Rates, devices: Devices, *, recorded: Split | None, trial: Trial
) -> Settled:
    """Replace "auto" by a number, and make sure that the batch fits into memory.

    On GPUs "auto" is the largest batch that fits. On CPUs it is the recipe's batch, in as many micro-batches as it
    takes to fit, unless `accumulate` is given.

    Args:
        recorded: the split of the interrupted or finished run of this name, see `recorded_split`.

    Raises:
        ConfigError: the batch cannot be divided among processes and micro-batches.
        RunError: the batch does not fit.
    """
    number, origin = _with_number(training, rates, devices, recorded, trial)
    if recorded is not None and (number.batch_size, number.accumulate) != (recorded.batch_size, recorded.accumulate):
        return Settled(number)  # not this run's: `plan_output` tells
    check_batch_split(number, devices)
    settled = Settled(number)
    if devices.kind == "cpu" and not (recorded is not None and recorded.is_complete):
        may_split = training.batch_size == "auto" and recorded is None and "accumulate" not in training.model_fields_set
        settled = _fitted(number, devices, trial, may_split=may_split)
    accumulate = settled.training.accumulate
    if training.batch_size == "auto":
        parts = f", in {accumulate} parts (--accumulate {accumulate})" if accumulate > 1 else ""
        logger.info(f"--batch-size auto: {number.batch_size} ({origin}){parts}")
    if settled.spares_memory:
        logger.info("memory is scarce: what is freed is given back at once, which makes steps slower")
    return settled


def _with_number(
    training: TrainingConfig, rates: Rates, devices: Devices, recorded: Split | None, trial: Trial
) -> tuple[TrainingConfig, str]:
    """Return the settings with a number for the batch size, and its origin for people."""
    if training.batch_size != "auto":
        return training, "given"
    if recorded is not None:
        accumulate = training.accumulate if "accumulate" in training.model_fields_set else recorded.accumulate
        update = {"batch_size": recorded.batch_size, "accumulate": accumulate}
        return training.model_copy(update=update), "as when the run began"
    parts = devices.world_size * training.accumulate
    if devices.kind == "cuda":
        number = largest_on_gpu(trial, Process(device=devices.first)) * parts
        return training.model_copy(update={"batch_size": number}), f"what fits on {devices.world_size} GPU(s)"
    number = -(-rates.batch_size // parts) * parts
    return training.model_copy(update={"batch_size": number}), rates.origin


def _fitted(training: TrainingConfig, devices: Devices, trial: Trial, *, may_split: bool) -> Settled:
    """Return the settings, with more micro-batches if the batch does not fit otherwise and `may_split`."""
    images, accumulate = training.images_per_step // devices.world_size, training.accumulate
    fit = try_fit(trial, devices, images // accumulate)
    if fit is None or fit.footprint.of(images, accumulate) <= fit.budget:
        return Settled(training)
    parts = fit.parts(images, accumulate)
    if parts is not None and may_split:
        return Settled(training.model_copy(update={"accumulate": parts}))
    fits_spared = parts is None and fit.footprint.of(images, images, is_sparing=True) <= fit.budget
    if fits_spared and (may_split or accumulate == images):
        return Settled(training.model_copy(update={"accumulate": images}), spares_memory=True)
    advice = fit.advice(devices.world_size, accumulate)
    if parts is not None:
        advice += f", or --accumulate {parts}: the same batch in {parts} parts (as --batch-size auto finds by itself)"
    elif fits_spared:
        advice += ", or use --batch-size auto, which spares memory at the expense of speed"
    raise RunError(f"{fit.problem(images, accumulate, devices)}: {advice}")


def find_largest(fits: Callable[[int], bool], limit: int) -> int:
    """Find the largest number up to `limit` that fits, by doubling and then bisection; 0 if not even 1 fits."""
    best, tried = 0, 1
    while tried <= limit and fits(tried):
        best, tried = tried, tried * 2
    low, high = best, min(tried, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_on_gpu(trial: Trial, process: Process) -> int:
    """Find the largest micro-batch, in images, that fits on the GPU of a process, by taking steps.

    Raises:
        RunError: not even one image fits.
    """
    device, learner = torch.device(process.device), trial.build(process)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(USED_SHARE, device)
    try:
        limit = min(trial.num_images, MAX_IMAGES)
        found = find_largest(lambda count: _fits(learner, trial.settings, trial.draw(count), process), limit)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    if not found:
        raise RunError("--batch-size auto: out of GPU memory with a single image: lower --short-side and --long-side")
    return found


def _fits(learner: Learner, settings: LoopSettings, samples: list[Sample], process: Process) -> bool:
    divergence = watch_divergence(learner, process)
    try:
        for step in range(_STEPS):
            train_step(learner, samples, step, settings, divergence)
            learner.after_step(step)
        if process.device != "cpu":
            torch.cuda.synchronize(process.device)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    # Outside of the handler: the exception keeps the tensors of the step alive.
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return fits
