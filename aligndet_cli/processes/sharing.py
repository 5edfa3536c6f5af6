"""Several processes that work on one artifact at once, on one machine or on several over a shared file system.

Everybody is in while it works, then asks whether it was the last; the last one finishes the artifact.
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
    """Be in for the time of the block; whoever comes first begins the artifact. Nobody gets its `lock` meanwhile.

    A partial folder with the same settings and inputs is taken up also where this process was to start over: what is
    in it may be the others' part of the same start.

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
            time.sleep(random.uniform(0.02, 0.1))  # many that start at once get in each other's way
        else:
            raise output.just_finished()
        yield


@contextlib.contextmanager
def locked_if_last(output: Output) -> Iterator[Output | None]:
    """The output, locked and with the begin of whoever was first; None while others are in or once it is finished.

    Of several that leave `taking_part` and then ask, the last one gets it, and only one at a time.
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
    """Raise TakenError where the artifact was finished after `output` was planned."""
    manifest = output.folder / "manifest.json"
    if manifest.exists() and read_json(manifest)["finished"] > output.header["started"]:
        raise output.just_finished()


def _is_begun(output: Output) -> bool:
    """Whether the partial folder is that of this very artifact, and unfinished."""
    manifest = output.partial / "manifest.json"
    if not manifest.exists():
        return False
    old = read_json(manifest)
    return "finished" not in old and all(old[key] == output.header[key] for key in ("settings", "inputs"))
