import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from aligndet_cli.errors import Preempted
from aligndet_cli.processes.signals import (
    Stopped,
    end_with_parent,
    leave_stopping_to_main_process,
    stop_at_once,
    stop_on_signal,
)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_outside_of_loops_a_signal_ends_the_command(number: signal.Signals) -> None:
    stop_at_once()
    with pytest.raises(Stopped, match=f"stopped by {number.name}; run the same command to continue"):
        send(number)
    send(number)  # once is enough: what is being closed is not disturbed


def test_no_except_clause_takes_it_for_a_failure() -> None:
    stop_at_once()
    with pytest.raises(Stopped):
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("taken for a failure")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_loops_save_first(number: signal.Signals) -> None:
    stop_at_once()
    saved = False
    with pytest.raises(Preempted, match=f"stopped by {number.name}; everything is saved"), stop_on_signal() as stop:
        send(number)
        saved = True
        stop.raise_if_requested()
    assert saved
    with pytest.raises(Stopped):
        send(signal.SIGTERM)


def test_ctrl_c_saves_and_a_second_one_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        send(signal.SIGINT)
        stop.raise_if_requested()
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        send(signal.SIGINT)
        send(signal.SIGINT)


def test_workers_outlive_the_signal_that_all_processes_get_but_end_when_their_parent_says_so() -> None:
    pid = os.fork()
    if pid == 0:
        leave_stopping_to_main_process()
        time.sleep(60)
        os._exit(1)
    time.sleep(0.3)
    for number in SIGNALS:
        subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0) == (pid, 0)


def run_command(prepared: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a new process that was prepared by these lines."""
    code = f"import os, signal, sys, time\nfrom aligndet_cli import cli, driver\n{prepared}\ncli.main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_before_a_command_begins() -> None:
    done = run_command("cli.app = lambda: os.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stderr) == (75, "error: stopped by SIGTERM; run the same command to continue\n")


def test_while_python_ends() -> None:
    # At its end Python itself forgets its handlers, and unloading torch takes a while.
    late = """
cli.app = lambda: sys.exit(6)
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 15)
signal.late = Late()
"""
    done = run_command(late)
    assert (done.returncode, done.stderr) == (6, "")


def test_while_modules_are_imported() -> None:
    importing = """
driver.find_stage = lambda stage: (os.kill(os.getpid(), signal.SIGUSR1), time.sleep(1000))
sys.argv = ["aligndet", "cluster", "-w", "/nowhere", "--json"]
"""
    done = run_command(importing)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "error: stopped by SIGUSR1; run the same command to continue\n"
    assert '"exit_code": 75' in done.stdout


OUT_OF_REACH = """
import ctypes, threading
from aligndet_cli.processes.signals import stop_on_signal
def send_later(*numbers):
    def send():
        for number in numbers:
            time.sleep(1.5)
            os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()
def wait_in_a_library():
    lock = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


def test_a_signal_ends_a_command_that_waits_in_a_library() -> None:
    done = run_command(OUT_OF_REACH + "cli.app = lambda: (send_later(15), wait_in_a_library())")
    assert (done.returncode, done.stderr) == (75, "error: stopped by SIGTERM; run the same command to continue\n")


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_loop_that_waits_in_a_library(second: signal.Signals, code: int) -> None:
    loop = f"""
def app():
    with stop_on_signal():
        send_later(10, {int(second)})
        time.sleep(2)
        wait_in_a_library()
cli.app = app
"""
    assert run_command(OUT_OF_REACH + loop).returncode == code


def test_a_process_ends_with_its_parent_though_that_was_killed() -> None:
    is_watching, now_watching = os.pipe()
    is_over, alive = os.pipe()  # at its end once no process has `alive` any more
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            end_with_parent()
            os.write(now_watching, b"x")
            time.sleep(100)
            os._exit(0)
        os.read(is_watching, 1)
        send(signal.SIGKILL)
    os.close(alive)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    assert select.select([is_over], [], [], 50)[0] == [is_over] and os.read(is_over, 1) == b""
    for end in (is_watching, now_watching, is_over):
        os.close(end)
