"""What is in a workspace: finished, interrupted and running stages, and what they were made from."""

import fcntl
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aligndet_cli.config import STAGES
from aligndet_cli.workspace import Artifact, Workspace, read_json

# Which finished stages an input of this name can come from.
_PRODUCERS = {"proposals": ("proposals",), "clusters": ("cluster",), "weights": ("pretrain-box", "finetune")}


@dataclass(frozen=True)
class StatusRow:
    """One run of one stage.

    Attributes:
        state: `complete`, `stale`, `interrupted` or `running`.
        made_from: the artifacts it read, `proposals/train2017` and the like.
        remark: why it is stale, or what came out of it.
    """

    stage: str
    run: str
    state: str
    made_from: tuple[str, ...]
    finished: str
    remark: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def collect_status(workspace: Workspace) -> list[StatusRow]:
    """All runs of the workspace, stage by stage, oldest first."""
    everything = {stage: workspace.artifacts(stage) for stage in STAGES}
    known = {artifact.content_hash: f"{stage}/{artifact.name}" for stage in STAGES for artifact in everything[stage]}
    rows = []
    for stage in STAGES:
        rows += [_finished(stage, artifact, known) for artifact in everything[stage]]
        rows += [_unfinished(stage, folder) for folder in workspace.partials(stage)]
    return rows


def _finished(stage: str, artifact: Artifact, known: dict[str, str]) -> StatusRow:
    made_from, lost = [], []
    for name, content_hash in artifact.manifest["inputs"].items():
        if content_hash in known:
            made_from.append(known[content_hash])
        elif name in _PRODUCERS and content_hash != "none":
            lost.append(name)
    remark = f"{', '.join(lost)} changed or gone since" if lost else _summary(artifact.result)
    state = "stale" if lost else "complete"
    return StatusRow(stage, artifact.name, state, tuple(made_from), artifact.manifest["finished"], remark)


def _unfinished(stage: str, folder: Path) -> StatusRow:
    name = folder.name.removeprefix(".").removesuffix(".partial")
    is_running = _is_locked(folder / "lock")
    manifest = folder / "manifest.json"
    started = str(read_json(manifest).get("started", "")) if manifest.exists() else ""
    remark = f"started {started[:16]}" + ("" if is_running else "; run the same command to continue")
    return StatusRow(stage, name, "running" if is_running else "interrupted", (), "", remark)


def _is_locked(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _summary(result: dict[str, Any]) -> str:
    numbers = [
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        for key, value in result.items()
        if isinstance(value, int | float | str) and key != "explanation"
    ]
    return ", ".join(numbers[:4])
