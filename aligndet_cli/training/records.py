"""Write the log files of a training run: losses, speed, and images that could not be read."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndet_cli.data.sample import Sample
from aligndet_cli.files import naming, write_bytes
from aligndet_cli.logs import logger
from aligndet_cli.processes.collectives import mean_over_ranks
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.memory import peak_resident
from aligndet_cli.training.divergence import FILE as DIVERGED
from aligndet_cli.training.embeddings import HEAD_PREFIX
from aligndet_cli.training.loggers import Loggers

# Short names for the progress display; numbers with an empty name are in metrics.jsonl only.
_SHOWN = {
    "positive_similarity": "sim+",
    "negative_similarity": "sim-",
    "embedding_rank": "rank",
    "embedding_spread": "spread",
    "contrast_accuracy": "",
    "grad_norm": "",
}


@dataclass
class Speed:
    """Start of a line of the log, seconds of waiting for data since then, and images since then."""

    began: float = field(default_factory=time.perf_counter)
    waiting: float = 0.0
    images: int = 0


class Records:
    """The run's log files. Opening them removes the lines after the step to resume from."""

    def __init__(self, folder: Path, process: Process, start: int, loggers: Loggers | None = None) -> None:
        self.folder, self.process = folder, process
        self.loggers = loggers or Loggers((), folder)
        self.loggers.start(start)
        self._skipped: set[str] = set()
        if process.is_main:
            (folder / DIVERGED).unlink(missing_ok=True)
            for name in ("metrics.jsonl", "speed.jsonl"):
                _cut_back(folder / name, start)

    def skipped(self, samples: Sequence[Sample]) -> None:
        """Log and record images that could not be read, each once."""
        for file, reason in (entry for sample in samples for entry in sample.skipped):
            if file not in self._skipped:
                self._skipped.add(file)
                logger.warning(f"skipped {file}: {reason}")
                (self.folder / "resume").mkdir(exist_ok=True)
                log = self.folder / "resume" / f"skipped-rank{self.process.rank}.jsonl"
                with naming(log), log.open("a") as handle:
                    handle.write(json.dumps({"file": file, "reason": reason}) + "\n")

    def metrics(
        self,
        done: int,
        losses: Mapping[str, Tensor],
        shown: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        speed: Speed,
    ) -> dict[str, float | str]:
        """Write one line of both logs from scalar tensors, and return the fields for the progress display."""
        names = [*losses, *shown]
        values = torch.stack([value.detach().float().reshape(()) for value in (*losses.values(), *shown.values())])
        numbers = dict(zip(names, mean_over_ranks(values, self.process).tolist(), strict=True))
        seconds = time.perf_counter() - speed.began
        rate, waiting = speed.images * self.process.world_size / seconds, speed.waiting / seconds
        memory = peak_memory(torch.device(self.process.device))
        if self.process.is_main:
            scheduled = [group for group in optimizer.param_groups if not group.get("constant_lr")]
            lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in scheduled)
            numbers_and_lr = {"lr": lr, **numbers}
            self.line("metrics.jsonl", {"step": done, **numbers_and_lr})
            fields = {"images_per_s": round(rate, 2), "data_wait": round(waiting, 3), "memory_mib": memory >> 20}
            self.line("speed.jsonl", {"step": done, **fields})
            self.process.callbacks.on_log(done, {**numbers_and_lr, **fields})
        short = {_short_name(name): value for name, value in numbers.items()}
        short.pop("", None)
        total = sum(value for name, value in numbers.items() if name.startswith("loss_"))
        return {
            "loss": total,
            **short,
            "img/s": rate,
            "data-wait": f"{waiting:.0%}",
            "memory": f"{memory / 1e9:.2g} GB",
        }

    def between(self, done: int, numbers: Mapping[str, float] | None) -> None:
        """Write the numbers that were found between two steps, if any, as a line of their own."""
        if numbers and self.process.is_main:
            self.line("metrics.jsonl", {"step": done, **numbers})
            self.process.callbacks.on_evaluate(done, numbers)

    def line(self, name: str, content: Mapping[str, Any]) -> None:
        """Append one JSON line to a log file, and give its numbers to the loggers."""
        with naming(self.folder / name), (self.folder / name).open("a") as handle:
            handle.write(json.dumps(content) + "\n")
        numbers = {f"{Path(name).stem}/{key}": value for key, value in content.items() if key != "step"}
        self.loggers.log(content["step"], numbers)


def _short_name(name: str) -> str:
    """Return the name of a number on the progress display; "" if it is in metrics.jsonl only."""
    return "" if name.startswith(HEAD_PREFIX) else _SHOWN.get(name, name.removeprefix("loss_"))


def merge_skipped(folder: Path) -> None:
    """Write one sorted `skipped.jsonl` of the images that any rank could not read, over all interruptions."""
    files = sorted((folder / "resume").glob("skipped-rank*.jsonl"))
    lines = sorted({line for file in files for line in file.read_text().splitlines(keepends=True)})
    write_bytes(folder / "skipped.jsonl", "".join(lines).encode())


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes in use so far: of tensors on a GPU, or of this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def _cut_back(file: Path, last_step: int) -> None:
    """Drop the lines after a step, and a last line that a crash cut in half."""
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
