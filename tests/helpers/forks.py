"""Real processes for what kills them: commands that start in a moment. See `forkserver.py`."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.commandline import environment

# What scripts call instead of the real command. Of the environment it passes on what commands read.
_COMMAND = """\
#!{python} -ISB
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect({door!r})
    environment = {{name: value for name, value in os.environ.items() if name.startswith("ALIGNDET_")}}
    request = {{"words": sys.argv[1:], "cwd": os.getcwd(), "environment": environment}}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(16)) % 256)
"""


@dataclass
class ForkServer:
    """Starts commands quickly; see `forkserver.py`."""

    process: "subprocess.Popen[str]"
    log: Path

    def start(
        self,
        *words: str | Path,
        cwd: Path,
        die_at: int | None = None,
        environment: dict[str, str] | None = None,
        moment: tuple[Any, ...] | None = None,
        keep: Path | None = None,
    ) -> int:
        """Pid (and process group) of a new command; one that is told its rank also has its own log.

        Args:
            moment: arguments of `moments.prepare`.
            keep: where to write the parameters after training, see `two_ranks.keep_parameters`.
        """
        own = environment or {}
        rank = own.get("RANK") or own.get("SLURM_PROCID") or ""
        request: dict[str, Any] = {"words": [str(word) for word in words], "cwd": str(cwd), "log": f"{self.log}{rank}"}
        request |= {"die_at": die_at, "environment": environment or {}, "moment": moment}
        request["keep"] = keep and str(keep)
        return int(self._ask(request))

    def wait(self, pid: int) -> int:
        """Exit code of a command once it has ended; negative for a signal."""
        return int(self._ask({"wait": pid}))

    def has_ended(self, pid: int) -> bool:
        """True once a command that nobody has waited for is a zombie."""
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def run(self, *words: str | Path, cwd: Path, die_at: int | None = None) -> int:
        """Start a command and wait for it."""
        return self.wait(self.start(*words, cwd=cwd, die_at=die_at))

    def join(
        self, *words: str | Path, cwd: Path, ranks: list[dict[str, str]] | None = None, keep: Path | None = None
    ) -> tuple[list[int], list[str]]:
        """Run a command twice, with the variables that a launcher sets; exit codes and outputs by rank.

        Args:
            ranks: variables of the two processes; torchrun's by default.
            keep: a folder for `rank0.pt` and `rank1.pt`, the parameters after training.
        """
        pids = [
            self.start(*words, cwd=cwd, environment=variables, keep=keep and keep / f"rank{rank}.pt")
            for rank, variables in enumerate(ranks or torchrun_variables())
        ]
        return [self.wait(pid) for pid in pids], [Path(f"{self.log}{rank}").read_text() for rank in ("0", "1")]

    def write_command(self, folder: Path) -> None:
        """Put an `aligndet` for scripts into a folder."""
        file = folder / "aligndet"
        file.write_text(_COMMAND.format(python=sys.executable, door=f"{self.log}.door"))
        file.chmod(0o755)

    @property
    def output(self) -> str:
        """What the last command printed."""
        return self.log.read_text()

    @property
    def changes(self) -> int:
        """How often the last command changed the disk."""
        return int(Path(f"{self.log}.changes").read_text().split("\n", 1)[0])

    def _ask(self, request: dict[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork server died"
        return answer.strip()


def torchrun_variables() -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**where, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


@contextmanager
def fork_server(log: Path) -> Iterator[ForkServer]:
    """A server whose commands print to `log`."""
    script = Path(__file__).with_name("forkserver.py")
    paths = (str(script.parents[1]), os.environ.get("PYTHONPATH"))
    with subprocess.Popen(
        [sys.executable, str(script), f"{log}.door"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(OPENBLAS_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, paths))),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield ForkServer(process, log)
        assert process.stdin is not None
        process.stdin.close()
