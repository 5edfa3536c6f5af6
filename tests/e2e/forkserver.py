"""Runs commands in forked children, so that importing torch is paid for once. A script; see `conftest.py`.

One JSON object per line: `{"words": [...], "cwd": ..., "log": ..., "die_at": N or null, "environment": {...}}` starts
a command in a process group of its own and answers with its pid; `{"wait": pid}` answers with its exit code, `-9`
after `kill -9`.
With `die_at`, the whole group is killed just before its main process changes the disk below `cwd` for the Nth time;
the number of changes so far is kept in `<log>.changes`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import aligndet_cli.cluster.stage
import aligndet_cli.evaluate.stage
import aligndet_cli.finetune.stage
import aligndet_cli.pretrain_box.stage
import aligndet_cli.proposals.stage  # noqa: F401  # all five: imported before the first fork
from aligndet_cli.cli import main

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
    sys.argv = ["aligndet", *request["words"]]
    main()


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


def serve() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become_command(request)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
