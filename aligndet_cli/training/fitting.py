"""How large a batch is, and whether it fits into memory; told before a run, not by its end."""

from dataclasses import dataclass
from typing import NamedTuple

from aligndet_cli.errors import RunError
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices, Process
from aligndet_cli.processes.memory import Room, free_room
from aligndet_cli.training.batch_size import Split, Trial, largest_on_gpu
from aligndet_cli.training.recipe import Rates
from aligndet_cli.training.settings import TrainingConfig, check_batch_split
from aligndet_cli.training.trial import Footprint, gigabytes, try_step

# Of what is free on the machine: the rest is for its other users.
USED_SHARE = 0.9
# More than any detector here takes, by some margin: steps that would fit even so are not tried.
_ROUGH_FIXED, _ROUGH_PER_IMAGE, _ROUGH_PER_PIXEL = 1_000_000_000, 50_000_000, 4_000
_ROUGH_REGIONS = 400_000_000  # of an image
_ROUGH_SHARE = 0.5


class Settled(NamedTuple):
    """The settings with a batch that fits into memory, and whether it does so only if memory is spared."""

    training: TrainingConfig
    spares_memory: bool = False


def settle_batch_size(
    training: TrainingConfig, rates: Rates, devices: Devices, *, recorded: Split | None, trial: Trial
) -> Settled:
    """The settings with a number in the place of "auto", and with a batch that fits into memory.

    "auto" is what fits on GPUs. On CPUs it is the recipe's batch, in as many micro-batches as it takes to fit, unless
    `accumulate` is given.

    Args:
        recorded: what was found when the interrupted or finished run of this name began, if there is one.

    Raises:
        ConfigError: the batch cannot be divided among processes and micro-batches.
        RunError: it does not fit.
    """
    number, origin = _with_number(training, rates, devices, recorded, trial)
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
    """The settings with a number for the batch size, and where it comes from."""
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
    """The settings, with more micro-batches where the batch does not fit otherwise and there may be more."""
    images, accumulate = training.images_per_step // devices.world_size, training.accumulate
    fit = try_fit(trial, devices, images // accumulate)
    if fit is None or fit.needed(images, accumulate) <= fit.budget:
        return Settled(training)
    parts = fit.parts(images, accumulate)
    if parts is not None and may_split:
        return Settled(training.model_copy(update={"accumulate": parts}))
    fits_spared = parts is None and fit.needed(images, images, is_sparing=True) <= fit.budget
    if fits_spared and (may_split or accumulate == images):
        return Settled(training.model_copy(update={"accumulate": images}), spares_memory=True)
    advice = fit.advice(devices.world_size, accumulate)
    if parts is not None:
        advice += f", or --accumulate {parts}: the same batch in {parts} parts (as --batch-size auto finds by itself)"
    elif fits_spared:
        advice += ", or use --batch-size auto, which spares memory at the expense of speed"
    raise RunError(f"{fit.problem(images, accumulate, devices)}: {advice}")


@dataclass(frozen=True)
class Fit:
    """What steps of a process need, and what there is for them.

    Attributes:
        budget: bytes.
        largest: height and width of images, for people.
    """

    footprint: Footprint
    budget: int
    largest: str

    def needed(self, images: int, accumulate: int = 1, *, is_sparing: bool = False) -> int:
        """Bytes that steps with so many images in a process take."""
        return self.footprint.of(images, accumulate, is_sparing=is_sparing)

    def images(self, accumulate: int = 1) -> int:
        """How many fit, as a multiple of `accumulate`."""
        fixed = self.needed(0)
        return max((self.budget - fixed) // (self.needed(accumulate, accumulate) - fixed) * accumulate, 0)

    def parts(self, images: int, at_least: int) -> int | None:
        """The fewest equal micro-batches that fit, None if there is no such number."""
        divisors = (number for number in range(at_least, images + 1) if images % number == 0)
        return next((number for number in divisors if self.needed(images, number) <= self.budget), None)

    def problem(self, images: int, accumulate: int, devices: Devices) -> str:
        """What is wrong with so many images in a process."""
        each = f" in each of {devices.per_node} processes" if devices.per_node > 1 else ""
        number = f"{images} images" if self.images(accumulate) else f"a single image of {self.largest}"
        needed = gigabytes(self.needed(images if self.images(accumulate) else 1))
        return (
            f"a step with {number}{each} needs about {needed} of memory and there are {gigabytes(self.budget)} for it"
        )

    def advice(self, world_size: int, accumulate: int = 1) -> str:
        """What to use instead."""
        images = self.images(accumulate)
        return f"use --batch-size {images * world_size}" if images else "lower --short-side and --long-side"


def try_fit(trial: Trial, devices: Devices, micro_batch: int) -> Fit | None:
    """How steps fit into the memory of this machine; None where they do so by far, or it cannot be told.

    A step is tried only where the size of the batch gives reason to.

    Raises:
        RunError: not even a single image fits.
    """
    room = free_room()
    budget = _budget(room, devices)
    if budget is None or _rough_need(trial, micro_batch) <= _ROUGH_SHARE * budget:
        return None
    logger.info(f"trying a step with one image of {trial.largest}, to see how many fit into memory")
    footprint = try_step(trial, budget)
    if footprint is None:
        return None
    budget = _budget(room, devices, started=footprint.started, unused=footprint.unused)
    assert budget is not None
    return Fit(footprint, budget, trial.largest)


def _budget(room: Room, devices: Devices, *, started: int = 0, unused: int = 0) -> int | None:
    """Bytes for each process on this machine; None: as many as it likes.

    Args:
        started: what a process takes before the model is built.
        unused: of its address space, what it takes beyond its memory.
    """
    limits = []
    if room.shared is not None:
        limits.append(int(USED_SHARE * room.shared) // devices.per_node - (started if devices.per_node > 1 else 0))
    if room.own is not None:
        limits.append(room.own - unused)
    return max(min(limits), 0) if limits else None


def _rough_need(trial: Trial, micro_batch: int) -> int:
    height, width = trial.sizes_hw[0]
    regions = _ROUGH_REGIONS if trial.pools_regions else 0
    return _ROUGH_FIXED + micro_batch * (_ROUGH_PER_IMAGE + regions + height * width * _ROUGH_PER_PIXEL)
