import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.errors import ConfigError, DataError, RunError
from aligndet_cli.files import is_locked, read_json
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage
from aligndet_cli.proposals.journal import Journal
from aligndet_cli.proposals.share import Share, describe_missing, describe_shards
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet, files_of

RUN_SCRIPT = """
import sys, time
from pathlib import Path
from aligndet_cli.proposals import stage
from aligndet_cli.processes.launch import Process
from aligndet_cli.workspace import Workspace
if __name__ == "__main__":
    plans = [
        stage.prepare(stage.ProposalsConfig.model_validate_json(text), Workspace(Path(sys.argv[1])))
        for text in sys.argv[2:]
    ]
    print("ready", flush=True)
    sys.stdin.readline()
    for plan in plans:
        stage.run(plan, Process())
"""


@pytest.fixture
def run_shard(tmp_path, make_search_config):
    """Run a stage whole or a shard of it in a workspace; returns the plan."""

    def run(name: str, shard: str | None = None, **options) -> stage.Plan:
        how = {key: options.pop(key) for key in ("resume", "force") if key in options}
        plan = stage.prepare(make_search_config(shard=shard, **options), Workspace(tmp_path / name), **how)
        with nullcontext() if plan.output.is_shared else plan.output.lock():
            stage.run(plan, Process())
        return plan

    return run


def orders() -> Iterator[tuple[str, ...]]:
    yield from itertools.permutations(["1/3", "2/3", "3/3"])


def test_shards_in_any_order_give_what_one_run_gives(tmp_path, run_shard, contents_of):
    whole = run_shard("whole").output.folder
    for number, order in enumerate(orders()):
        for shard in order[:2]:
            plan = run_shard(str(number), shard)
            assert not plan.output.folder.exists()
        # 7 images: shard 1 has those at 0, 3 and 6, the others two each.
        assert stage.conclude(plan).result == {"shards_done": "2 of 3", "shards_missing": order[2][0]}
        folder = run_shard(str(number), order[2]).output.folder
        assert contents_of(folder) == contents_of(whole)
        assert files_of(folder).keys() == files_of(whole).keys()
        assert read_json(folder / "config.json")["shard"] is None
        result = read_json(folder / "manifest.json")["result"]
        assert result == read_json(whole / "manifest.json")["result"]


def test_a_shard_does_only_its_share_and_nothing_twice(run_shard, monkeypatch):
    done = []
    append = Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, found: (done.append(found.position), append(self, found)))
    run_shard("ws", "2/3")
    run_shard("ws", "2/3")
    assert sorted(done) == [1, 4]
    run_shard("ws", "1/2")  # another division: 0, 2, 4, 6 but 4 is done
    assert sorted(done[2:]) == [0, 2, 6]
    plan = run_shard("ws")  # the whole, without --shard
    assert sorted(done[5:]) == [3, 5]
    assert len(ProposalStore(plan.output.folder)) == 7


@pytest.mark.plots
@pytest.mark.parametrize("same_twice", [False, True])
def test_shards_at_the_same_time(tmp_path, run_shard, make_search_config, contents_of, same_twice):
    whole = run_shard("whole").output.folder
    shards = ["1/3", "2/3", "3/3", *(["2/3"] if same_twice else [])]
    started = []
    for shard in shards:
        text = make_search_config(shard=shard).model_dump_json()
        command = [sys.executable, "-c", RUN_SCRIPT, str(tmp_path / "ws"), text]
        started.append(subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True))
    for process in started:  # all have planned before any begins
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    ended = [process.communicate("go\n", timeout=60) for process in started]
    failed = [error for process, (_, error) in zip(started, ended, strict=True) if process.returncode]
    # A shard that is started twice ends with its line, unless the first was done by then.
    assert len(failed) <= same_twice
    assert all("another aligndet process" in error for error in failed)
    assert contents_of(tmp_path / "ws" / "proposals" / "train2017") == contents_of(whole)
    assert not list((tmp_path / "ws" / "proposals").glob(".*"))


