"""Costs of training: images seen, and hours."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from aligndet_cli.workspace import Artifact


@dataclass(frozen=True)
class Cost:
    """Cost of a pre-training or a fine-tuning, or the mean of several.

    Attributes:
        images: seen, each time that one was drawn.
        hours: of its steps, on all its devices at once, without pauses; None if the log is gone.
    """

    images: float
    hours: float | None


def cost_of(run: Artifact) -> Cost | None:
    """Return the cost of a run of `pretrain-box` or `finetune`; None for an imported one, which does not tell."""
    steps, training = run.result.get("steps"), run.config().get("training")
    if steps is None or training is None:
        return None
    return Cost(steps * training["batch_size"], _hours(run, training["batch_size"]))


def mean_cost(costs: Iterable[Cost | None]) -> Cost | None:
    """Return the mean of those that are known; None without any."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    hours = [cost.hours for cost in known if cost.hours is not None]
    return Cost(statistics.fmean(cost.images for cost in known), statistics.fmean(hours) if hours else None)


def _hours(run: Artifact, batch_size: int) -> float | None:
    """Return the hours that the lines of `speed.jsonl` stand for, which lack nothing but a start."""
    file = run.folder / "speed.jsonl"
    if not file.is_file():
        return None
    seconds, before = 0.0, 0
    for line in map(json.loads, file.read_text().splitlines()):
        seconds += (line["step"] - before) * batch_size / max(line["images_per_s"], 0.01)
        before = line["step"]
    return seconds / 3600
