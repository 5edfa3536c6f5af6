"""Ends a training command at a named moment of its work, and keeps what the end of a run deletes.

Set up inside the forked process of a command; see `forkserver.py` and `tests/e2e/test_matrix.py`. Of the
package, only `detect` and `StreamSampler` are wrapped; all else is seen by hooks of torch and of Python.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import aligndet_cli.detectors  # noqa: F401  # so that all detectors are defined
from aligndet_cli.data.loaders import StreamSampler
from aligndet_cli.detectors.interface import Detector
from helpers.narrow import narrow_backbones

MOMENTS = ("mid-epoch", "end of an epoch", "evaluating", "saving")


def prepare(kept: Path, moment: str | None = None, step: int = 0, number: int = 0) -> None:
    """Make backbones narrow, keep checkpoints and the order of images in a folder, and send a signal at a moment.

    Args:
        step: 1-based, in which the signal `number` comes; None as moment runs to the end.
    """
    narrow_backbones.start()
    kept.mkdir(parents=True, exist_ok=True)
    _keep_checkpoints(kept)
    _note_images(kept)
    if moment is not None:
        _send_at(moment, step, number)


def _send_at(moment: str, step: int, number: int) -> None:
    """Send a signal to this process group, once, at a moment."""
    begun, is_sent = 0, False

    def send() -> None:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            os.killpg(0, number)

    def before_update(*_: object) -> None:
        nonlocal begun
        begun += 1
        if moment == "mid-epoch" and begun == step:
            send()

    def after_update(_optimizer: Optimizer, *_: object) -> None:
        if moment == "end of an epoch" and begun == step:
            send()

    def before_change(event: str, arguments: tuple[Any, ...]) -> None:
        # The checkpoint is whole, but has a temporary name.
        if moment == "saving" and event == "os.rename" and Path(arguments[1]).name == f"step-{step:09d}.pt":
            send()

    register_optimizer_step_pre_hook(before_update)
    register_optimizer_step_post_hook(after_update)
    sys.addaudithook(before_change)
    _before_detection(lambda: send() if moment == "evaluating" and begun == step else None)


def _before_detection(action: Callable[[], None]) -> None:
    """Call an action before every call of `detect`, whatever the detector."""

    def announced(detect: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            action()
            return detect(*arguments)

        return call

    pending: list[Any] = [Detector]
    while pending:
        detector = pending.pop()
        pending += detector.__subclasses__()
        if "detect" in vars(detector):
            detector.detect = announced(detector.detect)


def _keep_checkpoints(kept: Path) -> None:
    """Link every checkpoint into a folder before it is deleted."""

    def keep(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.remove", "shutil.rmtree"):
            return
        place = Path(arguments[0])
        for file in place.glob("step-*.pt") if place.name == "resume" else [place]:
            if file.parent.name == "resume" and file.match("step-*.pt"):
                os.link(file, kept / file.name)

    sys.addaudithook(keep)


def _note_images(kept: Path) -> None:
    """Write `[step, rank, places]` for every batch of the training; views are drawn for pictures after it."""
    draw = StreamSampler.__iter__

    def noted(self: StreamSampler) -> Iterator[list[tuple[int, int]]]:
        StreamSampler.__iter__ = draw  # type: ignore[method-assign]
        with (kept / f"images-{self.process.rank}.jsonl").open("a") as lines:
            for step, places in enumerate(draw(self), start=self.start_step):
                print(json.dumps([step, self.process.rank, places]), file=lines, flush=True)
                yield places

    StreamSampler.__iter__ = noted  # type: ignore[method-assign]
