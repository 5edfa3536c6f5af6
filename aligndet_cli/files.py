"""Files of ours: JSON and bytes, written all or nothing; hashes; locks."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from aligndet_cli.errors import AlignDetError, ConfigError, MissingError, RunError

_LOCK_TRIES = 5  # somebody who only looks whether a file is locked (`status`) has it for a moment


def read_json(file: Path) -> Any:
    """Return the parsed content of a JSON file of ours.

    Raises:
        MissingError: there is none.
        ConfigError: not readable as JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{file}: missing; delete its folder and run the stage again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: damaged ({error}); delete its folder and run the stage again") from None


def refuse_newer(place: Path, found: Any, known: int, error: type[AlignDetError]) -> None:
    """Make sure that this program knows the format of what it reads.

    Args:
        found: the number that was written; what has none is of format 1, for which callers pass 1.
        known: the newest format that this program reads.

    Raises:
        error: a newer aligndet wrote it.
    """
    if not isinstance(found, int) or found > known:
        raise error(f"{place}: written by a newer aligndet (format {found}): upgrade")


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one, never half of one."""
    write_bytes(file, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(file: Path, *parts: bytes | memoryview) -> None:
    """Write a file atomically: temporary name, fsync, rename. Pipes and devices (`/dev/stdout`) stay what they are."""
    if file.exists() and not file.is_file():
        file.write_bytes(b"".join(parts))
        return
    if file.is_symlink():
        file = file.resolve()
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with naming(file), temporary.open("wb") as handle:
            handle.writelines(parts)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError:  # a full disk needs the space
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Let an error of the system in the block name the file that is written: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def check_output_file(file: Path) -> None:
    """Make sure, before any work, that a file named by `--output` can be written and is no part of an artifact.

    Raises:
        ConfigError: it cannot, or is.
    """
    if str(file) == "-":
        raise ConfigError("--output -: name a file; what goes to stdout is printed without --output")
    if file.is_dir():
        raise ConfigError(f"--output {file}: is a folder; name a file")
    if not file.parent.is_dir():
        raise ConfigError(f"--output {file}: no such folder as {file.parent}")
    if (file.parent / "manifest.json").exists():
        raise ConfigError(f"--output {file}: {file.parent} is a finished run; name a file elsewhere")


def check_parts(file: Path) -> None:
    """Make sure that the parts of a zip archive, such as one of `torch.save`, have their checksums.

    `torch.load` does not look: with one bit of a weight changed, it would load another weight.

    Raises:
        BadZipFile: one has not.
    """
    with zipfile.ZipFile(file) as archive:
        if (part := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{part} differs from its checksum")


def hash_files(files: Sequence[Path]) -> str:
    """Return a hex digest over names and bytes of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def try_lock(handle: IO[Any], kind: int) -> bool:
    """Lock an open file with `LOCK_EX` or `LOCK_SH` until it is closed; False if another process has it.

    Raises:
        RunError: the file system has no locks.
    """
    for num_left in reversed(range(_LOCK_TRIES)):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05 if num_left else 0)
        except OSError as error:
            raise RunError(
                f"{handle.name}: cannot be locked ({error.strerror}); mount this file system with locks, "
                "or choose another --workspace"
            ) from None
        else:
            return True
    return False


def is_locked(file: Path) -> bool:
    """Return True if a live process holds a lock file."""
    try:
        with file.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_still(file: Path, handle: IO[str]) -> bool:
    """Return True if an open file is still the one of that name."""
    try:
        return file.stat().st_ino == os.fstat(handle.fileno()).st_ino
    except FileNotFoundError:
        return False
