"""Parsed label files, kept as a folder of flat arrays that are mapped into memory the next time.

The folder's name holds size and time of the label file, so a changed label file does not find its old index. A damaged,
unreadable or unwritable index counts as missing.
"""

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.arrays import save_array
from aligndet_cli.files import write_bytes
from aligndet_cli.logs import logger

VERSION = 3
# Smaller label files are parsed in a fraction of a second.
WORTHWHILE_BYTES = 8 * 2**20
# A file that has just changed may change again within the resolution of its time stamp.
_SETTLED_S = 2.0
_CONTENT = "content.json"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class LabelIndex:
    """Index of one state of a label file: a folder with `content.json` and one `.npy` per array.

    Attributes:
        folder: never changed once it exists, so that several processes may use it.
        prefix: start of the folder names of all states of this label file.
        changed_s: time of the last change of the label file, in seconds since 1970.
    """

    folder: Path
    prefix: str
    changed_s: float

    @staticmethod
    def of(label_file: Path, index_dir: Path | None, variant: str) -> "LabelIndex | None":
        """Return the index of a label file; None without an index folder, or if the file is missing or small.

        Args:
            variant: name of the part of the label file that is kept; each part has its own index.
        """
        if index_dir is None:
            return None
        try:
            status = label_file.stat()
        except OSError:
            return None
        if status.st_size < WORTHWHILE_BYTES:
            return None
        key = hashlib.sha256(f"{label_file.resolve()}\0{variant}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
        prefix = f"{label_file.stem}-{variant}-{key}."
        state = f"{VERSION}-{status.st_size:x}-{status.st_mtime_ns:x}"
        return LabelIndex(index_dir / (prefix + state), prefix, status.st_mtime)

    def load(self) -> tuple[dict[str, Any], Arrays] | None:
        """Return the saved JSON value and read-only maps of the arrays; None if they cannot be read."""
        try:
            if not self.folder.exists():
                return None
            content = dict(json.loads((self.folder / _CONTENT).read_bytes()))
            return content, {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in content["arrays"]}
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            logger.debug(f"{self.folder}: not used ({error or type(error).__name__}); labels are read anew")
            _remove(self.folder)
            return None

    def save(self, content: Mapping[str, Any], arrays: Arrays) -> None:
        """Write the index, all or nothing, and remove older states; several processes may do so at once."""
        if abs(time.time() - self.changed_s) < _SETTLED_S:
            return
        temporary = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.mkdir(parents=True)
            for name, array in arrays.items():
                save_array(temporary / f"{name}.npy", array)
            write_bytes(temporary / _CONTENT, json.dumps({**content, "arrays": list(arrays)}).encode())
            for older in self.folder.parent.iterdir():
                if older.name.startswith(self.prefix) and older != self.folder:
                    _remove(older)
            temporary.rename(self.folder)
        except OSError as error:  # ... or another process was faster
            logger.debug(f"{self.folder}: cannot be written ({error}); labels will be read anew next time")
        finally:
            _remove(temporary)


def _remove(place: Path) -> None:
    """Remove a folder, or the single file that an index was in version 1; ignore errors."""
    with contextlib.suppress(OSError):
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
