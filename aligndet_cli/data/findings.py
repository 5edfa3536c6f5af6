"""Problems of a data set: raised at once when a stage reads it, collected when `doctor` does."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from aligndet_cli.errors import DataError, one_line

Severity = Literal["error", "warning", "info"]


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return `1 image` or `2 images`; `plural` is needed if it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        code: stable word for programs, e.g. `degenerate-boxes`.
        message: one line for people: place, fault and remedy.
        count: number of occurrences.
        example: a file (or `file: entry`) that shows it.
    """

    severity: Severity
    code: str
    message: str
    count: int = 1
    example: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Findings:
    """Collect findings, or with `is_strict` raise the first error.

    Readers report every error here and go on without the wrong entries, so that the same code serves the stages, which
    stop, and `doctor`, which collects.
    """

    def __init__(self, *, is_strict: bool) -> None:
        self.is_strict = is_strict
        self.items: list[Finding] = []

    def error(self, code: str, message: str, *, count: int = 1, example: str = "") -> None:
        """Report something that must be repaired.

        Raises:
            DataError: with `message`, if strict.
        """
        if self.is_strict:
            raise DataError(message)
        self._add("error", code, message, count, example)

    def warn(self, code: str, message: str, *, count: int = 1, example: str = "") -> None:
        """Report something that changes results: entries that are corrected, left out, or there twice."""
        self._add("warning", code, message, count, example)

    def info(self, code: str, message: str, *, count: int = 1, example: str = "") -> None:
        """Report something worth knowing that changes nothing: the labels are used as they are."""
        self._add("info", code, message, count, example)

    def _add(self, severity: Severity, code: str, message: str, count: int, example: str) -> None:
        self.items.append(Finding(severity, code, one_line(message), count, one_line(example)))

    def problem_counts(self) -> dict[str, int]:
        """Return counts of errors and warnings by kind, e.g. `{"degenerate boxes": 2}`."""
        return {item.code.replace("-", " "): item.count for item in self.items if item.severity != "info"}
