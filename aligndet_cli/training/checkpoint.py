"""Save and load the state of an interrupted run. A checkpoint is written completely or not at all."""

import io
import sys
from pathlib import Path
from typing import Any

import torch

from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import check_parts, refuse_newer, write_bytes

KEPT = 2
# To be raised when the same settings would lead to other steps after a checkpoint; 2: batches of one orientation.
VERSION = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after `step` finished steps, delete all but the newest two checkpoints, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{step:09d}.pt"
    write_bytes(file, serialise({"version": VERSION, **state}))
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        old.unlink()
    return file


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Read the newest checkpoint as `(finished steps, state)` on the CPU; None if there is none.

    Raises:
        WeightsError: the file cannot be read.
        ConfigError: an older version of the program began the run and would have gone on differently, or a newer one
            wrote the file.
    """
    files = sorted(folder.glob("step-*.pt"))
    if not files:
        return None
    try:
        check_parts(files[-1])
        state = torch.load(files[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{files[-1]}: cannot be read ({type(error).__name__}); delete it to go on from the one before"
        ) from error
    version = state.pop("version", 1)
    refuse_newer(files[-1], version, VERSION, ConfigError)
    if version < VERSION:
        raise ConfigError(
            f"{folder.parent}: was begun by an older aligndet, with another order of images, so its "
            "end would be neither's: --no-resume begins again"
        )
    return int(files[-1].stem.removeprefix("step-")), state


def serialise(state: dict[str, Any]) -> bytes:
    """Return the bytes of `torch.save`, equal for equal states (writing to a file would put its name into them)."""
    buffer = io.BytesIO()
    torch.save(_rebuilt(state), buffer)
    return buffer.getvalue()


def _rebuilt(value: Any) -> Any:
    """Copy the state so that equal strings are one object and no two containers are.

    Pickle writes an object that it has met before as a reference. Without this, the bytes would depend on which equal
    parts are the same object, and that depends on whether the config came from another process.
    """
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_rebuilt(key): _rebuilt(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rebuilt(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_rebuilt(item) for item in value)
    return value
