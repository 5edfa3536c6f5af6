"""Time of the parts of a training step, from hooks around its modules."""

import time
from functools import partial
from typing import Any

import torch
from torch import nn

PARTS = ("data", "views", "backbone", "neck and heads", "matching and losses", "backward", "optimizer")


class StepClock:
    """Splits the time of steps into `PARTS`. The model is a detector, or a pretext with its two detectors.

    Every hook ends the running lap, so the parts add up to the whole. On a GPU a lap ends when the GPU has finished it.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._is_cuda = next(model.parameters()).is_cuda
        self._depth = 0
        self._handles: list[Any] = [
            model.register_forward_pre_hook(partial(self.lap, "views")),
            model.register_forward_hook(partial(self.lap, "matching and losses")),
            optimizer.register_step_pre_hook(partial(self.lap, "backward")),
        ]
        for module in model.modules():
            # Modules without parameters belong to the matching: anchors, points.
            if module is not model and any(True for _ in module.parameters()):
                leave = partial(self.leave, "backbone" if module is backbone else "neck and heads")
                self._handles += [module.register_forward_pre_hook(self.enter), module.register_forward_hook(leave)]
        self.start()

    def start(self) -> None:
        """Begin a lap."""
        self._last = self._now()

    def lap(self, part: str, *_: Any) -> None:
        """Add the time since the last lap to a part; arguments of a hook are ignored."""
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def enter(self, *_: Any) -> None:
        """Begin a part; arguments of a hook are ignored."""
        if self._depth == 0:
            self.lap("matching and losses")
        self._depth += 1

    def leave(self, part: str, *_: Any) -> None:
        """End a part; those within others count as the outermost."""
        self._depth -= 1
        if self._depth == 0:
            self.lap(part)

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
