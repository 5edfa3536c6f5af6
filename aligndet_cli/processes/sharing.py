"""Let several processes work on one artifact at once, on one machine or on several over a shared file system.

Each process holds a shared lock while it works, then tries for the exclusive lock; whoever gets it finishes the
artifact.
"""

import contextlib
import fcntl
import random
import time
from collections.abc import Iterator
from dataclasses import replace

from aligndet_cli.config import StageConfig
from aligndet_cli.errors import TakenError
from aligndet_cli.files import read_json
from aligndet_cli.workspace import Output

_TRIES = 50


@contextlib.contextmanager
def taking_part(output: Output, config: StageConfig) -> Iterator[None]:
    """Join the artifact for the duration of the block, in which nobody can lock it; the first process creates it.

    A partial folder with the same settings and inputs is reused even if this process was told to start over, because
    another process of the same start may have created it.

    Raises:
        TakenError: a process that works alone holds the lock, or the artifact has just been finished.
    """
    with contextlib.ExitStack() as stack:
        for num_left in reversed(range(_TRIES)):
            if not _is_begun(output):
                _refuse_if_finished(output)
            try:
                _begin_if_first(output, config)
                stack.enter_context(output.held(fcntl.LOCK_SH))
                if _is_begun(output):
                    break
                stack.close()
            except TakenError:
                if not num_left:
                    raise
            time.sleep(random.uniform(0.02, 0.1))  # random, because many may start at once
        else:
            raise output.just_finished()
        yield


@contextlib.contextmanager
def locked_if_last(output: Output) -> Iterator[Output | None]:
    """Yield the output, locked and with the time at which the first process began, or None if others still work.

    It is also None once the artifact is finished. Of several processes that leave `taking_part` and then ask, the
    last one gets the output.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(output.held(fcntl.LOCK_EX))
        except TakenError:
            yield None
            return
        if not _is_begun(output):
            yield None
            return
        started = read_json(output.partial / "manifest.json")["started"]
        yield replace(output, header={**output.header, "started": started})


def _begin_if_first(output: Output, config: StageConfig) -> None:
    if _is_begun(output):
        return
    with output.lock():
        if not _is_begun(output):
            output.begin(config)


def _refuse_if_finished(output: Output) -> None:
    """Raise TakenError if the artifact was finished after `output` was planned."""
    manifest = output.folder / "manifest.json"
    if manifest.exists() and read_json(manifest)["finished"] > output.header["started"]:
        raise output.just_finished()


def _is_begun(output: Output) -> bool:
    """Return True if the partial folder is unfinished and has the settings and inputs of `output`."""
    manifest = output.partial / "manifest.json"
    if not manifest.exists():
        return False
    old = read_json(manifest)
    return "finished" not in old and all(old[key] == output.header[key] for key in ("settings", "inputs"))
