"""Status of a workspace: finished, interrupted and running stages, and the artifacts they were made from."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from aligndet_cli.config import STAGES, WORKSPACE_WEIGHTS
from aligndet_cli.errors import MissingError
from aligndet_cli.files import is_locked, read_json
from aligndet_cli.proposals.share import describe_shards
from aligndet_cli.stage import Read, find_stage
from aligndet_cli.tables import plain_table
from aligndet_cli.workspace import Artifact, Workspace, run_name

_LOOKS = 10
_STATE_COLOURS = {"complete": "green", "stale": "yellow", "interrupted": "yellow", "running": "cyan"}
_NARROWEST_RESULT, _GAP = 24, 2  # columns of text


@dataclass(frozen=True)
class StatusRow:
    """One run of one stage.

    Attributes:
        state: `complete`, `stale`, `interrupted` or `running`.
        made_from: the artifacts it read, `proposals/train2017` and the like.
        remark: the reason why it is stale, or its result.
    """

    stage: str
    run: str
    state: str
    made_from: tuple[str, ...]
    finished: str
    remark: str


def status_table(rows: list[StatusRow], width: int) -> tuple[Table, list[str]]:
    """Draw one line per run, in so many columns of text; return the names of the columns that do not fit, too.

    Names stay whole: the result goes first; where what a run was made from does not fit either, the result comes back
    if it can. A name that is too long is folded.
    """
    columns = {
        "artifact": [escape(f"{row.stage}/{row.run}") for row in rows],
        "state": [f"[{_STATE_COLOURS[row.state]}]{row.state}[/]" for row in rows],
        "made from": [escape("\n".join(row.made_from)) for row in rows],
        "result": [escape(row.remark) for row in rows],
    }
    needed = {
        "artifact": max(len(f"{row.stage}/{row.run}") for row in rows),
        "state": max(len(row.state) for row in rows),
        "made from": max(len(name) for row in rows for name in (*row.made_from, "made from")),
        "result": _NARROWEST_RESULT,
    }
    choices: tuple[list[str], ...] = ([], ["result"], ["made from"], ["made from", "result"])
    for left_out in choices:
        if sum(needed[name] + _GAP for name in needed.keys() - left_out) <= width:
            break
    columns = {name: column for name, column in columns.items() if name not in left_out}
    table = plain_table(*columns)
    for column, name in zip(table.columns, columns, strict=True):
        if name != "result":
            column.width = min(needed[name], max(width - needed["state"] - 2 * _GAP, 1))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table, left_out


def collect_status(workspace: Workspace) -> list[StatusRow]:
    """Return all runs of the workspace, stage by stage, oldest first, also while other commands make and redo them."""
    for _ in range(_LOOKS):
        with contextlib.suppress(MissingError):  # of a run that was redone meanwhile
            return _look(workspace)
    return _look(workspace)


def _look(workspace: Workspace) -> list[StatusRow]:
    # In this order, a run that is finished meanwhile is in one of the lists at least, and what it was made from too.
    unfinished = {stage: [(_unfinished(stage, one), one) for one in workspace.partials(stage)] for stage in STAGES}
    everything = {stage: workspace.artifacts(stage) for stage in reversed(STAGES)}
    known = {artifact.content_hash: f"{stage}/{artifact.name}" for stage in STAGES for artifact in everything[stage]}
    rows: list[StatusRow] = []
    for stage in STAGES:
        stale = {f"{row.stage}/{row.run}" for row in rows if row.state == "stale"}
        rows += [_finished(stage, artifact, known, stale) for artifact in everything[stage]]
        names = {artifact.name for artifact in everything[stage]}
        rows += [row for row, folder in unfinished[stage] if row and (folder.exists() or row.run not in names)]
    return rows


def _finished(stage: str, artifact: Artifact, known: dict[str, str], stale: set[str]) -> StatusRow:
    inputs = artifact.manifest["inputs"]
    made_from = tuple(known[content_hash] for content_hash in inputs.values() if content_hash in known)
    needed = [read.input for read in find_stage(stage).reads if _is_from_here(read, artifact)]
    gone = [name for name in needed if name in inputs and inputs[name] not in known]
    remark, state = find_stage(stage).headline(artifact) if artifact.result else "", "complete"
    if gone:
        remark, state = f"{' and '.join(gone)} changed or gone since", "stale"
    elif old := [name for name in made_from if name in stale]:
        remark, state = f"{', '.join(old)} is stale", "stale"
    return StatusRow(stage, artifact.name, state, made_from, artifact.manifest["finished"], remark)


def _is_from_here(read: Read, artifact: Artifact) -> bool:
    """Return True if an input must be in the workspace; others, such as downloaded weights, need not."""
    init = artifact.result.get("init")  # of a fine-tuning: where its weights come from
    if read.setting == "init":
        return init == "pretrain"
    if read.setting != "backbone.weights":
        return True
    is_own = artifact.config().get("backbone", {}).get("weights") in WORKSPACE_WEIGHTS
    return is_own and init in (None, "backbone") and artifact.manifest["inputs"].get(read.input) != "none"


def _unfinished(stage: str, folder: Path) -> StatusRow | None:
    """Return the state of a partial folder; None if it is finished by now, or nothing was begun in it."""
    journals = list(folder.glob("resume/*.log"))  # of shards, which share the lock
    is_running = any(map(is_locked, [folder / "lock", *journals]))
    shards = describe_shards(folder / "resume")
    try:
        started = str(read_json(folder / "manifest.json").get("started", ""))
    except MissingError:
        if not is_running:
            return None
        started = ""
    remark = f"started {started[:16]}" + (f"; {shards}" if shards else "")
    if not is_running:
        next_step = (
            "run the missing shards, or any if none is missing" if shards else "run the same command to continue"
        )
        remark += f"; {next_step}"
    return StatusRow(stage, run_name(folder), "running" if is_running else "interrupted", (), "", remark)
