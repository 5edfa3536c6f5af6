"""Reading of checkpoints of any program as plain tensors; code in them is never run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aligndet_cli.backbones.plain import read_plain, require_finite, state_dicts
from aligndet_cli.detectors.checkpoint import KIND
from aligndet_cli.errors import WeightsError


@dataclass(frozen=True)
class Checkpoint:
    """Content of a file.

    Attributes:
        tensors: tensors by their bare names in the file; those of floating point as float32.
        meta: mmdetection's meta data; empty for other programs.
        digest: SHA-256 of the file.
        epoch: number of the last epoch, as the program counts; None if the file does not tell.
    """

    file: Path
    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]
    digest: str = ""
    epoch: int | None = None


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint in any wrapping that `state_dicts` knows.

    Raises:
        WeightsError: the file is missing, damaged, holds more than plain data or numbers that are none, or is ours.
    """
    try:
        content = read_plain(file, str(file))
    except WeightsError:
        if file.suffix == ".pkl" and file.is_file():
            raise WeightsError(_how_to_convert(file)) from None
        raise
    if isinstance(content, Mapping) and content.get("kind") == KIND:
        raise WeightsError(f"{file}: is a detector of aligndet already; use it as it is: finetune --init {file}")
    _, found = next(state_dicts(content), ((), {}))
    if not found:
        raise WeightsError(f"{file}: no tensors in it; save the model's state_dict() with torch.save")
    require_finite(found.items(), str(file))
    tensors = {name: t.detach().float() if t.is_floating_point() else t.detach() for name, t in found.items()}
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    meta, epoch = content.get("meta"), content.get("epoch")
    return Checkpoint(
        file, tensors, meta if isinstance(meta, Mapping) else {}, digest, epoch if type(epoch) is int else None
    )


def _how_to_convert(file: Path) -> str:
    """Return the message about detectron2's pickled arrays."""
    return (
        f"{file}: a pickle, which could run code of others and is not opened; if you trust it, write its arrays as "
        f"tensors: python -c \"import pickle, torch; arrays = pickle.load(open('{file}', 'rb'))['model']; "
        f"torch.save({{name: torch.as_tensor(a) for name, a in arrays.items()}}, '{file.with_suffix('.pth')}')\""
    )
