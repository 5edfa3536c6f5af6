"""Runs commands in forked children, so that importing torch is paid for once. A script; see `conftest.py`.

One JSON object per line: `{"words": [...], "cwd": ..., "log": ..., "die_at": N or null, "moment": [...] or null,
"environment": {...}, "keep": file or null}` starts a command in a process group of its own and answers with its pid;
`{"wait": pid}` answers with its exit code, `-9` after `kill -9`.
With `die_at`, the whole group is killed just before its main process changes the disk below `cwd` for the Nth time;
the number of changes so far is kept in `<log>.changes`. `moment` are the arguments of `moments.prepare`, `keep` that of
`two_ranks.keep_parameters`.

Scripts have their commands run by `aligndet`, see `forks.py`, which sends its words, folder and open files to the Unix
socket that is named on the command line, and gets the exit code back.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import torch
from matplotlib.figure import Figure

import aligndet_cli.cluster.stage
import aligndet_cli.commands.results
import aligndet_cli.evaluate.stage
import aligndet_cli.finetune.stage
import aligndet_cli.pretrain_box.stage
import aligndet_cli.proposals.stage
import aligndet_cli.tools.figures.command
import aligndet_cli.tools.report.table
import aligndet_cli.tools.study.command  # noqa: F401  # all of these: imported before the first fork
from aligndet_cli.cli import main
from helpers.moments import prepare
from helpers.plots import leave_empty
from helpers.two_ranks import keep_parameters

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR


def become_command(request: dict[str, Any]) -> None:
    """Turn this forked child into the command that was asked for."""
    os.setsid()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    die_when_changing(Path(request["cwd"]), request["die_at"], Path(f"{request['log']}.changes"))
    if request["moment"] is not None:
        kept, *moment = request["moment"]
        prepare(Path(kept), *moment)
    if request["keep"] is not None:
        keep_parameters(Path(request["keep"]))
    run_command(request["words"])


def run_command(words: list[str]) -> NoReturn:
    """Run a command and end as Python does, but for taking down what the fork shares: that takes seconds.

    Only `figures` draws.
    """
    if words[0] != "figures":
        Figure.savefig = leave_empty
    sys.argv = ["aligndet", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    threading._shutdown()  # type: ignore[attr-defined]  # ends the threads of pools, and waits for all others
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_when_changing(folder: Path, die_at: int | None, count_file: Path) -> None:
    """Count the changes that Python makes below `folder`, and end the process group before number `die_at`."""
    counter = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    main_pid, count = os.getpid(), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_change = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if not is_change or os.getpid() != main_pid or not isinstance(arguments[0], str | Path):
            return
        if folder not in (folder / arguments[0]).parents:
            return
        count += 1
        os.pwrite(counter, f"{count}\n{event} {arguments[0]}\n".encode(), 0)
        if count == die_at:
            os.killpg(os.getpgid(0), signal.SIGKILL)

    sys.addaudithook(watch)


def serve(door: socket.socket) -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # no child looks through it, which would copy it
    print("ready", flush=True)
    while True:
        if door in select.select([sys.stdin, door], [], [])[0]:  # one line at a time: nothing waits in a buffer
            run_for_script(door)
            continue
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become_command(request)
        print(pid, flush=True)


def run_for_script(door: socket.socket) -> None:
    """Run a command of a script to its end, in the folder and with the open files of the script."""
    with door.accept()[0] as connection:
        message, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        pid = os.fork()
        if pid == 0:
            request = json.loads(message)
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.environ.update(request["environment"])
            os.chdir(request["cwd"])
            run_command(request["words"])
        for file in files:
            os.close(file)
        _, status = os.waitpid(pid, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as own_door:
        own_door.bind(sys.argv[1])
        own_door.listen()
        serve(own_door)
