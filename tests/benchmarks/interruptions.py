"""Every stage, killed and asked to stop at random moments and run again: is anything lost? Run it, it is not a test.

    python tests/benchmarks/interruptions.py --rounds 40 --full 20

On the toy set. Each round interrupts one running stage once, by `kill -9`, SIGTERM or SIGUSR1, after a random share of
the time that it takes uninterrupted, and runs it again to the end. In the rounds of `--full`, the disk of the workspace
or /dev/shm (1 MB, with two workers) fills up before the signal comes; the stage is run once more while it is full, and
to the end once there is room again. For that the script has mounts of its own, which takes root.

A fault is more than one line of error, a traceback, an undocumented exit code, a run that hangs, a final file that
differs from the uninterrupted run's, and whatever is left behind. Exits 1 where there is any.
"""

import argparse
import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`
from aligndet_cli.data.toy import draw_toy_data  # noqa: E402
from helpers.commandline import CHAIN, results_of  # noqa: E402
from helpers.forks import ForkServer, fork_server  # noqa: E402
from helpers.interrupting import end_in_time, error_lines, told_badly, words_of, workspace_before  # noqa: E402

SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
SHARED_MEMORY = Path("/dev/shm")
TWO_WORKERS = ("--num-workers", "2")
DISK_MB = 700


@dataclass
class Tally:
    """What came of the interruptions of one stage by one signal."""

    rounds: int = 0
    full: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    codes_while_full: Counter[int] = field(default_factory=Counter)
    resumed: int = 0
    said: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Round:
    """One interruption.

    Attributes:
        full: what fills up, `disk` or `shm`; "" for nothing.
        moments: shares of the stage's time after which it fills up and after which the signal comes.
        spare_kb: room that is left for small files.
        is_for_all: the signal goes to all processes of the command, as Slurm sends it.
    """

    stage: str
    name: str
    full: str
    moments: tuple[float, float]
    spare_kb: int
    is_for_all: bool

    def words(self, toy: Path) -> list[str | Path]:
        """The command, to be run in the workspace."""
        processes = ("--backend", "processes") if self.stage == "proposals" else ()
        return [*words_of(self.stage, toy), *((*TWO_WORKERS, *processes) if self.full == "shm" else ())]


@dataclass(frozen=True)
class Bench:
    """What all rounds share: the uninterrupted run, the time that its stages took, and a disk for the interrupted."""

    forks: ForkServer
    toy: Path
    chain: Path
    disk: Path
    seconds: dict[str, float]

    def run(self, one: Round, workspace: Path) -> int | None:
        """Exit code of the command of a round."""
        return end_in_time(self.forks, self.forks.start(*one.words(self.toy), cwd=workspace))

    def interrupt(self, one: Round, workspace: Path, share: float) -> int | None:
        """Exit code of the command of a round that is interrupted after a share of its moments."""
        fills, comes = (moment * share * self.seconds[one.stage] for moment in one.moments)
        pid = self.forks.start(*one.words(self.toy), cwd=workspace)
        if one.full:
            time.sleep(fills)
            fill(self.place(one), one.spare_kb * 1024)
        time.sleep(comes - fills if one.full else comes)
        number = SIGNALS[one.name]
        (os.killpg if one.is_for_all else os.kill)(pid, number)  # it is there, if only as a zombie
        return end_in_time(self.forks, pid)

    def place(self, one: Round) -> Path:
        """The folder that fills up."""
        return SHARED_MEMORY if one.full == "shm" else self.disk


def fill(folder: Path, spare: int) -> None:
    """Leave room for so many bytes on the disk of a folder."""
    size, step = 0, 1 << 24
    with (folder / "filler").open("wb") as handle:
        while step >= 4096:
            try:
                os.posix_fallocate(handle.fileno(), size, step)
                size += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2
        handle.truncate(max(size - spare, 0))


def make_room(folder: Path) -> None:
    """Take back `fill`."""
    (folder / "filler").unlink(missing_ok=True)


def one_round(bench: Bench, one: Round, tally: Tally) -> None:
    """Interrupt, run again, compare. A stage that was done too soon is started afresh, for an earlier moment."""
    share = 1.0
    while True:
        workspace = workspace_before(one.stage, bench.chain, bench.disk / "round")
        code = bench.interrupt(one, workspace, share)
        is_too_early = code == -SIGNALS[one.name] != -signal.SIGKILL and bench.forks.output == ""  # no command yet
        if code != 0 and not is_too_early:
            break
        make_room(bench.place(one))
        shutil.rmtree(workspace)
        share *= 1.4 if is_too_early else 0.7
    tally.rounds += 1
    tally.codes[code] += 1
    expected = {-signal.SIGKILL if one.name == "kill -9" else 75, *([1] if one.full else [])}
    found = told_badly(code, expected, bench.forks.output)
    tally.said.update(error_lines(bench.forks.output))
    if one.full:
        tally.full[one.full] += 1
        code = bench.run(one, workspace)
        tally.codes_while_full[code] += 1
        found += told_badly(code, {0, 1}, bench.forks.output)
        tally.said.update(error_lines(bench.forks.output))
        make_room(bench.place(one))
    code = bench.run(one, workspace)
    tally.resumed += "which was interrupted" in bench.forks.output
    found += told_badly(code, {0}, bench.forks.output)
    ours, theirs = results_of(workspace / one.stage), results_of(bench.chain / one.stage)
    found += sorted(f"{name} differs" for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    found += [f"{file.name} left behind" for file in (workspace / one.stage).rglob(".*")]
    tally.faults += [f"{one}: {fault}" for fault in found]
    shutil.rmtree(workspace)


def run_all(chain: Path, toy: Path, forks: ForkServer) -> dict[str, float]:
    """All five stages, uninterrupted; returns how long each took."""
    chain.mkdir()
    seconds = {}
    for stage in CHAIN:
        began = time.monotonic()
        if forks.run(*words_of(stage, toy), cwd=chain) != 0:
            sys.exit(forks.output)
        seconds[stage] = time.monotonic() - began
    return seconds


@contextlib.contextmanager
def small_disks(disk: Path, *, is_mounted: bool) -> Iterator[None]:
    """Mount a disk, and one in the place of /dev/shm, while the block runs."""
    disk.mkdir()
    sizes = {disk: f"{DISK_MB}m", SHARED_MEMORY: "1m"} if is_mounted else {}
    for folder, size in sizes.items():
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        for folder in sizes:
            subprocess.run(["umount", "--lazy", folder], check=True)


def draw_rounds(num_plain: int, num_full: int, rng: random.Random) -> list[Round]:
    """Each stage, each signal and each thing that can be full in turn."""
    rounds = []
    for index in (*range(num_plain), *range(num_full)):
        full = ("disk", "shm")[index % 2] if len(rounds) >= num_plain else ""
        name = list(SIGNALS)[index % len(SIGNALS)]
        first, second = sorted((rng.random(), rng.random()))
        spare_kb = rng.choice((0, 0, rng.randrange(4, 400, 4)))  # about what all but the weights take
        is_for_all = name == "kill -9" or rng.random() < 0.5
        rounds.append(Round(list(CHAIN)[index % len(CHAIN)], name, full, (first, second), spare_kb, is_for_all))
    return rounds


def main() -> None:
    """Print one line per stage and signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="with room on all disks")
    parser.add_argument("--full", type=int, default=20, help="rounds in which the disk or /dev/shm is full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.full and not arguments.mounted:
        if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False).returncode:
            sys.exit("this machine lets the script mount no disk: run it as root, or leave these rounds out: --full 0")
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv, "--mounted"])
    tallies: dict[tuple[str, str], Tally] = {}
    with tempfile.TemporaryDirectory(prefix="aligndet-") as temporary:
        folder = Path(temporary)
        toy, chain, disk = folder / "toy", folder / "chain", folder / "disk"
        draw_toy_data(toy, seed=0, num_train=13, num_val=11, size_hw=(96, 120))
        with small_disks(disk, is_mounted=arguments.mounted), fork_server(folder / "log.txt") as forks:
            bench = Bench(forks, toy, chain, disk, run_all(chain, toy, forks))
            for one in draw_rounds(arguments.rounds, arguments.full, random.Random(arguments.seed)):
                tally = tallies.setdefault((one.stage, one.name), Tally())
                one_round(bench, one, tally)
                print(one, tally.codes, tally.said, tally.faults, file=sys.stderr, flush=True)
    sys.exit(show(tallies))


def show(tallies: dict[tuple[str, str], Tally]) -> int:
    """Print the table; 1 where there is any fault."""
    codes = f"{'exit codes':<24}{'run again while full':<24}"
    print(f"{'stage':<14}{'by':<9}{'rounds':>6}{'disk':>6}{'shm':>5}{'resumed':>9}  {codes}faults")
    for (stage, name), tally in sorted(tallies.items(), key=lambda item: (item[0][1], list(CHAIN).index(item[0][0]))):
        numbers = f"{tally.rounds:>6}{tally.full['disk']:>6}{tally.full['shm']:>5}{tally.resumed:>9}"
        codes = f"{listed(tally.codes):<24}{listed(tally.codes_while_full):<24}"
        print(f"{stage:<14}{name:<9}{numbers}  {codes}{len(tally.faults) or 'none'}")
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    said = sum((tally.said for tally in tallies.values()), Counter[str]())
    print(*(f"{count} x {line}" for line, count in said.most_common()), *faults, sep="\n")
    return int(bool(faults))


def listed(codes: Counter[int]) -> str:
    """How often there was each exit code."""
    return ", ".join(f"{count} x {code}" for code, count in codes.items())


if __name__ == "__main__":
    main()
