"""Stop a run whose gradients are no longer finite, before they do harm and without slowing down a GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.files import write_json
from aligndet_cli.processes.collectives import gather_objects
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.dump import StepDump
from aligndet_cli.workspace import run_name

FILE = "diverged.json"


class Divergence:
    """A watch over the gradient norm of every step.

    Reading a number from a GPU waits for all of its queued work. With `is_deferred`, a flag on the device keeps the
    optimizer from moving from the first bad step on, and `check` reads it later. (In float16 runs the gradient scaler
    skips single bad steps.)

    Args:
        folder: for a file with the bad step and its images; None writes none.
        is_deferred: read the flag only in `check`; this takes a fused optimizer.
        dump: writes the state before the bad step; None: nobody does.
    """

    def __init__(
        self, process: Process, folder: Path | None, *, is_deferred: bool, dump: StepDump | None = None
    ) -> None:
        self.process, self.folder, self.is_deferred, self.dump = process, folder, is_deferred, dump
        self._recent: list[tuple[int, list[int]]] = []  # step and images, since the last check
        self._names: list[str] = []
        self._num_bad = torch.zeros((), device=process.device)  # steps from the first bad one on
        self._losses: Tensor | None = None  # of the first bad step, else of the last step

    def begin_step(self) -> None:
        """Keep what the step is about to change and a dump of it needs."""
        if self.dump is not None and not self.is_deferred:
            self.dump.remember()

    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        is_finite: Tensor,
        losses: Mapping[str, Tensor],
        samples: Sequence[Sample],
        step: int,
    ) -> None:
        """Record a step whose gradients are complete and averaged over processes, before the optimizer moves.

        Args:
            is_finite: scalar bool.
            losses: scalars by name, for the message.

        Raises:
            RunError: the step is not finite, and the check not deferred.
        """
        self._recent.append((step, [sample.index for sample in samples]))
        self._names = list(losses)
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._num_bad += ~is_finite | (self._num_bad > 0)
        self._losses = values if self._losses is None else torch.where(self._num_bad <= 1, values, self._losses)
        if not self.is_deferred:
            self.check()
            return
        optimizer.found_inf = (self._num_bad > 0).float()  # type: ignore[attr-defined]  # as `GradScaler` tells it

    def check(self) -> None:
        """Check the steps since the last check, on all processes alike.

        Raises:
            RunError: a step was not finite.
        """
        num_bad = int(self._num_bad)
        recent, self._recent = self._recent, []
        if not num_bad or self._losses is None:
            return
        step, images = recent[-num_bad]
        losses = dict(zip(self._names, self._losses.tolist(), strict=True))
        shown = {name: repr(value) for name, value in losses.items()}  # JSON has no nan
        ranks = gather_objects({"images": images, "losses": shown}, self.process)
        replay = ""
        if self.process.is_main and self.folder is not None:
            write_json(self.folder / FILE, {"step": step, "ranks": ranks})
            if self.dump is not None:
                self.dump.write(step)
                run = f"{self.folder.parent.name}/{run_name(self.folder)}"
                replay = f", or look for the cause: `aligndet replay {run}`"
        values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise RunError(
            f"diverged at step {step}: gradient is not finite ({values}; images {images}); lower --lr{replay}"
        )
