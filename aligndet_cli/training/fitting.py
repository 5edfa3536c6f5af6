"""Estimate whether the batch of a run fits into the memory of this machine, and advise where it does not."""

from dataclasses import dataclass

from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.memory import Room, free_room
from aligndet_cli.training.footprint import Footprint, gigabytes, try_step
from aligndet_cli.training.trial import Trial

# Share of the free memory of the machine; the rest is for its other users.
USED_SHARE = 0.9
# Bytes, more than any detector here takes: steps that would fit even so are not tried.
_ROUGH_FIXED, _ROUGH_PER_IMAGE, _ROUGH_PER_PIXEL = 1_000_000_000, 50_000_000, 4_000
_ROUGH_REGIONS = 400_000_000  # per image
_ROUGH_SHARE = 0.5


@dataclass(frozen=True)
class Fit:
    """The memory that steps of a process need, and the memory there is for them.

    Attributes:
        budget: bytes.
        largest: height and width of the largest images, for messages.
    """

    footprint: Footprint
    budget: int
    largest: str

    def images(self, accumulate: int = 1) -> int:
        """Return the number of images that fit, as a multiple of `accumulate`."""
        fixed = self.footprint.of(0)
        return max((self.budget - fixed) // (self.footprint.of(accumulate, accumulate) - fixed) * accumulate, 0)

    def parts(self, images: int, at_least: int) -> int | None:
        """Return the smallest number of equal micro-batches that fit, from `at_least` on; None if there is none."""
        divisors = (number for number in range(at_least, images + 1) if images % number == 0)
        return next((number for number in divisors if self.footprint.of(images, number) <= self.budget), None)

    def problem(self, images: int, accumulate: int, devices: Devices) -> str:
        """Describe why `images` do not fit in a process."""
        each = f" in each of {devices.per_node} processes" if devices.per_node > 1 else ""
        number = f"{images} images" if self.images(accumulate) else f"a single image of {self.largest}"
        needed = gigabytes(self.footprint.of(images if self.images(accumulate) else 1))
        return (
            f"a step with {number}{each} needs about {needed} of memory and there are {gigabytes(self.budget)} for it"
        )

    def advice(self, world_size: int, accumulate: int = 1) -> str:
        """Name settings that fit."""
        images = self.images(accumulate)
        return f"use --batch-size {images * world_size}" if images else "lower --short-side and --long-side"


def try_fit(trial: Trial, devices: Devices, micro_batch: int) -> Fit | None:
    """Compare the memory that steps take with what this machine has; None if they easily fit, or it cannot be measured.

    A step is tried only if a rough estimate calls for it.

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


def memory_budget(devices: Devices) -> int | None:
    """Return the bytes that are free for each process on this machine; None if nothing limits them."""
    return _budget(free_room(), devices)


def _budget(room: Room, devices: Devices, *, started: int = 0, unused: int = 0) -> int | None:
    """Return the bytes for each process on this machine; None if nothing limits them.

    Args:
        started: bytes of a process before the model is built.
        unused: bytes of its address space that are not in memory.
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
