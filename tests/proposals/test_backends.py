import importlib.util
import os
import time

import joblib
import pytest

from aligndet_cli.errors import ConfigError, RunError
from aligndet_cli.proposals.backends import Workers, choose_workers, results_of


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where an optional package is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")


CLUSTERS = [
    # The libraries' own: sockets and processes that they leave to the garbage collector.
    pytest.param(backend, marks=[needs(package), pytest.mark.slow, pytest.mark.filterwarnings("ignore")])
    for backend, package in (("dask", "distributed"), ("ray", "ray"))
]


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def sleep_a_little(number: int) -> int:
    time.sleep(0.003)
    return number


def end_at_five(number: int) -> int:
    if number == 5:
        os._exit(1)
    return number


@pytest.mark.parametrize("backend", ["processes", "threads", *CLUSTERS])
def test_every_task_is_done_once(backend):
    with results_of(square, iter(range(150)), Workers(backend, 2)) as results:
        found = list(results)
    assert sorted(value for value, _ in found) == [number * number for number in range(150)]
    is_elsewhere = os.getpid() not in {pid for _, pid in found}
    assert is_elsewhere == (backend != "threads")


@pytest.mark.parametrize("backend", ["processes", "threads"])
def test_tasks_are_drawn_as_they_are_needed(backend):
    drawn = []

    def tasks():
        for number in range(1000):
            drawn.append(number)
            yield number

    with results_of(sleep_a_little, tasks(), Workers(backend, 2)) as results:
        for number in range(1, 101):
            next(results)
            # Besides what is done and not asked for yet: two batches of four for each of two workers, and a next one.
            assert len(drawn) < number + 60


def test_one_worker_needs_no_process():
    with results_of(square, range(5), Workers("processes", 1)) as results:
        assert {pid for _, pid in results} == {os.getpid()}


def test_killed_worker_is_one_line():
    with (
        pytest.raises(RunError, match=r"a worker process ended by itself \(exit code 1\)"),
        results_of(end_at_five, range(30), Workers("processes", 2)) as results,
    ):
        list(results)


@pytest.mark.parametrize("backend", ["processes", "auto"])
def test_processes_without_semaphores_are_one_line(backend, monkeypatch):
    monkeypatch.delitem(joblib.parallel.BACKENDS, "loky")  # as joblib does where /dev/shm is full
    with pytest.raises(RunError, match="/dev/shm is full .* use --backend threads"):
        choose_workers(backend, None, 5)


@needs("distributed")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dask_scheduler_of_others():
    import distributed

    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        results_of(square, range(20), choose_workers("dask", cluster.scheduler_address, "auto")) as results,
    ):
        assert sorted(value for value, _ in results) == [number * number for number in range(20)]


@pytest.mark.parametrize("backend", CLUSTERS)
def test_nobody_at_that_address(monkeypatch, backend):
    monkeypatch.setattr("aligndet_cli.proposals.backends._CONNECT_SECONDS", 1)
    workers = choose_workers(backend, "127.0.0.1:1", "auto")
    with (
        pytest.raises(ConfigError, match=r"--scheduler 127\.0\.0\.1:1: nobody answers"),
        results_of(square, [1], workers),
    ):
        pass


def test_settings_that_cannot_take_effect(monkeypatch):
    with pytest.raises(ConfigError, match="--scheduler a:1: no effect with --backend threads"):
        choose_workers("threads", "a:1", "auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--backend ray: .*pip install 'aligndet\[ray\]'"):
        choose_workers("ray", None, "auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "there")
    with pytest.raises(ConfigError, match="--num-workers: no effect with --scheduler"):
        choose_workers("dask", "a:1", 4)
    assert choose_workers("auto", None, 4) == Workers("threads", 4)
    assert choose_workers("auto", None, 5) == Workers("processes", 5)
    assert choose_workers("processes", None, 3) == Workers("processes", 3)
    assert choose_workers("threads", None, 0) == Workers("threads", 1)
    assert choose_workers("dask", "a:1", "auto") == Workers("dask", None, "a:1")
