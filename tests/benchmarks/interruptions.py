"""Every stage, killed and asked to stop at random moments and run again: is anything lost? Run it, it is not a test.

    python tests/benchmarks/interruptions.py --kills 20 --stops 20

On the toy set. Each round interrupts one running stage once, after a random share of the time that it takes
uninterrupted, and runs it again to the end; final files are compared byte for byte with those of the uninterrupted run.
Exits 1 where any differs.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`
from aligndet_cli.data.toy import draw_toy_data  # noqa: E402
from helpers.commandline import CHAIN, results_of  # noqa: E402
from helpers.forks import ForkServer, fork_server  # noqa: E402
from helpers.interrupting import words_of, workspace_before  # noqa: E402

SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


@dataclass
class Tally:
    """What came of the interruptions of one stage by one signal."""

    rounds: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    resumed: int = 0
    differing: list[str] = field(default_factory=list)


def interrupt_once(forks: ForkServer, stage: str, workspace: Path, toy: Path, number: int, after_s: float) -> int:
    """Run a stage, signal its main process (all of them for `kill -9`) after some time; returns its exit code."""
    pid = forks.start(*words_of(stage, toy), cwd=workspace)
    time.sleep(after_s)
    (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)  # it is there, if only as a zombie
    return forks.wait(pid)


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


def main() -> None:
    """Print one line per stage and signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    tallies: dict[tuple[str, str], Tally] = {}
    with tempfile.TemporaryDirectory(prefix="aligndet-") as temporary:
        folder = Path(temporary)
        toy, chain = folder / "toy", folder / "chain"
        draw_toy_data(toy, seed=0, num_train=13, num_val=11, size_hw=(96, 120))
        with fork_server(folder / "log.txt") as forks:
            seconds = run_all(chain, toy, forks)
            rounds = [("kill -9", index) for index in range(arguments.kills)]
            rounds += [("SIGTERM", index) for index in range(arguments.stops)]
            for name, index in rounds:
                stage = list(CHAIN)[index % len(CHAIN)]
                tally = tallies.setdefault((stage, name), Tally())
                one_round(forks, stage, SIGNALS[name], rng.uniform(0, seconds[stage]), tally, chain, toy)
    sys.exit(show(tallies))


def one_round(forks: ForkServer, stage: str, number: int, after_s: float, tally: Tally, chain: Path, toy: Path) -> None:
    """Interrupt, run again, compare. A stage that was done too soon is started afresh, for an earlier moment."""
    while True:
        workspace = workspace_before(stage, chain, chain.parent / "round")
        code = interrupt_once(forks, stage, workspace, toy, number, after_s)
        if code != 0:
            break
        shutil.rmtree(workspace)
        after_s *= 0.7
    tally.rounds += 1
    tally.codes[code] += 1
    code = forks.run(*words_of(stage, toy), cwd=workspace)
    tally.resumed += "which was interrupted" in forks.output
    expected, found = results_of(chain / stage), results_of(workspace / stage)
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    tally.differing += names if code == 0 else [f"exit code {code}: {forks.output}"]
    shutil.rmtree(workspace)


def show(tallies: dict[tuple[str, str], Tally]) -> int:
    """Print the table; 1 where anything differs."""
    print(f"{'stage':<14}{'by':<10}{'rounds':>7}{'resumed':>9}  {'exit codes':<26}differing files")
    for (stage, name), tally in sorted(tallies.items(), key=lambda item: (item[0][1], list(CHAIN).index(item[0][0]))):
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(tally.codes.items()))
        differing = "; ".join(tally.differing) or "none"
        print(f"{stage:<14}{name:<10}{tally.rounds:>7}{tally.resumed:>9}  {codes:<26}{differing}")
    return int(any(tally.differing for tally in tallies.values()))


if __name__ == "__main__":
    main()