def test_while_a_shard_runs(tmp_path, run_shard, monkeypatch):
    partial = tmp_path / "ws" / "proposals" / ".train2017.partial"
    seen = []
    append = Journal.append

    def look_around(self, found):
        append(self, found)
        if not seen:
            seen.append(is_locked(partial / "resume" / "1-of-2.log"))
            with pytest.raises(RunError, match="1-of-2: another aligndet process"):
                run_shard("ws", "1/2")
            with pytest.raises(RunError, match="another aligndet process"):
                run_shard("ws")
            seen.append(aligndet("status", "-w", tmp_path / "ws").stdout)
            run_shard("ws", "2/2")  # ends, but is not the last one

    monkeypatch.setattr(Journal, "append", look_around)
    plan = run_shard("ws", "1/2")
    assert seen[0] is True and "running" in seen[1] and "0 of 2 shards" in seen[1]
    assert len(ProposalStore(plan.output.folder)) == 7 and not partial.exists()


def test_interrupted_shard_continues_and_the_others_wait_for_it(run_shard, monkeypatch, contents_of):
    whole = run_shard("whole").output.folder
    append = Journal.append

    def die_after_one(self, found):
        append(self, found)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", die_after_one)
    with pytest.raises(KeyboardInterrupt):
        run_shard("ws", "1/2")
    monkeypatch.undo()
    plan = run_shard("ws", "2/2")
    assert stage.conclude(plan).result == {"shards_done": "1 of 2", "shards_missing": "1"}
    assert contents_of(run_shard("ws", "1/2").output.folder) == contents_of(whole)


def test_command_line(tmp_path, root, run_shard):
    whole = run_shard("whole").output.folder
    words = ("proposals", root, "-w", tmp_path / "ws", "--mode", "opencv-single", "--min-size", "20")
    words = (*words, "--num-workers", "1")
    first = aligndet(*words, "--shard", "1/2", "--json").json()
    assert (first["status"], first["result"], first["shards_done"], first["shards_missing"]) == (
        "shard done",
        {},
        "1 of 2",
        "2",
    )
    status = aligndet("status", "-w", tmp_path / "ws").stdout
    assert "interrupted" in status and "1 of 2 shards; run the missing shards" in status
    assert "shard done: " in aligndet(*words, "--shard", "1/2").stdout
    last = aligndet(*words, "--shard", "2/2", "--json").json()
    assert (last["status"], last["result"]["images"]) == ("done", 7)
    assert "already complete" in aligndet(*words, "--shard", "1/2").stdout
    boxes = (tmp_path / "ws" / "proposals" / "train2017" / "boxes.npy").read_bytes()
    assert boxes == (whole / "boxes.npy").read_bytes()


def test_what_cannot_be(run_shard, root):
    for text in ("0/3", "4/3", "3", "a/b", "1/501", "-1/3", "1/3/5"):
        with pytest.raises(ConfigError, match="I/N"):
            run_shard("ws", text)
    with pytest.raises(ConfigError, match=r"--no-resume.*--force"):
        run_shard("ws", "1/3", resume=False)
    run_shard("ws", "1/3")
    with pytest.raises(ConfigError, match=r"min_size: 20 -> 21.*--no-resume"):
        run_shard("ws", "2/3", min_size=21)
    plan = run_shard("ws", "2/3", min_size=21, force=True)  # what the first error names
    assert stage.conclude(plan).result == {"shards_done": "1 of 3", "shards_missing": "1, 3"}


def test_redo_of_a_finished_artifact_in_shards(run_shard):
    folder = run_shard("ws").output.folder
    run_shard("ws", "1/2", force=True, max_per_image=1)
    assert ProposalStore(folder).counts.max() > 1  # the old one stays until the new one is there
    run_shard("ws", "2/2", force=True, max_per_image=1)
    assert ProposalStore(folder).counts.max() == 1


def test_skipped_by_another_shard_is_refused_with_on_error_fail(root, run_shard):
    (root / "train2017" / "003.png").write_bytes(b"")
    run_shard("ws", "2/2")
    with pytest.raises(DataError, match=r"003\.png"):
        run_shard("ws", "1/2", on_error="fail")
    assert len(ProposalStore(run_shard("ws", "1/2").output.folder)) == 6


def test_missing_shards_in_words(tmp_path):
    assert describe_missing(list(range(1, 15))) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 ..."
    assert describe_shards(tmp_path) == ""
    for share in (Share(2, 3), Share(1, 4)):
        share.journal_in(tmp_path).touch()
    Share(2, 3).mark_done(tmp_path)
    assert describe_shards(tmp_path) == "1 of 3 shards, 0 of 4 shards"


def test_every_image_is_in_one_share():
    parts = [Share(index, 3).of(np.arange(11)) for index in (1, 2, 3)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(11))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert Share.parse("3/17") == Share(3, 17)
