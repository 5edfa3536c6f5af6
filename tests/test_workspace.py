"""The folder in which stages meet, and what a crash at any step of finishing leaves of it."""

import errno
import itertools
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli import workspace
from aligndet_cli.config import StageConfig
from aligndet_cli.errors import ChangedError, ConfigError, RunError
from aligndet_cli.files import check_output_file, is_locked, read_json, write_bytes, write_json
from aligndet_cli.workspace import Output, Workspace, read_manifest
from helpers.commandline import files_of

INPUTS = {"data": "abc"}


class Killed(BaseException):
    """Stands for `kill -9`: nothing of ours runs after it."""


def plan(root: Path, *, seed: int = 0, inputs: dict[str, str] | None = None, **how: bool) -> Output:
    return Workspace(root).plan_output("proposals", "a", StageConfig(seed=seed), inputs or INPUTS, **how)


def finish(output: Output, content: str) -> None:
    with output.lock():
        output.begin(StageConfig())
        (output.partial / "resume").mkdir()
        (output.partial / "resume" / "x").write_text("only for resuming")
        (output.partial / "boxes.npy").write_text(content)
        output.complete({"number": 7}, content=["boxes.npy"])


def test_start_complete_and_refuse(tmp_path: Path) -> None:
    output = plan(tmp_path)
    assert output.action == "start" and list(tmp_path.iterdir()) == []
    finish(output, "old")
    assert set(files_of(output.folder)) == {"boxes.npy", "config.json", "manifest.json"}
    assert plan(tmp_path).action == "complete"
    assert Workspace(tmp_path).require("proposals").result == {"number": 7}
    with pytest.raises(ConfigError, match=r"a is complete with other settings: seed: 0 -> 3\. Use --force to redo it"):
        plan(tmp_path, seed=3)
    with pytest.raises(ConfigError, match=r"input data: abc -> xyz"):
        plan(tmp_path, inputs={"data": "xyz"})
    assert plan(tmp_path, seed=3, force=True).action == "start"


def test_a_setting_that_is_newer_than_the_artifact_is_no_change(tmp_path: Path) -> None:
    finish(plan(tmp_path), "old")
    file = tmp_path / "proposals/a/manifest.json"
    manifest = read_json(file)
    del manifest["settings"]["data.limit"]
    write_json(file, manifest)
    assert plan(tmp_path).action == "complete"
    limited = StageConfig.model_validate({"data": {"limit": 3}})
    with pytest.raises(ConfigError, match=r"data\.limit: None -> 3"):
        Workspace(tmp_path).plan_output("proposals", "a", limited, INPUTS)


def test_resume_and_refuse(tmp_path: Path) -> None:
    output = plan(tmp_path)
    with output.lock():
        output.begin(StageConfig())
        (output.partial / "work").write_text("half")
    assert plan(tmp_path).action == "resume"
    with pytest.raises(ConfigError, match=r"was interrupted with other settings: seed: 0 -> 3\. Use --no-resume"):
        plan(tmp_path, seed=3)
    again = plan(tmp_path, resume=False)
    assert again.action == "start"
    with again.lock():
        again.begin(StageConfig())
    assert set(files_of(again.partial)) == {"config.json", "manifest.json", "lock"}


def test_only_one_process_writes(tmp_path: Path) -> None:
    output = plan(tmp_path)
    with output.lock():
        assert is_locked(output.partial / "lock")
        said = rf"another aligndet process \(pid {os.getpid()} on .*\) is writing it"
        with pytest.raises(RunError, match=said), plan(tmp_path).lock():
            pass
    assert not is_locked(output.partial / "lock")


