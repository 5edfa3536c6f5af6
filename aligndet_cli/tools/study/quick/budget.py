"""Choose the parts of a study by the time there is: fractions of the labels, seeds and steps. Free of torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from aligndet_cli.errors import ConfigError
from aligndet_cli.tools.study.quick.fit import finetune_steps

_FRACTIONS = (100, 50, 20, 10, 5, 2, 1)
_FEWEST_IMAGES = 20  # in a fraction
FOLD = 1


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a study on this machine. A `start` is what a run takes beside its images or steps."""

    proposals_start: float
    proposals_image: float
    pretrain_start: float
    pretrain_step: float
    finetune_start: float
    finetune_step: float
    evaluation: float


@dataclass(frozen=True)
class Size:
    """Numbers of a study.

    Attributes:
        fractions: percents of the labelled images; the last is the one that rates are compared at.
        rate_seeds: number of seeds that the rates of the baseline are compared with.
    """

    fractions: tuple[float, ...]
    seeds: int
    rate_seeds: int
    pretrain_steps: int
    finetune_steps: int

    def num_finetunings(self, num_rates: int) -> int:
        """Return the number of runs of fine-tuning, if the baseline is tried at so many rates."""
        return 2 * self.seeds * len(self.fractions) + (num_rates - 1) * self.rate_seeds

    def expected(self, costs: Costs, *, num_proposal_images: int) -> dict[str, float]:
        """Return the seconds of a run of each stage."""
        return {
            "proposals": costs.proposals_start + num_proposal_images * costs.proposals_image,
            "pretrain-box": costs.pretrain_start + self.pretrain_steps * costs.pretrain_step,
            "finetune": costs.finetune_start + self.finetune_steps * costs.finetune_step,
            "evaluate": costs.evaluation,
        }

    def seconds(self, costs: Costs, *, num_proposal_images: int, num_rates: int, jobs: int) -> float:
        """Return how long the study takes with so many runs of fine-tuning at a time."""
        one = self.expected(costs, num_proposal_images=num_proposal_images)
        tuning = self.num_finetunings(num_rates) * (one["finetune"] + one["evaluate"])
        return one["proposals"] + one["pretrain-box"] + tuning / jobs


@dataclass(frozen=True)
class _Rung:
    seeds: int
    rate_seeds: int
    pretrain_steps: int
    length: float  # times `finetune_steps`
    with_fewer: bool = False  # a second, smaller fraction


# The least that gives an interval, and what more time is best spent on, in turn.
_LADDER = (
    _Rung(3, 1, 300, 1),
    _Rung(3, 1, 400, 1.5),
    _Rung(3, 1, 800, 1.5),
    _Rung(5, 1, 800, 1.5),
    _Rung(5, 2, 1200, 2),
    _Rung(5, 2, 1200, 3),
    _Rung(5, 2, 1200, 3, with_fewer=True),
    _Rung(8, 2, 1600, 3, with_fewer=True),
    _Rung(10, 3, 2400, 3, with_fewer=True),
)


def choose_size(
    costs: Costs, seconds: float, *, num_images: int, num_proposal_images: int, num_rates: int, jobs: int = 1
) -> tuple[Size, float]:
    """Return the best study that fits into the time, and its seconds: as many labels as possible, then more of all.

    Args:
        num_images: to train on.
        jobs: runs at a time.

    Raises:
        ConfigError: not even the smallest fits; the message says how long that takes.
    """

    def cost(size: Size) -> float:
        return size.seconds(costs, num_proposal_images=num_proposal_images, num_rates=num_rates, jobs=jobs)

    least = float("inf")
    for sizes in _ladders(num_images):
        fitting = [size for size in sizes if cost(size) <= seconds]
        least = min(least, cost(sizes[0]))
        if sizes[0] in fitting:
            best = fitting[-1]
            return best, cost(best)
    raise ConfigError(
        f"--hours {seconds / 3600:g}: too few for a study of three seeds on this machine, as fast as it is now; give "
        f"--hours {-(-least // 36) / 100:g} or more"
    )


def _ladders(num_images: int) -> Iterator[list[Size]]:
    """Yield the sizes of each fraction of the labels, smallest first; the largest fraction goes first."""
    counts = {percent: int(percent / 100 * num_images) for percent in _FRACTIONS}
    kept = [percent for percent in _FRACTIONS if percent == 100 or counts[percent] >= _FEWEST_IMAGES]
    for place, percent in enumerate(kept):
        fewer = next((other for other in kept[place + 1 :] if other <= percent / 4), None)
        steps = finetune_steps(counts[percent])
        yield [
            Size(
                (fewer, percent) if rung.with_fewer and fewer is not None else (percent,),
                rung.seeds,
                rung.rate_seeds,
                rung.pretrain_steps,
                round(steps * rung.length),
            )
            for rung in _LADDER
        ]
