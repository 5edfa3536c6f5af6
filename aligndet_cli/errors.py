"""Errors that users can fix, one class per exit code.

A message is one line that names the place and the next action. Any other exception is a bug of ours and shows its
traceback.
"""

import concurrent.futures
import difflib
import errno
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

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


class MissingError(ConfigError):
    """A file of an artifact is not there."""


class ChangedError(ConfigError):
    """A run of that name is there, with other settings or inputs.

    Attributes:
        state: the run, and that it is complete or was interrupted.
        remedy: flags of the stages that help.
        settings, inputs: each difference in words, by dotted path or by name of the input.
        folder: finished or partial folder of the run.
    """

    def __init__(
        self, state: str, remedy: str, settings: Mapping[str, str], inputs: Mapping[str, str], folder: Path
    ) -> None:
        super().__init__(state, remedy, settings, inputs, folder)
        self.state, self.remedy, self.folder = state, remedy, folder
        self.settings, self.inputs = dict(settings), dict(inputs)

    @property
    def told(self) -> str:
        """The run and its differences."""
        inputs = (f"input {change}" for change in self.inputs.values())
        return f"{self.state} with other settings: {'; '.join([*self.settings.values(), *inputs])}"

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
    """SIGTERM, SIGUSR1 or SIGHUP arrived; everything is saved and the same command continues."""

    exit_code = 75


NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NO_ACCESS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NO_FILES = {errno.EMFILE, errno.ENFILE}
_NO_MORE = {errno.EAGAIN}  # of `fork` and of new threads
# These say nothing of the one file that could not be opened.
_OF_MACHINE = _NO_FILES | {errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
# Calls that are wrong whatever the machine: bugs of ours.
_WRONG_CALL = {errno.EBADF, errno.EINVAL, errno.EFAULT, errno.ENOTTY, errno.ESPIPE, errno.ESRCH, errno.ECHILD}
# Neither torch, oneDNN nor OpenCV has an error class for the CPU's memory.
_NO_CPU_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a primitive",
    "bad_alloc",
    "insufficient memory",
    "failed to allocate",
    "failed to map segment",
)
_COMPILERS = ("torch._inductor", "torch._dynamo", "triton")
_GPU = re.compile(r"CUDA (?:driver|error)|cuDNN error|CUDNN_STATUS|NVML|No CUDA GPUs|NVIDIA driver", re.IGNORECASE)
_OUR_KERNELS = re.compile(r"device-side assert|illegal memory access|misaligned address")


def as_user_error(error: BaseException, flags: Collection[str] = ()) -> RunError | None:
    """Turn an error that the machine can cause into one line that tells the user what to do; None for other errors.

    Args:
        flags: flags of the command, e.g. `--workspace`: advice names only these.
    """
    if (kind := memory_that_ran_out(error)) is not None:
        half = ", or use --precision bf16-mixed" if kind == "GPU" and "--precision" in flags else ""
        return RunError(f"out of {kind} memory: {less_memory(flags)}{half}")
    if isinstance(error, OSError):
        return _of_the_system(error, flags)
    if isinstance(error, UnicodeEncodeError):
        return _of_the_locale(error)
    if isinstance(error, concurrent.futures.BrokenExecutor):
        return RunError(
            f"a helper process was killed, most likely because memory ran out: {less_memory(flags)}, "
            "then run the same command again"
        )
    if any(type(one).__module__.startswith(_COMPILERS) for one in _with_causes(error)):
        return RunError(
            f"--compile: torch.compile failed ({_first_line(error)}): it needs a C++ compiler (g++, or the one that "
            "CXX names), on a GPU a C compiler (CC) too; install one, or leave out --compile"
        )
    if isinstance(error, RuntimeError | ImportError):
        return _of_the_machine(error, flags)
    return None


def memory_that_ran_out(error: BaseException) -> Literal["GPU", "CPU"] | None:
    """Return the memory that an error says has run out; None for other errors."""
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):  # torch's, which is not imported here
        return "GPU"
    is_of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_library = isinstance(error, RuntimeError | ImportError) or type(error).__module__ == "cv2"
    is_told = is_library and any(words in str(error).lower() for words in _NO_CPU_MEMORY)
    return "CPU" if isinstance(error, MemoryError) or is_of_system or is_told else None


