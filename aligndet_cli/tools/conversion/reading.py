"""Reading of checkpoints of any program as plain tensors; code in them is never run."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndet_cli.detectors.checkpoint import KIND
from aligndet_cli.errors import WeightsError

NESTING_KEYS = ("state_dict", "model")


@dataclass(frozen=True)
class Checkpoint:
    """Content of a file.

    Attributes:
        tensors: tensors by their names in the file; those of floating point as float32.
        meta: mmdetection's meta data; empty for other programs.
        digest: SHA-256 of the file.
    """

    file: Path
    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]
    digest: str = ""


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint, whose tensors may be nested in `state_dict` or `model`.

    Raises:
        WeightsError: the file is missing, damaged, holds more than tensors and plain settings, or is one of ours.
    """
    if not file.is_file():
        raise WeightsError(f"{file}: no such file; name a checkpoint (.pth)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DETR saves its options too
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        if file.suffix == ".pkl":
            raise WeightsError(_how_to_convert(file)) from None
        reason = str(error).split("\n", maxsplit=1)[0].split(". ", maxsplit=1)[0] or type(error).__name__
        raise WeightsError(
            f"{file}: not a readable PyTorch file of plain tensors ({reason}); get it again, or save just the model's "
            "state_dict() with torch.save"
        ) from None
    outer = content if isinstance(content, dict) else {}
    if outer.get("kind") == KIND:
        raise WeightsError(f"{file}: is a detector of aligndet already; use it as it is: finetune --init {file}")
    inner = next((outer[key] for key in NESTING_KEYS if isinstance(outer.get(key), dict)), outer)
    tensors = {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in inner.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise WeightsError(f"{file}: no tensors in it; save the model's state_dict() with torch.save")
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    meta = outer.get("meta")
    return Checkpoint(file, tensors, meta if isinstance(meta, dict) else {}, digest)


def _how_to_convert(file: Path) -> str:
    """Return the message about detectron2's pickled arrays."""
    return (
        f"{file}: a pickle, which could run code of others and is not opened; if you trust it, write its arrays as "
        f"tensors: python -c \"import pickle, torch; arrays = pickle.load(open('{file}', 'rb'))['model']; "
        f"torch.save({{name: torch.as_tensor(a) for name, a in arrays.items()}}, '{file.with_suffix('.pth')}')\""
    )
