"""`aligndet push`: put a run's weights and their card on a hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligndet_cli import cards, hub
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import read_json
from aligndet_cli.workspace import Artifact, Workspace

STAGES = ("finetune", "pretrain-box", "pretrain-image")
_FILES = ("weights.pt", "best.pt")


@dataclass(frozen=True)
class Pushed:
    """Result of `push`: the address, and the names of the files there."""

    address: str
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"address": self.address, "files": list(self.files)}

    def lines(self) -> list[str]:
        """Return lines for people."""
        return [self.address, *(f"  {file}" for file in self.files)]


def push(workspace: Workspace, run: str | None, target: str, *, is_private: bool = False) -> Pushed:
    """Upload the weights of a run, and a card with the numbers of its evaluations.

    Args:
        run: name of a fine-tuned run, or `STAGE/NAME`; None: the newest fine-tuned run.
        target: `hub:OWNER/NAME`.

    Raises:
        ConfigError: no such run or target, or see `hub.push_files`.
        RunError: see `hub.push_files`.
    """
    if not hub.is_on_hub(target):
        raise ConfigError(f"--to {target}: write hub:OWNER/NAME")
    advice = f"{run}: write the name of a finetune run, pretrain-box/NAME or pretrain-image/NAME"
    artifact = workspace.require_of(STAGES, run, advice)
    files: dict[str, Path | bytes] = {name: file for name in _FILES if (file := artifact.folder / name).exists()}
    text = cards.card(artifact.manifest, artifact.config(), _measured(workspace, artifact))
    files[cards.FILE] = text.encode()
    message = f"aligndet {artifact.manifest['packages'].get('aligndet', '')}: {artifact.name}"
    return Pushed(hub.push_files(target, files, message, is_private=is_private), tuple(files))


def _measured(workspace: Workspace, artifact: Artifact) -> list[dict[str, Any]]:
    """Return the metrics of the evaluations of these weights, oldest first."""
    evaluations = workspace.artifacts("evaluate")
    own = [one for one in evaluations if one.manifest["inputs"].get("weights") == artifact.content_hash]
    return [dict(read_json(one.folder / "metrics.json")) for one in own]
