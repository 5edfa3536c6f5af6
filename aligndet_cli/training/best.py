"""The best weights of a run so far, kept over interruptions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from aligndet_cli.files import read_json, write_bytes, write_json

FILE = "best.pt"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: finished steps, name of the number, and its value."""

    step: int
    metric: str
    value: float


class BestWeights:
    """The best evaluation and its weights, under `resume/` until the run ends; only the main process writes.

    `best.json` names the evaluation, and by its step the file of weights, so that the two always belong together. A
    run that is continued from an earlier step evaluates again what it has evaluated, to the same numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._record = folder, folder / "resume" / "best.json"
        self.now = Best(**read_json(self._record)) if self._record.exists() else None

    def offer(self, found: Best, write: Callable[[Path], None]) -> None:
        """Keep an evaluation, and the weights that `write` writes, if it is better than the best before."""
        if self.now is not None and found.value <= self.now.value:
            return
        self._record.parent.mkdir(exist_ok=True)
        write(self._weights_of(found))
        write_json(self._record, asdict(found))
        if self.now is not None and self.now.step != found.step:
            self._weights_of(self.now).unlink(missing_ok=True)
        self.now = found

    def put_in_place(self) -> None:
        """Write `best.pt`, if there is a best evaluation."""
        if self.now is not None:
            write_bytes(self.folder / FILE, self._weights_of(self.now).read_bytes())

    def _weights_of(self, best: Best) -> Path:
        return self._record.with_name(f"best-{best.step:09d}.pt")
