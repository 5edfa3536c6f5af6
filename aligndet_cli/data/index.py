"""Parsed label files, kept as flat arrays in one file that is mapped into memory the next time.

An index is a copy: it is believed only while the label file has the size and time it had when it was read, and one
that is stale, damaged, unreadable or cannot be written is as good as none.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.training.logs import logger

VERSION = 1
# Smaller label files are parsed in a fraction of a second.
WORTHWHILE_BYTES = 8 * 2**20
# Not checked against bit errors: the text of masks is most of the bytes, and is read where an image is used.
UNCHECKED = frozenset({"segmentation_text"})
_ALIGNMENT = 64
_MAGIC = b"aligndet index\n"
# A file that has just changed may change again within the resolution of its time stamp.
_SETTLED_S = 2.0

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class IndexFile:
    """Where the index of a label file is, and which state of the label file it must be of."""

    path: Path
    stamp: dict[str, Any]

    @staticmethod
    def of(label_file: Path, folder: Path | None, variant: str) -> "IndexFile | None":
        """None where no folder is given, or the label file is missing or too small to be worth it.

        Args:
            variant: what of the label file is kept; each has its own index.
        """
        if folder is None:
            return None
        try:
            status = label_file.stat()
        except OSError:
            return None
        if status.st_size < WORTHWHILE_BYTES:
            return None
        key = hashlib.sha256(f"{label_file.resolve()}\0{variant}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
        stamp = {"version": VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        return IndexFile(folder / f"{label_file.stem}-{variant}-{key}.index", stamp)

    def load(self) -> tuple[dict[str, Any], Arrays] | None:
        """What was saved: a JSON value and read-only maps of the arrays; None where that cannot be had."""
        try:
            return self._load()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.debug(f"{self.path}: not used ({error or type(error).__name__}); labels are read anew")
            return None

    def save(self, content: Mapping[str, Any], arrays: Arrays) -> None:
        """Write it, all or nothing; several processes may do so at once."""
        if abs(time.time() - self.stamp["mtime_ns"] / 1e9) < _SETTLED_S:
            return
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                _write(handle, {"stamp": self.stamp, "content": dict(content)}, arrays)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(self.path)
        except OSError as error:
            logger.debug(f"{self.path}: cannot be written ({error}); labels will be read anew next time")
            _remove(temporary)
        except BaseException:  # asked to stop
            _remove(temporary)
            raise

    def _load(self) -> tuple[dict[str, Any], Arrays]:
        with self.path.open("rb") as handle:
            if handle.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("not an index")
            header = json.loads(handle.read(int(handle.readline())))
            start = handle.tell()
        if header["stamp"] != self.stamp:
            raise ValueError("the labels have changed")
        arrays = {entry["name"]: _map(self.path, start, entry) for entry in header["arrays"]}
        return header["content"], arrays


def _write(handle: Any, header: dict[str, Any], arrays: Arrays) -> None:
    entries, position = [], 0
    for name, array in arrays.items():
        entry = {"name": name, "dtype": array.dtype.str, "shape": array.shape, "offset": position}
        entries.append({**entry, "crc": None if name in UNCHECKED else zlib.crc32(_bytes_of(array))})
        position += array.nbytes + -array.nbytes % _ALIGNMENT
    text = json.dumps({**header, "arrays": entries}).encode()
    # Padded with spaces, so that the arrays start at a multiple of the alignment.
    length = len(text) + -(len(_MAGIC) + 9 + len(text)) % _ALIGNMENT
    handle.write(_MAGIC + b"%08d\n" % length + text.ljust(length))
    for array in arrays.values():
        handle.write(_bytes_of(array))
        handle.write(bytes(-array.nbytes % _ALIGNMENT))


def _map(file: Path, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    array = np.memmap(file, dtype, "r", start + entry["offset"], shape)
    if entry["crc"] is not None and zlib.crc32(_bytes_of(array)) != entry["crc"]:
        raise ValueError(f"'{entry['name']}' is damaged")
    return array


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:  # whatever kept it from being written
        logger.debug(f"{file}: left behind")
