"""Run one function on one process or many: spawned by torch's elastic launcher, or joined under torchrun and Slurm."""

import contextlib
import datetime
import json
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from aligndet_cli.errors import ERROR_BY_EXIT_CODE, AlignDetError, Preempted, RunError, as_user_error, less_memory
from aligndet_cli.logs import ProgressMode, setup_logging
from aligndet_cli.processes.devices import Devices, Process, joined_world_size, own_device
from aligndet_cli.processes.memory import keep_freed_memory
from aligndet_cli.processes.signals import Stopped, helpers_ignore_sigusr1, ignore_stopping, stop_at_once
from aligndet_cli.processes.slurm import torch_variables

PlanT = TypeVar("PlanT")
_INTERRUPTED = 130  # exit code after Ctrl-C


@dataclass(frozen=True)
class Shown:
    """Display settings of the command, and its flags, which messages may name; passed to spawned processes."""

    progress: ProgressMode = "auto"
    verbosity: int = 0
    flags: frozenset[str] = frozenset()


def launch(run: Callable[[Any, Process], None], plan: Any, devices: Devices, shown: Shown) -> None:
    """Call `run(plan, process)` on every process of `devices` and return when all are done.

    Each process first applies `plan.config.runtime.deterministic`.

    Raises:
        AlignDetError: the error that the first failing process reported.
    """
    if joined_world_size() is not None:
        run_here(run, plan, _joined_process(devices, shown))
        return
    if devices.world_size == 1:
        run_here(run, plan, Process(device=devices.first, progress=shown.progress, flags=shown.flags))
        return
    _spawn(run, plan, devices, shown)


@contextlib.contextmanager
def one_for_all(devices: Devices) -> Iterator[Callable[[Callable[[], PlanT]], PlanT]]:
    """Yield a function that calls `prepare` on rank 0 alone and returns its plan, or raises its error, on every rank.

    Without torchrun or Slurm, that function just calls `prepare`.
    """
    if joined_world_size() is None:
        yield lambda prepare: prepare()
        return
    import torch.distributed as dist

    _init_process_group(devices)
    try:
        yield _prepare_on_main
    finally:
        dist.destroy_process_group()


def _prepare_on_main(prepare: Callable[[], PlanT]) -> PlanT:
    import torch.distributed as dist

    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = prepare()
        except AlignDetError as error:
            message[1] = (error.exit_code, str(error))
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        code, text = message[1]
        raise ERROR_BY_EXIT_CODE[code](text)
    return message[0]


def run_here(run: Callable[[Any, Process], None], plan: Any, process: Process) -> None:
    """Call `run(plan, process)` in this process, after setting up memory and determinism."""
    import torch
    import torch.utils.deterministic

    if process.device == "cpu":
        keep_freed_memory()
    if process.device == "cpu" or plan.config.runtime.deterministic:
        # On the CPU too, where it costs nothing: several threads would add up repeated indices in any order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch does not declare it
        torch.backends.cudnn.benchmark = False
    try:
        run(plan, process)
    except RuntimeError as error:
        if process.world_size > 1 and _is_lost_connection(error):
            if "timed out" in str(error).lower():
                minutes = plan.config.runtime.timeout_minutes
                raise RunError(
                    f"rank {process.rank}: waited {minutes:g} minutes for another process of the run, which hangs; "
                    "run the same command to continue (--set runtime.timeout_minutes to wait longer)"
                ) from None
            raise _LostPartner(f"rank {process.rank}: another process of the run is gone; see what it says") from None
        raise


class _LostPartner(RunError):
    """Another process ended, so this one had to; another process reports the cause."""


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _joined_process(devices: Devices, shown: Shown) -> Process:
    import torch.distributed as dist

    rank = dist.get_rank()
    progress = shown.progress if rank == 0 else "none"
    return Process(rank, dist.get_world_size(), own_device(devices), progress, shown.flags)


def _init_process_group(devices: Devices) -> None:
    """Join the group of processes that torchrun's variables describe, or Slurm's."""
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        for name, value in torch_variables(os.environ).items():
            os.environ.setdefault(name, value)
    if devices.kind == "cuda":
        torch.cuda.set_device(torch.device(own_device(devices)))
    timeout = datetime.timedelta(minutes=devices.timeout_minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if devices.kind == "cuda" else "gloo", timeout=timeout)


