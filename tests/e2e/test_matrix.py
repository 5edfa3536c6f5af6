"""Every detector in both stages, stopped at every kind of moment and continued: nothing differs from a run without.

A checkpoint holds the state of a run: weights, momentum copies, optimizer and scaler. Random numbers depend on seed,
step and rank alone, and show in the losses. A run that is continued by as many processes as began it must therefore
write the same checkpoints and results as an uninterrupted one, byte for byte. Two processes draw other random numbers
than one: a run that is continued by another number of them must have the same checkpoints up to there, and the same
images in every step.
"""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.data.toy import draw_toy_data
from helpers.commandline import CHAIN, RESOLUTION, aligndet, assert_same_results
from helpers.forks import ForkServer, torchrun_variables
from helpers.moments import MOMENTS
from helpers.narrow import NARROW, narrow_backbones, narrow_words

# Three epochs of two steps.
IMAGES, BATCH, STEPS = 8, 4, 6
# The second epoch: its first step, and its last, after which there are an evaluation and a checkpoint.
STEP_OF = {"mid-epoch": 3, "end of an epoch": 4, "evaluating": 4, "saving": 4}
STAGES: dict[str, tuple[str, ...]] = {
    "pretrain-box": ("--backbone-weights", "none"),
    "finetune": ("--init", "scratch", "--evaluate-every", "1", "--set", "detector.score_threshold=0.005"),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
# Stages with the moments that they have.
PAIRS = [(stage, moment) for stage in STAGES for moment in MOMENTS if (stage, moment) != ("pretrain-box", "evaluating")]


@dataclass(frozen=True)
class Cell:
    """One way of being interrupted."""

    detector: str
    stage: str
    moment: str
    processes: int
    then: int  # processes that continue it
    signal: signal.Signals

    def __str__(self) -> str:
        moment = self.moment.replace(" ", "-")
        return f"{self.detector}-{self.stage}-{moment}-{self.processes}-then-{self.then}-{self.signal.name}"


def cells() -> list[Any]:
    """Return every detector, stage and moment with all numbers of processes, signals and ways to continue.

    One of these eight always runs, such that any two properties are seen in all their combinations. The others are
    marked. The cells of a detector share its uninterrupted runs, so they are for one worker.
    """
    found = []
    for (d, detector), (p, pair) in itertools.product(enumerate(NARROW), enumerate(PAIRS)):
        chosen = (1 + (d + p) % 2, SIGNALS[(d + p // 2) % 2], (d // 2 + p) % 2 == 0)
        for before, number, is_same in itertools.product((1, 2), SIGNALS, (True, False)):
            cell = Cell(detector, *pair, before, before if is_same else 3 - before, number)
            marks = [pytest.mark.xdist_group(f"matrix of {detector}")]
            if (before, number, is_same) != chosen:
                marks.append(pytest.mark.matrix)
            found.append(pytest.param(cell, id=str(cell), marks=marks))
    return found


def test_any_two_properties_of_an_interruption_are_seen_together() -> None:
    every = [param.values[0] for param in cells()]
    seen = [cell for cell, param in zip(every, cells(), strict=True) if pytest.mark.matrix not in param.marks]
    assert len(every) == 8 * len(seen)

    def pairs(cells: list[Cell]) -> set[frozenset[tuple[str, object]]]:
        def properties(cell: Cell) -> list[tuple[str, object]]:
            is_same = cell.then == cell.processes
            names = ("detector", "moment", "processes", "signal", "is same")
            return list(
                zip(
                    names, (cell.detector, (cell.stage, cell.moment), cell.processes, cell.signal, is_same), strict=True
                )
            )

        return {frozenset(two) for cell in cells for two in itertools.combinations(properties(cell), 2)}

    assert pairs(seen) == pairs(every)


@dataclass
class Runs:
    """Workspaces of the tests of this file, and the commands in them."""

    forks: ForkServer
    prepared: Path
    folder: Path
    whole: dict[tuple[str, str, int], Path] = field(default_factory=dict)
    output: str = ""  # of the processes of the last command

    def begin(self, name: str) -> Path:
        """Return a new workspace in which a stage can run."""
        return Path(shutil.copytree(self.prepared, self.folder / name / "workspace"))

    def run(self, cell: Cell, workspace: Path, part: str, *, processes: int, at: bool = False) -> list[int]:
        """Run the stage of a cell, to the moment or to its end; return the exit code of each process."""
        words = (cell.stage, "-w", ".", *narrow_words(cell.detector), *STAGES[cell.stage], "--name", "run")
        words += (*RESOLUTION, "--steps", str(STEPS), "--batch-size", str(BATCH))
        words += ("--set", "training.log_every=1", "--set", f"training.checkpoint.every_steps={2 if at else 1}")
        kept = str(workspace.parent / part)
        moment = (kept, cell.moment, STEP_OF[cell.moment], cell.signal) if at else (kept,)
        ranks = torchrun_variables() if processes == 2 else [{}]
        pids = [
            self.forks.start(*words, cwd=workspace, environment=variables, moment=(kept,) if rank else moment)
            for rank, variables in enumerate(ranks)
        ]
        codes = [self.forks.wait(pids[0])]
        for pid in pids[1:]:
            if codes[0] == -signal.SIGKILL:  # as when the machine goes down
                os.killpg(pid, signal.SIGKILL)
            codes.append(self.forks.wait(pid))
        logs = [Path(f"{self.forks.log}{variables.get('RANK', '')}") for variables in ranks]
        self.output = "\n".join(log.read_text() for log in logs)
        return codes

    def uninterrupted(self, cell: Cell, processes: int) -> Path:
        """Return the folder of a run that nothing stopped."""
        key = (cell.detector, cell.stage, processes)
        if key not in self.whole:
            workspace = self.begin("-".join(map(str, key)))
            assert self.run(cell, workspace, "kept", processes=processes) == [0] * processes, self.output
            self.whole[key] = workspace.parent
        return self.whole[key]


@pytest.fixture(scope="module")
def runs(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("matrix")
    draw_toy_data(folder / "toy", seed=0, num_train=IMAGES, num_val=4, size_hw=(96, 120))
    with narrow_backbones:
        for stage in ("proposals", "cluster"):
            aligndet(stage, *([folder / "toy"] if stage == "proposals" else []), "-w", folder / "w", *CHAIN[stage])
    yield Runs(forks, folder / "w", folder)
    shutil.rmtree(folder)


def images_of(kept: Path) -> dict[int, list[Any]]:
    """Return the places of all steps, whoever took them; not of one that only a part of the processes began."""
    lines = [json.loads(line) for file in sorted(kept.glob("images-*.jsonl")) for line in file.read_text().splitlines()]
    by_step: dict[int, list[Any]] = {}
    for step, _, places in sorted(lines):
        by_step.setdefault(step, []).extend(places)
    return {step: places for step, places in by_step.items() if len(places) == BATCH}


def assert_same_checkpoints(found: Path, expected: Path) -> int:
    """Compare all that are in both, which must be those that are found; return how many."""
    files = list(found.glob("step-*.pt"))
    assert [file.name for file in files if file.read_bytes() != (expected / file.name).read_bytes()] == []
    return len(files)


@pytest.mark.e2e
@pytest.mark.parametrize("cell", cells())
def test_stopped_and_continued(runs: Runs, cell: Cell, tmp_path: Path) -> None:
    whole = runs.uninterrupted(cell, cell.processes)
    workspace = runs.begin(str(tmp_path.name))
    codes = runs.run(cell, workspace, "before", processes=cell.processes, at=True)
    # Of two, the second may have ended by itself when it lost the first.
    assert codes[0] == -9 if cell.signal == signal.SIGKILL else codes == [75] * cell.processes, runs.output
    partial = workspace / cell.stage / ".run.partial"
    at = sorted((partial / "resume").glob("step-*.pt"))[-1].stem
    # SIGTERM is obeyed at the end of the step, and SIGKILL takes what was not saved.
    step = STEP_OF[cell.moment]
    assert at == f"step-{step if cell.signal == signal.SIGTERM else 2:09d}"
    assert assert_same_checkpoints(partial / "resume", whole / "kept") > 0
    codes = runs.run(cell, workspace, "after", processes=cell.then)
    assert codes == [0] * cell.then and "continuing after step" in runs.output, runs.output
    expected = images_of(whole / "kept")
    assert set(expected) == set(range(STEPS))
    for part in ("before", "after"):
        found = images_of(workspace.parent / part)
        assert found == {number: expected[number] for number in found}
    assert set(found) == set(range(int(at[5:]), STEPS))
    if cell.then == cell.processes:
        assert assert_same_checkpoints(workspace.parent / "after", whole / "kept") > 0
        assert_same_results(workspace / cell.stage / "run", whole / "workspace" / cell.stage / "run")
    shutil.rmtree(workspace.parent)
