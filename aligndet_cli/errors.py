"""Errors that users can fix, one class per exit code.

A message is one line that names the place and the next action. Any other exception is a bug of ours and shows its
traceback.
"""

import errno
import re

_NOT_SAYABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return a text that any terminal can show on one line: control characters and half characters are escaped."""
    return _NOT_SAYABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class AlignDetError(Exception):
    """Base of all errors shown to users as one line."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message, in which file names and labels cannot break the line."""
        return one_line(super().__str__())


class RunError(AlignDetError):
    """The run itself failed: out of memory, diverged, disk full."""

    exit_code = 1


class TakenError(RunError):
    """Another process is writing the same artifact, or has just finished it."""


class ConfigError(AlignDetError):
    """Wrong usage or configuration, including refusing to overwrite a finished artifact."""

    exit_code = 2


class ChangedError(ConfigError):
    """A run of that name is there, with other settings or inputs.

    Attributes:
        told: the run and its differences.
    """

    def __init__(self, told: str, remedy: str) -> None:
        super().__init__(told, remedy)
        self.told, self.remedy = told, remedy

    def __str__(self) -> str:
        return one_line(f"{self.told}. Use {self.remedy}")


class DataError(AlignDetError):
    """Something is wrong with the user's images or labels."""

    exit_code = 3


class WeightsError(AlignDetError):
    """A weights file cannot be read or does not fit the model."""

    exit_code = 4


class GateError(AlignDetError):
    """A gate the user asked for was not passed (`--fail-under`, `doctor --strict`)."""

    exit_code = 6


class Preempted(AlignDetError):
    """SIGTERM or SIGUSR1 arrived; everything is saved and the same command continues."""

    exit_code = 75


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


def as_user_error(error: OSError) -> RunError | None:
    """Turn an error of the disk into one that tells the user what to do; None for other errors."""
    place = error.filename or "the place to write to"
    if error.errno in _NO_ROOM:
        return RunError(f"{place}: {error.strerror}; free some space, then run the same command again to continue")
    if error.errno in _NO_ACCESS or error.errno == errno.EIO:
        return RunError(
            f"{place}: {error.strerror}; choose a --workspace or --output that can be written, then run again"
        )
    return None


ERROR_BY_EXIT_CODE: dict[int, type[AlignDetError]] = {
    cls.exit_code: cls for cls in (RunError, ConfigError, DataError, WeightsError, GateError, Preempted)
}
