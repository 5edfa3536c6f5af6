"""Learning rate, momentum and length of a run, as pure functions of the step."""

import math
from dataclasses import dataclass

from aligndet_cli.errors import ConfigError
from aligndet_cli.training.recipe import DecayName, Rates, ScheduleName, WarmupName

# Share of the learning rate at the start; `constant`: the authors' semi-coco/fcos_r50_fpn_12k_semi-coco.py.
WARMUP_START: dict[WarmupName, float] = {"linear": 0.001, "constant": 1 / 3, "none": 1.0}


@dataclass(frozen=True)
class Length:
    """Length of a named schedule, and the places where the learning rate drops by ten."""

    epochs: int | None
    steps: int | None
    drops: tuple[float, ...]  # fractions of the whole


LENGTHS: dict[ScheduleName, Length] = {
    "12k": Length(None, 12_000, (9 / 12, 11 / 12)),
    "90k": Length(None, 90_000, (60 / 90, 82.5 / 90)),
    "1x": Length(12, None, (8 / 12, 11 / 12)),
    "2x": Length(24, None, (16 / 24, 22 / 24)),
    "3x": Length(36, None, (24 / 36, 33 / 36)),
    "4x": Length(48, None, (32 / 48, 44 / 48)),
    "50e": Length(50, None, (40 / 50,)),
    "90e": Length(90, None, (30 / 90, 60 / 90)),
    "100e": Length(100, None, (80 / 100,)),
    "150e": Length(150, None, (100 / 150,)),
    "200e": Length(200, None, (120 / 200, 160 / 200)),
    "300e": Length(300, None, (180 / 300, 240 / 300)),
}


@dataclass(frozen=True)
class Schedule:
    """The learning-rate curve of a run, in optimizer steps.

    Attributes:
        num_steps: length of the run.
        warmup_steps: steps until the full rate.
        drop_steps: steps from which the rate is ten times lower.
        warmup: a linear rise, a constant lower rate, or none.
        decay: `cosine` falls from the full rate to nothing instead of dropping.
    """

    num_steps: int
    warmup_steps: int
    drop_steps: tuple[int, ...]
    warmup: WarmupName = "linear"
    decay: DecayName = "steps"

    def lr_factor(self, step: int) -> float:
        """Return the factor on the base learning rate at a step (0-based)."""
        if self.decay == "cosine":
            drop = (1.0 + math.cos(math.pi * step / self.num_steps)) / 2.0
        else:
            drop = 0.1 ** sum(step >= drop_step for drop_step in self.drop_steps)
        if step >= self.warmup_steps:
            return drop
        start = WARMUP_START[self.warmup]
        return drop * (start + (1 - start) * step / self.warmup_steps if self.warmup == "linear" else start)


def momentum_at(step: int, num_steps: int, start: float) -> float:
    """Return the EMA coefficient of the momentum network: `start` at step 0, 1.0 at the end, on a cosine.

    Source: docs/paper.md §4.5; the authors' `momentum_update_hook.py`.
    """
    return 1.0 - (1.0 - start) * (math.cos(math.pi * step / num_steps) + 1.0) / 2.0


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the steps it takes to see every image; the last, short batch is filled from the next epoch."""
    return max(math.ceil(num_images / batch_size), 1)


def build_schedule(
    name: ScheduleName,
    rates: Rates,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    num_images: int,
    batch_size: int,
) -> Schedule:
    """Build a named schedule with the warm-up, decay and drops of `rates`, scaled to `epochs` or `steps` if given.

    The warm-up is never more than a tenth of the run, so that short runs train at their full rate.

    Raises:
        ConfigError: both `epochs` and `steps` are given.
    """
    if epochs is not None and steps is not None:
        raise ConfigError("--epochs and --steps: give one of them")
    length = LENGTHS[name]
    if steps is None and epochs is None:
        steps, epochs = length.steps, length.epochs
    num_steps = steps or (epochs or 0) * steps_per_epoch(num_images, batch_size)
    fractions = dict(rates.drops).get(name, length.drops) if rates.decay == "steps" else ()
    drop_steps = tuple(round(fraction * num_steps) for fraction in fractions)
    warmup_steps = 0 if rates.warmup == "none" else min(rates.warmup_steps, num_steps // 10)
    return Schedule(num_steps, warmup_steps, drop_steps, rates.warmup, rates.decay)
