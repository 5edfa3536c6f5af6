"""Four commands at once on one workspace: is any state wrong, any file half written? Run it, it is not a test.

    python tests/benchmarks/load.py --minutes 10

On the toy set: studies, `predict` and `evaluate` one after another, each by processes of its own, and in this process
`status` every 100 ms (or as fast as the machine can), all at the same time. A fault is an undocumented exit code, more
than one line of error, a command that hangs, a status that cannot be parsed or in which a run vanishes or a finished
one is no longer complete, a result that differs from that of the same command alone, and whatever is left behind. Exits
1 where there is any.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`
from aligndet_cli.data.toy import draw_toy_data  # noqa: E402
from helpers.commandline import CHAIN, aligndet, results_of  # noqa: E402
from helpers.forks import ForkServer, fork_server  # noqa: E402
from helpers.interrupting import end_in_time, told_badly, words_of  # noqa: E402
from helpers.studies import SMALL, TWO_STARTS  # noqa: E402

RUN = "retinanet-resnet18"  # what CHAIN makes
POLL_S = 0.1
EVALUATE = (
    ("--run", RUN, "--force"),
    ("--run", RUN, "--name", "again", "--force", "--compare", RUN),
    ("--name", "newest", "--force", "--compare", RUN),
)
PREDICT = (("--run", RUN), ("--run", RUN, "--save-crops"), (), ("--run", RUN, "--force"))
Words = tuple[str | Path, ...]


@dataclass
class Done:
    """What came of the calls of one command."""

    codes: Counter[int | None] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def call(self, forks: ForkServer, words: Words, cwd: Path) -> None:
        """Run a command to its end and judge it."""
        began = time.monotonic()
        code = end_in_time(forks, forks.start(*words, cwd=cwd))
        self.seconds.append(time.monotonic() - began)
        self.codes[code] += 1
        found = told_badly(code, {0}, forks.output)
        self.faults += [f"{' '.join(map(str, words))}: {fault}" for fault in found]


@dataclass
class Polls(Done):
    """What `status` said: a run that was there must be there, and one that was complete must be complete."""

    begun: list[float] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)

    def poll(self, workspace: Path) -> None:
        """Ask once."""
        self.begun.append(time.monotonic())
        try:
            ran = aligndet("status", "-w", workspace, "--json", code=None)
            self.codes[ran.code] += 1
            runs = ran.json()["runs"]
        except Exception as error:  # any is a fault, and none ends the benchmark
            self.faults.append(f"status: {type(error).__name__}: {error}")
            return
        self.seconds.append(time.monotonic() - self.begun[-1])
        rows = Counter(f"{row['stage']}/{row['run']}" for row in runs if row["state"] == "complete")
        others = {f"{row['stage']}/{row['run']}": row["state"] for row in runs if row["state"] != "complete"}
        self.faults += [f"status: {key} is {state}" for key, state in others.items() if state != "running"]
        self.faults += [f"status: {key} is there {count} times" for key, count in rows.items() if count > 1]
        now = others | dict.fromkeys(rows, "complete")
        wrong = (key for key, state in self.seen.items() if now.get(key) not in (state, "complete"))
        self.faults += [f"status: {key} was {self.seen[key]}, is {now.get(key, 'gone')}" for key in wrong]
        self.seen |= now


@dataclass(frozen=True)
class Load:
    """Commands that run at the same time in one workspace, until the time is up."""

    toy: Path
    workspace: Path
    until: float
    studies_over: threading.Event

    @property
    def is_over(self) -> bool:
        """True once nothing new is to be begun."""
        return time.monotonic() > self.until

    def study(self, forks: ForkServer, done: Done) -> None:
        """One study after another, each of another seed."""
        for seed in itertools.count():
            if self.is_over:
                break
            file = write_study(self.workspace.parent, self.toy, [seed])
            done.call(forks, ("study", file, "-w", ".", *(("--jobs", "2") if seed % 2 else ())), self.workspace)
        self.studies_over.set()

    def loop(self, forks: ForkServer, done: Done, command: str, kinds: tuple[Words, ...]) -> None:
        """One call after another."""
        data = (self.toy / "val",) if command == "predict" else ()
        for more in itertools.cycle(kinds):
            if self.is_over:
                return
            done.call(forks, (command, *data, "-w", ".", *more), self.workspace)

    def watch(self, polls: Polls) -> None:
        """Poll to the end of the last study."""
        while not self.studies_over.is_set():
            polls.poll(self.workspace)
            time.sleep(max(polls.begun[-1] + POLL_S - time.monotonic(), 0))


def write_study(folder: Path, toy: Path, seeds: list[int]) -> Path:
    """A study of two starts: proposals and pre-training, which all seeds share, and two runs to fine-tune per seed."""
    file = folder / f"study-{'-'.join(map(str, seeds))}.toml"
    file.write_text(f'data = "{toy}"\ndetectors = ["retinanet"]\nseeds = {seeds}\n{SMALL}{TWO_STARTS}')
    return file


def differences(found: Path, expected: Path) -> Iterator[str]:
    """Files that differ, but for those of comparisons, which depend on what was compared when."""
    ours, theirs = results_of(found), results_of(expected)
    names = (name for name in sorted({*ours, *theirs}) if not Path(name).name.startswith("compare-"))
    return (f"{found / name} differs" for name in names if ours.get(name) != theirs.get(name))


def look_through(workspace: Path, chain: Path, alone: Path) -> Iterator[str]:
    """What is wrong with a workspace after the load."""
    for file in workspace.rglob("*"):
        if file.name.startswith(".") and file.name != ".index":
            yield f"{file} left behind"
        elif file.suffix == ".json":
            try:
                json.loads(file.read_text())
            except json.JSONDecodeError as error:
                yield f"{file}: {error}"
    for stage in CHAIN:
        for kept in (chain / stage).iterdir():
            yield from differences(workspace / stage / kept.name, kept)
        for made in (alone / stage).glob("*"):
            yield from differences(workspace / stage / made.name, made)
    yield from differences(workspace / "evaluate" / "again", chain / "evaluate" / f"{RUN}-val")
    first = (workspace / "predict" / RUN / "predictions.json").read_bytes()
    for file in (workspace / "predict").glob(f"{RUN}-*/predictions.json"):
        if file.read_bytes() != first:
            yield f"{file} differs"


def main() -> None:
    """Print one line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    done = {"study": Done(), "predict": Done(), "evaluate": Done(), "status": Polls()}
    with tempfile.TemporaryDirectory(prefix="aligndet-") as temporary, contextlib.ExitStack() as servers:
        folder = Path(temporary)
        toy, chain, workspace, alone = (folder / name for name in ("toy", "chain", "workspace", "alone"))
        draw_toy_data(toy, seed=0, num_train=13, num_val=11, size_hw=(96, 120))
        forks = {
            name: servers.enter_context(fork_server(folder / f"{name}.txt"))
            for name in ("study", "predict", "evaluate")
        }
        chain.mkdir()
        for stage in CHAIN:
            if forks["study"].run(*words_of(stage, toy), cwd=chain) != 0:
                sys.exit(forks["study"].output)
        shutil.copytree(chain, workspace)
        load = Load(toy, workspace, time.monotonic() + arguments.minutes * 60, threading.Event())
        with ThreadPoolExecutor(len(done)) as pool:
            tasks = [
                pool.submit(load.study, forks["study"], done["study"]),
                pool.submit(load.loop, forks["predict"], done["predict"], "predict", PREDICT),
                pool.submit(load.loop, forks["evaluate"], done["evaluate"], "evaluate", EVALUATE),
                pool.submit(load.watch, done["status"]),
            ]
        for task in tasks:
            task.result()
        file = write_study(folder, toy, list(range(len(done["study"].seconds))))
        done["study"].call(forks["study"], ("study", file, "-w", alone), folder)
        files = list(look_through(workspace, chain, alone))
    sys.exit(show(done, files))


def show(done: dict[str, Done], files: list[str]) -> int:
    """Print the table; 1 where there is any fault."""
    for name, one in done.items():
        codes = ", ".join(f"{count} x {code}" for code, count in one.codes.items())
        print(f"{name:<10}exit codes {codes}; {statistics.median(one.seconds):.2f} s in the median")
    polls = done["status"]
    assert isinstance(polls, Polls)
    intervals = [after - before for before, after in itertools.pairwise(polls.begun)]
    print(f"status every {statistics.median(intervals):.2f} s in the median; it saw {len(polls.seen)} runs")
    faults = [*itertools.chain(*(one.faults for one in done.values())), *files]
    print(*faults[:100], f"{len(faults) or 'no'} faults", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    main()