def is_of_machine(error: Exception) -> bool:
    """Return True if a file cannot be opened because no file can: nobody must take it for damaged and leave it out."""
    return isinstance(error, OSError) and error.errno in _OF_MACHINE


def less_memory(flags: Collection[str]) -> str:
    """Name the flags of a command with which it takes less memory."""
    lower = [flag for flag in ("--batch-size", "--short-side", "--image-size") if flag in flags]
    lower = lower or [flag for flag in ("--num-workers",) if flag in flags]
    if "--accumulate" in flags:
        lower[:1] = [f"{lower[0]} (or raise --accumulate)"]
    return f"lower {' or '.join(lower)}" if lower else "smaller images or batches, or fewer programs at once, need less"


def _of_the_system(error: OSError, flags: Collection[str]) -> RunError | None:
    if error.errno is None or error.errno in _WRONG_CALL:
        return None
    place = error.filename if error.filename not in (None, b"", "") else "a file or folder"
    told = f"{place}: {error.strerror}"
    if error.errno in NO_ROOM:
        return RunError(f"{told}; free some space, then run the same command again to continue")
    if error.errno == errno.EFBIG:
        return RunError(f"{told}; raise the limit on the size of files (ulimit -f), then run the same command again")
    if error.errno in _NO_ACCESS:
        places = [flag for flag in ("--workspace", "--output") if flag in flags]
        return RunError(f"{told}; choose a {' or '.join(places) or 'place'} that can be written, then run again")
    if error.errno in _NO_FILES:
        return RunError(f"{told}; raise the limit (ulimit -n){_or_lower('--num-workers', flags)}")
    if error.errno in _NO_MORE:
        return _no_threads(str(error.strerror), flags)
    if error.errno == errno.ENOENT:
        return RunError(f"{told}; it was moved or deleted, or its drive is gone: put it back, then run again")
    return RunError(f"{told}; check its disk, network drive or connection, then run the same command again")


def _of_the_locale(error: UnicodeEncodeError) -> RunError | None:
    if error.encoding.startswith("utf"):
        return None
    return RunError(f"{error.object!a}: cannot be written in this locale ({error.encoding}); set LC_ALL=C.UTF-8")


def _of_the_machine(error: Exception, flags: Collection[str]) -> RunError | None:
    """Return the error for texts of errors that have no class of their own."""
    text = str(error)
    if "can't start new thread" in text:
        return _no_threads(text, flags)
    if "Too many open files" in text:
        return RunError(f"Too many open files; raise the limit (ulimit -n){_or_lower('--num-workers', flags)}")
    if "Could not determine home directory" in text:
        return RunError("the home folder is not known: set HOME to a folder that can be written")
    if "no locator available" in text:  # numba
        return RunError("compiled code can be kept nowhere: set NUMBA_CACHE_DIR to a folder that can be written")
    if "CUBLAS_WORKSPACE_CONFIG" in text:  # torch does not look again after the first product of matrices
        return RunError(
            "deterministic kernels: this process has multiplied matrices on the GPU without them before: "
            "start it with CUBLAS_WORKSPACE_CONFIG=:4096:8 in its environment"
        )
    if _GPU.search(text) and not _OUR_KERNELS.search(text):
        cpu = ", or use --accelerator cpu" if "--accelerator" in flags else ""
        return RunError(
            f"the GPU cannot be used ({_first_line(error).removeprefix('CUDA error: ')}): look at nvidia-smi{cpu}"
        )
    return None


def _no_threads(reason: str, flags: Collection[str]) -> RunError:
    return RunError(
        f"no further process or thread can be started ({reason}): raise the limit (ulimit -u)"
        f"{_or_lower('--num-workers', flags)}"
    )


def _or_lower(flag: str, flags: Collection[str]) -> str:
    return f", or lower {flag}" if flag in flags else ""


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


ERROR_BY_EXIT_CODE: dict[int, type[AlignDetError]] = {
    cls.exit_code: cls for cls in (RunError, ConfigError, DataError, WeightsError, GateError, Preempted)
}


def did_you_mean(word: str, known: list[str], otherwise: str | None = None) -> str:
    """Return `"; did you mean 'x'?"` if a known word is near, else `otherwise`, or the list of known words."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else otherwise or f"; known: {', '.join(sorted(known))}"
