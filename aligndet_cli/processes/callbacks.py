"""Functions of a Python caller that a training run calls, as it calls a display of progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligndet_cli.errors import ConfigError

OnNumbers = Callable[[int, Mapping[str, Any]], object]
OnFile = Callable[[int, Path], object]


def _ignored(_done: int, _told: Any) -> None:
    return None


@dataclass(frozen=True)
class Callbacks:
    """Functions that the main process of a run calls, each with the number of finished steps first.

    What they raise ends the run, which continues from its last checkpoint when it is asked for again.

    Attributes:
        on_step: after every step, with the losses and the gradient norm by name, as scalar tensors that nobody has
            waited for yet.
        on_log: with the numbers of a line of metrics.jsonl and of speed.jsonl.
        on_evaluate: with the numbers that an evaluation while training found.
        on_checkpoint: with the file of the checkpoint that was just written; the newest two are kept.
    """

    on_step: OnNumbers = _ignored
    on_log: OnNumbers = _ignored
    on_evaluate: OnNumbers = _ignored
    on_checkpoint: OnFile = _ignored


def callbacks_of(**functions: Callable[..., object] | None) -> Callbacks:
    """Return callbacks of the functions that are given.

    Raises:
        ConfigError: one of them is no function.
    """
    given = {name: function for name, function in functions.items() if function is not None}
    for name, function in given.items():
        if not callable(function):
            raise ConfigError(f"{name}: is a {type(function).__name__}; give a function, such as `print`")
    return Callbacks(**given)
