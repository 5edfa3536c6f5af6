"""Carrying out a study: one run after the other, or several at a time on devices of their own."""

import contextlib
import logging
from collections.abc import Iterator, Mapping

from aligndet_cli.driver import Request
from aligndet_cli.logs import logger
from aligndet_cli.processes.launch import Shown
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.study.board import Board, perform, warnings_once
from aligndet_cli.tools.study.plan import StageRun, finished
from aligndet_cli.workspace import Workspace


def look_up(runs: list[StageRun], workspace: Workspace) -> dict[str, str]:
    """Return the state of each run by key, before anything runs; see `RunState`.

    A run is complete if its artifact has the settings of the study and was made from the present artifacts. No data is
    opened.
    """
    states: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for run in runs:
        artifact = finished(run, workspace)
        if artifact is None:
            is_begun = (workspace.partial(run.stage, run.name) / "manifest.json").exists()
            is_there = (workspace.root / run.key / "manifest.json").exists()
            states[run.key] = "changed" if is_there else "interrupted" if is_begun else "missing"
            continue
        made_from = set(artifact.manifest["inputs"].values())
        is_current = all(hashes.get(key) in made_from for key in run.needs)
        states[run.key] = "complete" if is_current else "changed"
        hashes[run.key] = artifact.content_hash
    return states


def carry_out(
    runs: list[StageRun],
    workspace: Workspace,
    *,
    jobs: int,
    gpus: tuple[str, ...],
    shown: Shown,
    expected: Mapping[str, float],
) -> Board:
    """Do every run that is not complete; one that fails stops only those that need it.

    Args:
        gpus: names for CUDA_VISIBLE_DEVICES, shared out among the jobs. Empty: the CPU.
        expected: seconds of a run by stage, where they are known before.

    Raises:
        Preempted, KeyboardInterrupt: asked to stop; the runs under way are saved.
    """
    states = look_up(runs, workspace)
    complete = {key for key, state in states.items() if state == "complete"}
    board = Board({run.key: run for run in runs}, complete, jobs, expected=expected)
    if len(board.complete) == len(runs):
        return board
    _remember_data(runs, workspace)
    if jobs == 1:
        with warnings_once():
            while (run := board.begin_next()) is not None:
                with quiet_stages(logging.WARNING if shown.verbosity <= 0 else logger.level):
                    problem = perform(Request(run.stage, workspace, run.sources, shown=shown))
                board.finish(run, problem)
    else:
        from aligndet_cli.tools.study.workers import carry_out_in_parallel

        carry_out_in_parallel(board, workspace, gpus=gpus, verbosity=shown.verbosity)
    return board


def _remember_data(runs: list[StageRun], workspace: Workspace) -> None:
    """Remember the data as the first of the stages would, once, before several of them run at a time."""
    if workspace.recall("data") is None:
        for run in runs:
            stage = find_stage(run.stage)
            if stage.remembers_data != "never" and stage.purpose == "train":
                workspace.remember("data", run.config().data.place())
                return


@contextlib.contextmanager
def quiet_stages(level: int) -> Iterator[None]:
    """Log nothing below a level: the stages say too much to be read many times."""
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
