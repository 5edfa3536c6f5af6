"""Workers that search images: processes or threads of this machine, or machines of a Dask or Ray cluster."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import socket
import urllib.parse
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import joblib
from joblib.externals.loky.backend import resource_tracker
from joblib.externals.loky.process_executor import TerminatedWorkerError

from aligndet_cli.errors import ConfigError, RunError
from aligndet_cli.processes.ends import describe_end, starting_processes
from aligndet_cli.processes.signals import end_with_parent, helpers_ignore_stopping, leave_stopping_to_main_process

Backend = Literal["processes", "threads", "dask", "ray"]
_JOBLIB_NAMES = {"processes": "loky", "threads": "threading", "dask": "dask", "ray": "ray"}
_PACKAGES = {"dask": "distributed", "ray": "ray"}
# Tasks that a worker takes at once. With `processes`, handing over one costs the main process 0.3-0.7 ms, and a crash
# loses the tasks that were handed over.
_TASKS_AT_ONCE = 4
# Up to this many workers are threads unless said otherwise: threads start at once, share their memory, and cost a tenth
# less CPU time. Each image holds the interpreter's lock for a millisecond or two, so more threads would wait for it.
_MAX_AUTO_THREADS = 4
_CONNECT_SECONDS = 20
# Ray's joblib backend returns the results of a round together; a round has this many tasks per worker.
_TASKS_PER_ROUND = 64

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """The workers that do the tasks.

    Attributes:
        count: workers on this machine; None for all workers of a cluster.
        scheduler: address of the Dask scheduler or the Ray head; None for this machine.
    """

    backend: Backend
    count: int | None
    scheduler: str | None = None


def choose_workers(
    backend: Backend | Literal["auto"], scheduler: str | None, num_workers: int | Literal["auto"]
) -> Workers:
    """Return the workers that the settings mean on this machine.

    Raises:
        ConfigError: settings that cannot take effect together, or a package that is not installed.
        RunError: this machine lets joblib start no processes.
    """
    count = joblib.cpu_count() if num_workers == "auto" else max(1, num_workers)
    if scheduler is not None and backend not in _PACKAGES:
        raise ConfigError(f"--scheduler {scheduler}: no effect with --backend {backend}; use --backend dask or ray")
    if backend == "auto":
        backend = "threads" if count <= _MAX_AUTO_THREADS else "processes"
    if backend == "processes":
        _refuse_without_semaphores()
    package = _PACKAGES.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"--backend {backend}: needs a package that is not here: pip install 'aligndet[{backend}]'")
    if scheduler is not None:
        if num_workers != "auto":
            raise ConfigError("--num-workers: no effect with --scheduler, whose cluster has its own number of workers")
        return Workers(backend, None, scheduler)
    return Workers(backend, count)


def _refuse_without_semaphores() -> None:
    """Refuse processes where joblib, when it was imported, could not make what they need."""
    if "loky" not in joblib.parallel.BACKENDS:
        raise RunError(
            "joblib can start no processes here (/dev/shm is full or missing, or JOBLIB_MULTIPROCESSING is 0): "
            "use --backend threads"
        )


@contextlib.contextmanager
def results_of(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: Workers
) -> Iterator[Iterator[Result]]:
    """Yield an iterator over the results of `function(task)`, in the order in which tasks end.

    Tasks are drawn as they are needed. Leaving the block early stops the workers.

    Raises:
        ConfigError: no scheduler at that address.
        RunError: a worker process was killed.
    """
    called = functools.partial(_call, function, os.getpid() if workers.backend == "processes" else None)
    # There is one worker per core already.
    threads = {"inner_max_num_threads": 1} if workers.backend == "processes" else {}
    with (
        _ready(workers) as num_jobs,
        joblib.parallel_config(_JOBLIB_NAMES[workers.backend], n_jobs=num_jobs, **threads),
    ):
        at_once = 1 if workers.backend == "threads" else _TASKS_AT_ONCE
        # Each worker has its next batch waiting when it is done with one.
        ahead = f"{2 * at_once} * n_jobs"
        options = {"batch_size": at_once, "pre_dispatch": ahead}
        if workers.backend == "ray":
            yield _in_rounds(called, tasks, joblib.Parallel(**options))
            return
        parallel = joblib.Parallel(return_as="generator_unordered", **options)
        results: Generator[Result, None, None] = parallel(joblib.delayed(called)(task) for task in tasks)
        try:
            yield _with_known_errors(results)
        finally:
            with warnings.catch_warnings():  # joblib warns that tasks are lost, which is meant
                warnings.filterwarnings("ignore", message=".*(cancelled|executed  but not used)", category=UserWarning)
                results.close()


def _call(function: Callable[[Task], Result], parent_pid: int | None, task: Task) -> Result:
    if parent_pid is not None:
        _leave_ending_to_parent(parent_pid)
    return function(task)


@contextlib.contextmanager
def _ready(workers: Workers) -> Iterator[int]:
    """Connect to a cluster or start one here; yield the number of jobs to ask joblib for."""
    if workers.backend == "dask":
        with _dask_client(workers):
            yield -1
    elif workers.backend == "ray":
        yield from _ray_jobs(workers)
    else:
        with starting_processes("use --num-workers 1"):
            with helpers_ignore_stopping():
                resource_tracker.ensure_running()
            yield workers.count or -1


def _dask_client(workers: Workers) -> Any:
    import distributed

    if workers.scheduler is not None:
        _refuse_unreachable(workers.scheduler)
        return distributed.Client(workers.scheduler)
    # No dashboard: it would take a port that others may have.
    return distributed.Client(n_workers=workers.count, threads_per_worker=1, dashboard_address=None)


def _ray_jobs(workers: Workers) -> Iterator[int]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    import ray
    from ray.util.joblib import register_ray

    register_ray()
    where: dict[str, Any] = {"num_cpus": workers.count, "include_dashboard": False}
    if workers.scheduler is not None:
        _refuse_unreachable(workers.scheduler)
        where = {"address": workers.scheduler}
    ray.init(log_to_driver=False, logging_level="warning", **where)
    try:
        yield int(ray.cluster_resources()["CPU"])
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Refuse an address where nobody answers: Ray would wait for minutes, and neither says it in one line."""
    place = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((place.hostname or "", place.port or 0), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--scheduler {address}: nobody answers there ({error}); write it as HOST:PORT") from None


def _in_rounds(called: Callable[[Task], Result], tasks: Iterable[Task], parallel: joblib.Parallel) -> Iterator[Result]:
    remaining = iter(tasks)
    with parallel:
        while some := list(itertools.islice(remaining, _TASKS_PER_ROUND * parallel.n_jobs)):
            yield from parallel(joblib.delayed(called)(task) for task in some)


def _with_known_errors(results: Iterator[Result]) -> Iterator[Result]:
    try:
        yield from results
    except TerminatedWorkerError as error:
        code = re.search(r"\((-?\d+)\)\}", str(error))  # "The exit codes of the workers are {SIGKILL(-9)}"
        end = describe_end(int(code[1]) if code else None, "try a smaller --num-workers")
        raise RunError(f"a worker process {end}; finished images are saved and the same command continues") from None


@functools.cache
def _leave_ending_to_parent(parent_pid: int) -> None:
    """Make a worker process end with its parent, and not before; do nothing in the parent itself.

    After `kill -9` of the parent, joblib's workers would wait for ever for work that cannot come any more.
    """
    if os.getppid() == parent_pid:
        leave_stopping_to_main_process()
        end_with_parent()
