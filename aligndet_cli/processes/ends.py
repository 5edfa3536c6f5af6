"""Say in one line why a process that this one started has ended, or could not be started."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from aligndet_cli.errors import RunError

_NO_MEMORY = "most likely by the system because memory ran out"
FULL_SHARED_MEMORY = "shared memory (/dev/shm) is full: start the container with more (docker run --shm-size 8g), or "


def describe_end(exit_code: int | None, cheaper: str) -> str:
    """Return how a process ended that should not have ended, and what helps.

    Args:
        exit_code: as of `multiprocessing.Process`: negative for a signal; None if nobody knows.
        cheaper: advice on memory, such as `lower --batch-size`.
    """
    if exit_code == -signal.SIGKILL:
        return f"was killed, {_NO_MEMORY}: {cheaper}"
    if exit_code is not None and exit_code < 0:
        return f"crashed ({_name_of(-exit_code)})"
    code = "" if exit_code is None else f" (exit code {exit_code})"
    hiding = hidden_modules()
    if hiding:
        return f"ended by itself{code}: {hiding[0]} hides a module of Python's own: run the command in another folder"
    return f"ended by itself{code}; its reason is above, if it gave one"


def hidden_modules(folder: Path | None = None) -> list[Path]:
    """Return the files of a folder, by default the current one, that have the name of a module of Python's own."""
    try:
        files = sorted((folder or Path.cwd()).glob("*.py"))
    except OSError:
        return []
    return [file for file in files if file.stem in sys.stdlib_module_names]


@contextlib.contextmanager
def starting_processes(otherwise: str) -> Iterator[None]:
    """Turn what an environment can do to the start of processes into a RunError.

    Args:
        otherwise: advice that needs no further processes, such as `use --num-workers 0`.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            raise RunError(FULL_SHARED_MEMORY + otherwise) from error
        if "AF_UNIX path too long" in str(error):
            raise RunError(f"the path of TMPDIR is too long for sockets: set it to /tmp, or {otherwise}") from error
        if error.errno in (errno.EAGAIN, errno.EMFILE, errno.ENFILE):
            limits = "raise the limits (ulimit -u, ulimit -n)"
            raise RunError(f"cannot start a process: {error.strerror}: {limits}, or {otherwise}") from error
        raise


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