def _spawn(run: Callable[[Any, Process], None], plan: Any, devices: Devices, shown: Shown) -> None:
    import torch.distributed.elastic.multiprocessing.api as elastic_api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch logs many lines about a process that failed; ours is enough.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with helpers_ignore_sigusr1():
        multiprocessing.resource_tracker.ensure_running()
    with tempfile.TemporaryDirectory(prefix="aligndet-") as reports, _signals_passed_on() as received:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            run_id=f"aligndet-{os.getpid()}",
            nproc_per_node=devices.per_node,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # these end the workers, after 30 s at the latest
        )
        try:
            elastic_launch(config, _worker)(run, plan, devices, shown, Path(reports))
        except (ChildFailedError, elastic_api.SignalException) as error:
            raise _root_cause(Path(reports), error, received, shown) from None


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[list[str]]:
    """Pass SIGTERM and SIGUSR1 on to the workers, who may take any time to save; yields the names received so far."""
    received: list[str] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        workers = multiprocessing.active_children()
        if not workers:
            raise Stopped(received[0])
        for worker in workers:
            worker.terminate()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _worker(run: Callable[[Any, Process], None], plan: Any, devices: Devices, shown: Shown, reports: Path) -> None:
    """Join the group and run, in a spawned process; write a report if that fails."""
    stop_at_once()
    import torch
    import torch.distributed as dist

    setup_logging(shown.verbosity)
    world_size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if devices.kind == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // world_size, 1))
    try:
        try:
            _init_process_group(devices)
            run_here(run, plan, _joined_process(devices, shown))
            dist.destroy_process_group()
        finally:
            ignore_stopping()  # when one has failed, the launcher sends SIGTERM to the others
    except _LostPartner:
        sys.exit(RunError.exit_code)
    except KeyboardInterrupt:  # from the terminal, or because the command itself was killed
        os._exit(_INTERRUPTED)  # at once: the signal may come twice, from the terminal and from the launcher
    except Stopped as stop:
        _report(reports, local_rank, Preempted(str(stop)))
    except AlignDetError as error:
        _report(reports, local_rank, error)
    except Exception as error:
        known = as_user_error(error, shown.flags)
        if known is None:
            traceback.print_exc()
        _report(reports, local_rank, known or RunError(f"rank {local_rank}: {type(error).__name__}: {error}"))


def _report(reports: Path, rank: int, error: AlignDetError) -> None:
    with contextlib.suppress(FileNotFoundError):  # the command is gone already
        (reports / f"{rank}.json").write_text(json.dumps({"exit_code": error.exit_code, "message": str(error)}))
    sys.exit(error.exit_code)


def _root_cause(reports: Path, error: BaseException, received: list[str], shown: Shown) -> BaseException:
    """Return the error of the process that failed first; the others only lost their partner.

    Args:
        received: names of the signals that were passed on.
    """
    failures = getattr(error, "failures", {})
    was_killed = not received and any(failure.exitcode == -signal.SIGKILL for failure in failures.values())
    for file in sorted(reports.glob("*.json"), key=lambda file: file.stat().st_mtime):
        report = json.loads(file.read_text())
        # If one was killed, the others report a stop because the launcher asked them to.
        if not (was_killed and report["exit_code"] == Preempted.exit_code):
            return ERROR_BY_EXIT_CODE[report["exit_code"]](report["message"])
    number = getattr(error, "sigval", None)
    if number == signal.SIGINT or any(failure.exitcode == _INTERRUPTED for failure in failures.values()):
        return KeyboardInterrupt()
    if number is not None:
        received = [*received, signal.Signals(number).name]
    if received:  # before the workers could listen
        return Preempted(str(Stopped(received[0])))
    killed = [rank for rank, failure in failures.items() if failure.exitcode == -signal.SIGKILL]
    if killed:
        return RunError(
            f"a training process was killed (rank {killed[0]}), most likely by the system because memory ran out: "
            f"{less_memory(shown.flags)}, or run the same command to continue"
        )
    codes = ", ".join(f"rank {rank} exit code {failure.exitcode}" for rank, failure in failures.items())
    return RunError(f"a training process died ({codes or error}); run the same command to continue")
