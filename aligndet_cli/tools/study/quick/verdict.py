"""The answer of a study: the mean difference of its pairs with its 95 % interval, in one sentence."""

from dataclasses import dataclass
from typing import Any, Literal

from aligndet_cli.tables import percent
from aligndet_cli.tools.report.collect import Report, Row

Answer = Literal["it pays", "it does not pay", "not decided"]

_WORTH = 0.005  # AP in 0..1 that pays for nothing
_LEARNED = 0.02  # AP below which a detector has not learned anything


@dataclass(frozen=True)
class Verdict:
    """Gain of pre-training in one setting, and the answer that follows.

    Attributes:
        labelled: number of labelled images.
        fraction: percent of all.
        difference, low, high: mean difference of AP in 0..1 and the ends of its interval.
        baseline: label of the start that is compared with.
        reason: of "not decided".
    """

    labelled: int
    fraction: float
    difference: float
    low: float
    high: float
    num_pairs: int
    baseline: str
    answer: Answer
    reason: str = ""

    def sentence(self) -> str:
        """Return the answer for people, in points of AP."""
        images = f"all {self.labelled}" if self.fraction == 100 else f"{self.labelled} ({self.fraction:g} %)"
        numbers = (
            f"{percent(self.difference, '+')} AP, 95 % between {percent(self.low, '+')} and {percent(self.high, '+')}"
        )
        answer = f"{self.answer}: {self.reason}" if self.reason else self.answer
        return f"With {images} labelled images: {numbers}, {self.num_pairs} pairs against {self.baseline}: {answer}."

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "sentence": self.sentence()}


def verdicts_of(report: Report, label: str) -> list[Verdict]:
    """Return the verdict on a start in each setting in which it has two pairs at least, least labels first."""
    rows = {(row.setting, row.label): row for row in report.rows}
    verdicts = []
    for baseline in (row for row in report.rows if row.is_baseline):
        row = rows.get((baseline.setting, label))
        if row is not None and (verdict := _verdict(row, baseline)) is not None:
            verdicts.append(verdict)
    return verdicts


def _verdict(row: Row, baseline: Row) -> Verdict | None:
    ours, plain = row.summaries.get("AP"), baseline.summaries.get("AP")
    if ours is None or plain is None or ours.delta is None or ours.delta.interval is None:
        return None
    delta = ours.delta
    low, high = ours.delta.interval
    answer: Answer = "it pays" if low > 0 else "it does not pay" if high < _WORTH else "not decided"
    reason = "more seeds or labels" if answer == "not decided" else ""
    if max(ours.mean, plain.mean) < _LEARNED:
        answer, reason = "not decided", f"no detector has learned to detect (AP {100 * plain.mean:.1f}); more steps"
    setting = row.setting
    return Verdict(
        setting.num_images, setting.fraction, delta.mean, low, high, delta.num_pairs, baseline.label, answer, reason
    )
