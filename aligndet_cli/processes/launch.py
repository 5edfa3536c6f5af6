"""Run one function on one process or many: spawned by torch's elastic launcher, or joined under torchrun and Slurm."""

import contextlib
import json
import logging
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from aligndet_cli.errors import (
    ERROR_BY_EXIT_CODE,
    AlignDetError,
    ConfigError,
    Preempted,
    RunError,
    as_user_error,
    less_memory,
)
from aligndet_cli.logs import ProgressMode, setup_logging
from aligndet_cli.processes.callbacks import Callbacks
from aligndet_cli.processes.devices import Devices, Process, joined_world_size, own_device
from aligndet_cli.processes.ends import describe_end, starting_processes
from aligndet_cli.processes.memory import keep_freed_memory
from aligndet_cli.processes.signals import (
    PREEMPTION,
    SAME_REQUEST_S,
    Stopped,
    handled_by,
    helpers_ignore_stopping,
    ignore_stopping,
    is_ignored,
    note_handled,
    stop_at_once,
)

PlanT = TypeVar("PlanT")
_INTERRUPTED = 130  # exit code after Ctrl-C
_NOTICE_S = 10.0  # the launcher looks at its processes every 0.1 s, unless the machine is very busy
_FATAL = (signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Shown:
    """Display settings of the command, its flags, which messages may name, and a Python caller's functions.

    All of it is passed to spawned processes, into which only functions of modules can go.
    """

    progress: ProgressMode = "auto"
    verbosity: int = 0
    flags: frozenset[str] = frozenset()
    callbacks: Callbacks = Callbacks()


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
        run_here(run, plan, Process(0, 1, devices.first, shown.progress, shown.flags, shown.callbacks))
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

    from aligndet_cli.processes.joining import init_process_group, lost_partners

    init_process_group(devices)
    try:
        with lost_partners(devices.timeout_minutes):
            yield _prepare_on_main
    finally:
        dist.destroy_process_group()


def _prepare_on_main(prepare: Callable[[], PlanT]) -> PlanT:
    import torch.distributed as dist

    from aligndet_cli.processes.collectives import value_of_main

    plan, problem = None, None
    if dist.get_rank() == 0:
        try:
            plan = prepare()
        except AlignDetError as error:
            problem = (error.exit_code, str(error))
    plan, problem = value_of_main((plan, problem))
    if problem is not None:
        code, text = problem
        raise ERROR_BY_EXIT_CODE[code](text)
    return plan


def ask_for_deterministic_products() -> None:
    """Ask cuBLAS for products that are the same each time.

    torch looks once in a process, at the first product on a GPU: before `--batch-size auto` tries steps there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def run_here(run: Callable[[Any, Process], None], plan: Any, process: Process) -> None:
    """Call `run(plan, process)` in this process, after setting up memory and determinism."""
    import torch
    import torch.utils.deterministic

    if process.device == "cpu":
        keep_freed_memory()
    if process.device == "cpu" or plan.config.runtime.deterministic:
        # On the CPU too, where it costs nothing: several threads would add up repeated indices in any order.
        ask_for_deterministic_products()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch does not declare it
        torch.backends.cudnn.benchmark = False
    if process.world_size == 1:
        run(plan, process)
        return
    from aligndet_cli.processes.joining import lost_partners

    with lost_partners(plan.config.runtime.timeout_minutes):
        run(plan, process)


def _joined_process(devices: Devices, shown: Shown) -> Process:
    import torch.distributed as dist

    rank = dist.get_rank()
    progress, callbacks = (shown.progress, shown.callbacks) if rank == 0 else ("none", Callbacks())
    return Process(rank, dist.get_world_size(), own_device(devices), progress, shown.flags, callbacks)


def _spawn(run: Callable[[Any, Process], None], plan: Any, devices: Devices, shown: Shown) -> None:
    import torch.distributed.elastic.multiprocessing.api as elastic_api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_callbacks(shown.callbacks)
    # torch logs many lines about a process that failed; ours is enough.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with helpers_ignore_stopping():
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
            # These end the workers, after 30 s at the latest; the others are passed on.
            signals_to_handle=",".join(number.name for number in _FATAL if not is_ignored(number)),
        )
        try:
            with starting_processes("use --devices 1"):
                elastic_launch(config, _worker)(run, plan, devices, shown, Path(reports))
        except (ChildFailedError, elastic_api.SignalException) as error:
            raise _root_cause(Path(reports), error, received, shown) from None


def _check_callbacks(callbacks: Callbacks) -> None:
    """Make sure that callbacks can go into another process.

    Raises:
        ConfigError: they cannot.
    """
    try:
        pickle.dumps(callbacks)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"callbacks: cannot go into another process ({error}); give functions of a module, or use --devices 1"
        ) from None


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[list[str]]:
    """Pass stop signals on to the workers, who may take any time to save; a second request kills them.

    Yields:
        The names of the signals received so far.
    """
    received: list[str] = []
    first = math.inf

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        note_handled()
        received.append(signal.Signals(number).name)
        first = min(first, time.monotonic())
        workers = multiprocessing.active_children()
        if not workers:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(received[0])
        is_second = time.monotonic() - first > SAME_REQUEST_S
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid or 0, signal.SIGKILL if is_second else number)

    with handled_by(pass_on, *PREEMPTION, signal.SIGINT):
        yield received


def _worker(run: Callable[[Any, Process], None], plan: Any, devices: Devices, shown: Shown, reports: Path) -> None:
    """Join the group and run, in a spawned process; write a report if that fails."""
    stop_at_once()
    import torch
    import torch.distributed as dist

    from aligndet_cli.processes.joining import LostPartner, init_process_group

    setup_logging(shown.verbosity)
    world_size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if devices.kind == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // world_size, 1))
    try:
        try:
            init_process_group(devices)
            run_here(run, plan, _joined_process(devices, shown))
            dist.destroy_process_group()
        finally:
            ignore_stopping()  # when one has failed, the launcher sends SIGTERM to the others
    except LostPartner:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_NOTICE_S)  # the launcher tells of the end that it sees first, then ends the others
        _end_worker(RunError.exit_code)
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
    _end_worker(error.exit_code)


def _end_worker(exit_code: int) -> NoReturn:
    """End this process without taking its group down: threads of gloo that lost a partner may abort in that."""
    for helper in multiprocessing.active_children():
        helper.terminate()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(exit_code)


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
    if "SIGINT" in received or any(failure.exitcode == _INTERRUPTED for failure in failures.values()):
        return KeyboardInterrupt()
    if number is not None:
        received = [*received, signal.Signals(number).name]
    if received:  # before the workers could listen
        return Preempted(str(Stopped(received[0])))
    if not failures:
        return RunError(f"a training process died ({error}); run the same command to continue")
    # What was killed comes first: the others' ends followed from it.
    rank, failure = min(failures.items(), key=lambda item: item[1].exitcode != -signal.SIGKILL)
    end = describe_end(failure.exitcode, less_memory(shown.flags))
    return RunError(f"a training process (rank {rank}) {end}; run the same command to continue")
