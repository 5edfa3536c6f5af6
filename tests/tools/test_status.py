"""What `status` says while other commands are at work."""

from pathlib import Path

import pytest

from aligndet_cli.config import StageConfig
from aligndet_cli.files import write_json
from aligndet_cli.tools.status import collect_status
from aligndet_cli.workspace import Artifact, Output, Workspace

ARTIFACTS = Workspace.artifacts


def states(workspace: Workspace) -> dict[str, str]:
    return {f"{row.stage}/{row.run}": row.state for row in collect_status(workspace)}


def begin(workspace: Workspace, stage: str, **inputs: str) -> Output:
    output = workspace.plan_output(stage, "a", StageConfig(), inputs)
    output.partial.mkdir(parents=True)
    (output.partial / "lock").touch()
    output.begin(StageConfig())
    (output.partial / "content").write_text(stage)
    return output


@pytest.mark.parametrize(("is_before", "expected"), [(True, "complete"), (False, "running")])
def test_a_run_that_is_finished_during_a_look_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_before: bool, expected: str
) -> None:
    """Finished just before the look at finished runs, or just after it."""
    workspace = Workspace(tmp_path)
    output = begin(workspace, "proposals")
    assert states(workspace) == {"proposals/a": "interrupted"}
    with output.lock():
        assert states(workspace) == {"proposals/a": "running"}

    def finish_too(self: Workspace, stage: str) -> list[Artifact]:
        before = ARTIFACTS(self, stage)
        if stage == "proposals":
            output.complete({}, ["content"])
        return ARTIFACTS(self, stage) if is_before else before

    monkeypatch.setattr(Workspace, "artifacts", finish_too)
    with output.lock():
        rows = collect_status(workspace)
    assert [(f"{row.stage}/{row.run}", row.state) for row in rows] == [("proposals/a", expected)]


def test_runs_that_are_made_during_a_look_are_not_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a look at one of the stages, a run of it is finished and one that was made from it."""
    workspace = Workspace(tmp_path)

    def make_after(self: Workspace, stage: str) -> list[Artifact]:
        found = ARTIFACTS(self, stage)
        if stage == "finetune" and not found:
            tuned = begin(workspace, "finetune").complete({}, ["content"])
            begin(workspace, "evaluate", weights=tuned.content_hash).complete({}, ["content"])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "artifacts", make_after)
        assert "stale" not in states(workspace).values()
    assert states(workspace) == {"finetune/a": "complete", "evaluate/a": "complete"}


def test_a_folder_in_which_nothing_was_begun_is_no_run(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    output = workspace.plan_output("proposals", "a", StageConfig(), {})
    with output.lock():
        assert states(workspace) == {"proposals/a": "running"}
    assert states(workspace) == {}


def test_a_run_that_is_redone_during_a_look_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are read after its manifest, and are not there for a moment."""
    workspace = Workspace(tmp_path)
    artifact = begin(workspace, "finetune").complete({"init": "backbone"}, ["content"])
    config = artifact.folder / "config.json"
    content = config.read_text()
    config.unlink()
    num_looks = 0

    def put_back(self: Workspace, stage: str) -> list[Artifact]:
        nonlocal num_looks
        num_looks += stage == "finetune"
        if num_looks == 2:
            config.write_text(content)
        return ARTIFACTS(self, stage)

    monkeypatch.setattr(Workspace, "artifacts", put_back)
    assert states(workspace) == {"finetune/a": "complete"} and num_looks == 2


def test_a_damaged_run_is_told(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    artifact = begin(workspace, "proposals").complete({}, ["content"])
    (artifact.folder / "manifest.json").write_text("{half")
    with pytest.raises(Exception, match=r"manifest\.json: damaged"):
        collect_status(workspace)
    write_json(artifact.folder / "manifest.json", artifact.manifest)
    assert states(workspace) == {"proposals/a": "complete"}