@contextmanager
def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the process before the Nth rename or deletion."""
    steps = itertools.count(1)

    def deadly(original):
        def call(*args, **kwargs):
            if next(steps) == step:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, deadly(getattr(owner, name)))
        yield


@pytest.mark.parametrize("is_redo", [False, True])
def test_killed_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_redo: bool) -> None:
    """At each step either the old or the new artifact is there, whole, once anybody looks."""
    num_killed = 0
    for step in range(1, 20):
        root = tmp_path / str(step)
        if is_redo:
            finish(plan(root), "old")
        output = plan(root, force=is_redo)
        try:
            with dying_at(step, monkeypatch):
                finish(output, "new")
        except Killed:
            num_killed += 1
        found = plan(root)
        if found.action == "complete":
            content = read_json(found.folder / "manifest.json")
            assert content["result"] == {"number": 7}
            assert set(files_of(found.folder)) == {"boxes.npy", "config.json", "manifest.json"}, step
        else:
            assert found.action in ("start", "resume") and not found.folder.exists() and not is_redo, step
            finish(plan(root, resume=False), "new")
        boxes = (found.folder / "boxes.npy").read_text()
        assert boxes == "new" or is_redo and boxes == "old", step
        assert not list((root / "proposals").glob(".*.old")), step
    # begin: 2 files written (and in a redo nothing to clear); complete: manifest, resume, renames, lock, old folder.
    assert num_killed >= (8 if is_redo else 6)


def test_no_resume_forgets_the_old_run_before_it_clears_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = plan(tmp_path)
    with output.lock():
        output.begin(StageConfig())
        for name in ("a", "b", "c"):
            (output.partial / name).write_text("half")
    again = plan(tmp_path, resume=False)
    with pytest.raises(Killed), dying_at(3, monkeypatch):
        again.begin(StageConfig())
    assert plan(tmp_path).action == "start"  # never a resume of what is half cleared


def test_a_finished_run_is_not_put_in_place_under_its_writer(tmp_path: Path) -> None:
    output = plan(tmp_path)
    with output.lock():
        output.begin(StageConfig())
        write_json(output.partial / "manifest.json", {**output.header, "finished": "now", "content_hash": "x"})
        plan(tmp_path)
        assert output.partial.exists() and not output.folder.exists()
    plan(tmp_path)
    assert output.folder.exists() and not output.partial.exists()


def test_a_run_that_is_finished_meanwhile_is_not_put_in_place_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks of `plan` at the partial folder, the process that writes it completes it."""
    finish(plan(tmp_path), "old")
    output = plan(tmp_path, force=True)
    with output.lock():
        output.begin(StageConfig())
        manifest = {**output.header, "finished": "now", "content_hash": "x", "result": {}}
        write_json(output.partial / "manifest.json", manifest)

        def complete_after(file: Path) -> Any:
            content = read_json(file)
            if output.partial.exists():
                workspace._put_in_place(output.folder, output.partial)
            return content

        with monkeypatch.context() as patch:
            patch.setattr(workspace, "read_json", complete_after)
            assert plan(tmp_path).action == "complete"
    assert read_json(output.folder / "manifest.json") == manifest


def test_a_run_that_is_redone_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(plan(tmp_path), "old")
    seen = []

    def looking(original):
        def call(*args, **kwargs):
            with monkeypatch.context() as patch:
                patch.undo()
                seen.append([artifact.name for artifact in Workspace(tmp_path).artifacts("proposals")])
            return original(*args, **kwargs)

        return call

    output = plan(tmp_path, force=True)
    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, looking(getattr(owner, name)))
        finish(output, "new")
    assert len(seen) > 6 and seen == [["a"]] * len(seen)


def test_a_run_that_is_redone_during_a_look_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first look at a manifest the old run is moved away, before the next one the new one is there."""
    finish(plan(tmp_path), "old")
    output, looks = plan(tmp_path, force=True), itertools.count(1)
    retired = output.folder.with_name(".a.old")

    def move_and_read(folder: Path) -> dict[str, Any]:
        look = next(looks)
        if look == 1:
            output.folder.rename(retired)
        elif look == 2:
            output.partial.rename(output.folder)
            shutil.rmtree(retired)
        return read_manifest(folder)

    with output.lock():
        output.begin(StageConfig())
        monkeypatch.setattr(workspace, "read_manifest", move_and_read)
        assert [artifact.name for artifact in Workspace(tmp_path).artifacts("proposals")] == ["a"]


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    write_bytes(file, b"old")
    with pytest.raises(Killed), dying_at(1, monkeypatch):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    with pytest.raises(ConfigError, match=r"x\.json: damaged .*; delete its folder and run the stage again"):
        read_json(file)


def test_pipes_and_links_stay_what_they_are(tmp_path: Path) -> None:
    write_bytes(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to("there")
    write_bytes(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_bytes() == b"x"


def test_a_full_disk_keeps_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(tmp_path / "x", b"x")
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_output_files_are_checked_first(tmp_path: Path) -> None:
    check_output_file(tmp_path / "x.csv")
    (tmp_path / "manifest.json").touch()
    for file, said in (
        (tmp_path, "is a folder; name a file"),
        (Path("-"), "name a file; what goes to stdout"),
        (tmp_path / "none" / "x.csv", "no such folder as"),
        (tmp_path / "weights.pt", "is a finished run; name a file elsewhere"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_output_file(file)
    with pytest.raises(ConfigError, match="missing; delete its folder and run the stage again"):
        read_json(tmp_path / "config.json")


def test_two_commands_that_remember_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def another_first(number: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        Workspace(tmp_path).remember("data", "a longer place")
        fsync(number)

    monkeypatch.setattr(os, "fsync", another_first)
    Workspace(tmp_path).remember("data", "place")
    assert Workspace(tmp_path).recall("data") == "place"
    assert [file.name for file in tmp_path.iterdir()] == ["workspace.json"]


def test_damaged_memory_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "workspace.json").write_text("{half")
    with pytest.raises(ConfigError, match=r"workspace\.json: damaged; delete this one file and name DATA again"):
        Workspace(tmp_path).recall("data")


def test_a_refusal_keeps_its_parts_between_processes() -> None:
    differences = ({"seed": "seed: 0 -> 3"}, {"data": "data: x -> y"})
    error = pickle.loads(pickle.dumps(ChangedError("a is complete", "--force", *differences, Path("a"))))
    assert error.told == "a is complete with other settings: seed: 0 -> 3; input data: x -> y"
    assert (str(error), error.folder) == (f"{error.told}. Use --force", Path("a"))
