"""A finished or interrupted run is not asked for its flags again, in any stage."""

import json
import shutil
from pathlib import Path

import pytest

from aligndet_cli.config import STAGES, Sources
from aligndet_cli.driver import Request, execute
from aligndet_cli.errors import ChangedError
from aligndet_cli.workspace import Workspace
from helpers.commandline import CHAIN, aligndet, files_of

IMAGE = ("--backbone", "resnet18", "--image-size", "32", "--steps", "2", "--batch-size", "4")
WORDS = {**CHAIN, "pretrain-image": IMAGE, "evaluate": ("--batch-size", "2")}
# Words that make another result than `WORDS`, what is said then, and words that make no other.
DIFFERENT = {
    "pretrain-image": (("--steps", "3"), "training.steps: 2 -> 3"),
    "proposals": (("--min-size", "20"), "min_size: 16 -> 20"),
    "cluster": (("--k", "5"), "k: 4 -> 5"),
    "pretrain-box": (("--batch-size", "4"), "training.batch_size: 2 -> 4"),
    "finetune": (("--epochs", "3"), "training.epochs: None -> 3"),  # not with the --steps of before
    "evaluate": (("--batch-size", "1"), "batch_size: 2 -> 1"),
}
NEUTRAL = {
    **dict.fromkeys(STAGES, ("--num-workers", "0", "--accelerator", "cpu", "--progress", "none")),
    "proposals": ("--num-workers", "2", "--on-error", "skip", "--seed", "5"),
}
for trained in ("pretrain-image", "pretrain-box", "finetune"):
    NEUTRAL[trained] += ("--set", "training.log_every=3", "--set", "training.checkpoint.every_steps=7", "--no-compile")
NEUTRAL["evaluate"] += ("--fail-under", "0", "--seed", "5")


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run called "made" of every stage. Do not change it: copy it."""
    workspace = tmp_path_factory.mktemp("made") / "workspace"
    for stage in STAGES:
        data = (toy,) if stage in ("pretrain-image", "proposals") else ()
        aligndet(stage, *data, "-w", workspace, *WORDS[stage], "--name", "made")
    return workspace


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy in which the run of one stage has just begun."""
    workspace = Path(shutil.copytree(finished, tmp_path / "workspace"))
    folder = workspace / request.param / "made"
    partial = Workspace(workspace).partial(request.param, "made")
    partial.mkdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("content_hash", "finished", "result"):
        del manifest[key]
    (partial / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(folder / "config.json", partial)
    shutil.rmtree(folder)
    return workspace


NAME = ("--name", "made")


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_complete_whatever_is_left_out(finished: Path, stage: str) -> None:
    before = files_of(finished)
    for words in ((), WORDS[stage], NEUTRAL[stage], (*WORDS[stage], *NEUTRAL[stage])):
        ran = aligndet(stage, "-w", finished, *NAME, *words)
        assert ran.stdout.startswith("already complete: "), (words, ran.stdout)
        is_told = "as in the finished run: " in ran.stderr
        assert is_told == (WORDS[stage] != () and not set(WORDS[stage]) <= set(words)), (words, ran.stderr)
    assert files_of(finished) == before
    words, said = DIFFERENT[stage]
    line = aligndet(stage, "-w", finished, *NAME, *words, code=2).error_line()
    assert f"made is complete with other settings: {said}. Use --force" in line


@pytest.mark.parametrize(("interrupted", "stage"), [(stage, stage) for stage in STAGES], indirect=["interrupted"])
def test_an_interrupted_run_continues_whatever_is_left_out(interrupted: Path, stage: str) -> None:
    for words in ((), WORDS[stage], NEUTRAL[stage]):
        ran = aligndet(stage, "-w", interrupted, *NAME, *words, "--dry-run")
        assert "would be continued" in ran.stdout, (words, ran.stdout)
        assert ("as in the interrupted run: " in ran.stderr) == (words != WORDS[stage]), (words, ran.stderr)
    words, said = DIFFERENT[stage]
    line = aligndet(stage, "-w", interrupted, *NAME, *words, code=2).error_line()
    assert f"made was interrupted with other settings: {said}. Use --no-resume" in line
    for words in ("--no-resume", "--force"):  # begin again, at the defaults
        assert "as in the" not in aligndet(stage, "-w", interrupted, *NAME, *WORDS[stage], words, "-n").stderr
    ran = aligndet(stage, "-w", interrupted, *NAME)
    assert "which was interrupted" in ran.stderr
    assert aligndet(stage, "-w", interrupted, *NAME, *WORDS[stage]).stdout.startswith("already complete: ")


def test_compare_and_fail_under_ask_for_no_batch_size(finished: Path, tmp_path: Path) -> None:
    finished = Path(shutil.copytree(finished, tmp_path / "w"))
    aligndet("evaluate", "-w", finished, "--batch-size", "2")
    aligndet("evaluate", "-w", finished, "--batch-size", "2", "--name", "other")
    ran = aligndet("evaluate", "-w", finished, *NAME, "--compare", "other", "--fail-under", "0", "--json")
    assert ran.json()["status"] == "already complete" and "as in the finished run: batch_size=2\n" in ran.stderr
    assert ran.json()["compare"]["with"] == "other"


def test_other_data_is_refused_and_not_taken_from_the_run(finished: Path, toy: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "toy"))
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    line = aligndet("evaluate", data, "-w", finished, *NAME, code=2).error_line()
    assert "made is complete with other settings: input data: " in line


def test_a_study_takes_no_run_with_other_settings(finished: Path) -> None:
    sources = Sources(flags={"name": ("--name", "made")})
    with pytest.raises(ChangedError, match="batch_size: 2 -> 1"):
        execute(Request("evaluate", Workspace(finished), sources))


def test_what_no_version_knows_is_not_taken_over(finished: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(finished, tmp_path / "w"))
    file = workspace / "evaluate" / "made" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["settings"]["gone"] = 3
    manifest["settings"]["training.log_every"] = 7  # hashed once
    del manifest["settings"]["plots"]
    file.write_text(json.dumps(manifest))
    line = aligndet("evaluate", "-w", workspace, *NAME, code=2).error_line()
    assert "other settings: gone: 3 -> None. Use" in line
