"""Gradients that are no longer finite: noticed before they do harm, at no cost to a GPU that is busy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.files import write_json
from aligndet_cli.processes.collectives import gather_objects
from aligndet_cli.processes.devices import Process

FILE = "diverged.json"


class Divergence:
    """Watches the gradient norm of every step.

    Asking a GPU for a number waits for all that it still has to do. There the optimizer is told on the device not to
    move any more, and `check` asks later on: no update is made from the first bad step on (of float16 runs: in the
    bad steps themselves, by the gradient scaler).

    Args:
        folder: where the bad step and its images are written down, if anywhere.
        is_deferred: whether to ask in `check` only; the optimizer has to be a fused one.
    """

    def __init__(self, process: Process, folder: Path | None, *, is_deferred: bool) -> None:
        self.process, self.folder, self.is_deferred = process, folder, is_deferred
        self._recent: list[tuple[int, list[int]]] = []  # step and images, since the last check
        self._names: list[str] = []
        self._num_bad = torch.zeros((), device=process.device)  # steps from the first bad one on
        self._losses: Tensor | None = None  # of the first bad step, or of the last one

    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        is_finite: Tensor,
        losses: Mapping[str, Tensor],
        samples: Sequence[Sample],
        step: int,
    ) -> None:
        """Look at a step whose gradients are complete and averaged over processes, before the optimizer moves.

        Args:
            is_finite: scalar bool.
            losses: scalars by name, for the message.

        Raises:
            RunError: not finite (where nothing is deferred).
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
        """Stop the run, on all processes in the same step, if a step since the last check was not finite.

        Raises:
            RunError: naming the step, its losses and images.
        """
        num_bad = int(self._num_bad)
        recent, self._recent = self._recent, []
        if not num_bad or self._losses is None:
            return
        step, images = recent[-num_bad]
        losses = dict(zip(self._names, self._losses.tolist(), strict=True))
        shown = {name: repr(value) for name, value in losses.items()}  # JSON has no nan
        ranks = gather_objects({"images": images, "losses": shown}, self.process)
        if self.process.is_main and self.folder is not None:
            write_json(self.folder / FILE, {"step": step, "ranks": ranks})
        values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise RunError(f"diverged at step {step}: gradient is not finite ({values}; images {images}); lower --lr")
