import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from aligndet_cli.artifacts.proposals import STORE_FILES, ProposalStore
from aligndet_cli.errors import ConfigError, DataError, Preempted
from aligndet_cli.files import read_json
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage
from aligndet_cli.proposals.journal import Journals
from aligndet_cli.workspace import Workspace

NUM_IMAGES = 7  # of `root`
RUN_SCRIPT = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from aligndet_cli.proposals import stage
from aligndet_cli.processes.launch import Process
from aligndet_cli.workspace import Workspace
if __name__ == "__main__":
    append = stage.Journal.append
    stage.Journal.append = lambda self, found: (time.sleep(0.1), append(self, found))
    config = stage.ProposalsConfig.model_validate_json(Path(sys.argv[1]).read_text())
    plan = stage.prepare(config, Workspace(Path(sys.argv[2])))
    with nullcontext() if plan.output.is_shared else plan.output.lock():
        stage.run(plan, Process())
"""


def run_stage(config, folder: Path, **options) -> Path:
    plan = stage.prepare(config, Workspace(folder), **options)
    with nullcontext() if plan.output.is_shared else plan.output.lock():
        stage.run(plan, Process())
    return plan.output.folder


def num_saved(folder: Path) -> int:
    """Images of `root` that are in the journals of an interrupted run."""
    return NUM_IMAGES - Journals(folder / "proposals" / ".train2017.partial" / "resume", NUM_IMAGES).missing().size


def is_running(pid: str) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty once it has ended but nobody has asked how
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_artifact_is_complete(tmp_path, root, make_search_config):
    folder = run_stage(make_search_config(), tmp_path / "ws")
    assert folder == tmp_path / "ws" / "proposals" / "train2017"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    plots = {f"plots/{name}.png" for name in ("count", "size", "aspect", "recall")}
    assert names == {*STORE_FILES, "skipped.jsonl", "report.json", "sheet.jpg", "config.json", "manifest.json", *plots}
    store = ProposalStore(folder)
    assert store.image_ids.tolist() == [100, 103, 106, 109, 112, 115, 118]
    assert store.total > 14
    manifest = read_json(folder / "manifest.json")
    assert manifest["result"]["images"] == 7
    assert manifest["result"]["proposals"] == store.total
    assert manifest["result"]["recall_at_iou_0.5"] > 0.7
    assert str(root) not in (folder / "report.json").read_text()


def test_result_does_not_depend_on_workers_or_backend(tmp_path, make_search_config, contents_of):
    one = run_stage(make_search_config(), tmp_path / "one")
    for num_workers, backend in ((1, "processes"), (2, "processes"), (4, "processes"), (4, "threads")):
        config = make_search_config(num_workers=num_workers, backend=backend)
        assert contents_of(run_stage(config, tmp_path / f"{num_workers} {backend}")) == contents_of(one)
    assert stage.prepare(make_search_config(num_workers=2), Workspace(tmp_path / "one")).output.action == "complete"


def test_kill_and_resume_gives_the_same_files(tmp_path, make_search_config, contents_of, monkeypatch):
    config = make_search_config(num_workers=2, backend="processes")
    expected = contents_of(run_stage(config, tmp_path / "whole"))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "script.py").write_text(RUN_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.json"), str(tmp_path / "killed")]
    killed = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[2])})
    deadline = time.monotonic() + 60
    while num_saved(tmp_path / "killed") < 3:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(children) >= 2
    while any(is_running(child) for child in children):  # no worker outlives the command
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 3 <= (kept := num_saved(tmp_path / "killed")) < NUM_IMAGES
    journal = tmp_path / "killed" / "proposals" / ".train2017.partial" / "resume" / "1-of-1.log"
    content = journal.read_bytes()
    journal.write_bytes(content + b"half a record")

    plan = stage.prepare(config, Workspace(tmp_path / "killed"))
    assert plan.output.action == "resume"
    original, before = stage.Journal.append, []

    def append_and_note(self, result):
        before.append(journal.read_bytes())
        original(self, result)

    monkeypatch.setattr(stage.Journal, "append", append_and_note)
    assert contents_of(run_stage(config, tmp_path / "killed")) == expected
    assert len(before) == NUM_IMAGES - kept  # nothing is done twice
    assert before[0] == content


@pytest.mark.parametrize("backend", ["processes", "threads"])
def test_stop_signal_saves_and_the_next_run_continues(tmp_path, make_search_config, contents_of, monkeypatch, backend):
    expected = contents_of(run_stage(make_search_config(), tmp_path / "whole"))
    original = stage.Journal.append

    def append_and_signal(self, found):
        original(self, found)
        os.kill(os.getpid(), signal.SIGTERM)

    config = make_search_config(num_workers=2, backend=backend)
    monkeypatch.setattr(stage.Journal, "append", append_and_signal)
    with pytest.raises(Preempted):
        run_stage(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert num_saved(tmp_path / "stopped") == 1
    assert contents_of(run_stage(config, tmp_path / "stopped")) == expected


def test_unreadable_images_are_skipped_and_listed(tmp_path, root, make_search_config):
    (root / "train2017" / "000.png").write_bytes(b"")
    (root / "train2017" / "004.png").write_text("not an image")
    cv2.imwrite(str(root / "train2017" / "006.png"), np.zeros((50, 60, 3), np.uint8))  # labels say 83 x 127
    folder = run_stage(make_search_config(num_workers=2), tmp_path / "ws")
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    assert [(line.count('"file": "000.png"'), "empty" in line) for line in lines][0] == (1, True)
    assert '"file": "004.png"' in lines[1]
    assert "is 60x50 pixels but its labels say 127x83" in lines[2]
    assert str(root) not in "".join(lines)
    assert ProposalStore(folder).image_ids.tolist() == [103, 106, 109, 115]
    assert read_json(folder / "manifest.json")["result"]["skipped_images"] == 3
    with pytest.raises(DataError, match=r"skipped\.jsonl.*--force"):
        stage.prepare(make_search_config(on_error="fail"), Workspace(tmp_path / "ws"))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_on_error_fail_names_the_file(tmp_path, root, make_search_config, num_workers):
    (root / "train2017" / "006.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train2017/006\.png: .*--on-error skip"):
        run_stage(make_search_config(on_error="fail", num_workers=num_workers), tmp_path / "ws")
    # The same command without it continues and skips, although the other way was asked for at first.
    assert stage.prepare(make_search_config(), Workspace(tmp_path / "ws")).output.action == "resume"
    folder = run_stage(make_search_config(), tmp_path / "ws")
    assert read_json(folder / "manifest.json")["result"]["skipped_images"] == 1


def test_on_error_fail_looks_again_at_what_was_skipped_before(tmp_path, root, make_search_config, monkeypatch):
    good = (root / "train2017" / "000.png").read_bytes()
    (root / "train2017" / "000.png").write_bytes(bytes(len(good)))  # same size: the same data to `open_images`
    original = stage.Journal.append

    def append_and_signal(self, result):
        original(self, result)
        if result.reason:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(stage.Journal, "append", append_and_signal)
        run_stage(make_search_config(), tmp_path / "ws")
    with pytest.raises(DataError, match=r"000\.png"):
        run_stage(make_search_config(on_error="fail"), tmp_path / "ws")
    (root / "train2017" / "000.png").write_bytes(good)
    folder = run_stage(make_search_config(on_error="fail"), tmp_path / "ws")
    assert len(ProposalStore(folder)) == 7


def test_no_readable_image_is_an_error_that_can_be_repaired(tmp_path, root, make_search_config):
    shutil.copytree(root / "train2017", tmp_path / "good")
    for file in (root / "train2017").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 7 images"):
        run_stage(make_search_config(), tmp_path / "ws")
    assert not (tmp_path / "ws/proposals/train2017").exists()
    for file in (tmp_path / "good").iterdir():
        (root / "train2017" / file.name).write_bytes(file.read_bytes())
    assert len(ProposalStore(run_stage(make_search_config(), tmp_path / "ws"))) == 7


def test_images_without_proposals_stay_in_the_store(tmp_path, root, make_search_config):
    for name in ("000.png", "006.png"):
        cv2.imwrite(str(root / "train2017" / name), np.full((83, 127, 3), 90, np.uint8))
    folder = run_stage(make_search_config(), tmp_path / "ws")
    counts = ProposalStore(folder).counts.tolist()
    assert counts[0] == counts[6] == 0
    assert min(counts[1:6]) > 0
    assert read_json(folder / "report.json")["images_without_proposals"] == 2


def test_odd_images(tmp_path, make_search_config):
    folder = tmp_path / "odd"
    folder.mkdir()
    rng = np.random.default_rng(0)
    photo = np.kron(rng.integers(0, 256, (6, 8), dtype=np.uint8), np.ones((20, 20), np.uint8))  # 120x160 of squares
    images = {
        "dot.png": np.full((1, 1, 3), 7, np.uint8),
        "dot.jpg": np.full((1, 1, 3), 7, np.uint8),
        "gray.jpg": photo,
        "noise.png": rng.integers(0, 256, (120, 160, 3), dtype=np.uint8),
        "panorama.jpg": rng.integers(0, 256, (2, 20000, 3), dtype=np.uint8),
        "tower.jpg": rng.integers(0, 256, (20000, 2, 3), dtype=np.uint8),
        "twelve-megapixel.jpg": cv2.resize(photo, (4000, 3000), interpolation=cv2.INTER_NEAREST),
        "uniform.png": np.full((120, 160, 3), 90, np.uint8),
    }
    for name, pixels in images.items():
        cv2.imwrite(str(folder / name), pixels)
    Image.fromarray(photo).convert("1").save(folder / "black-and-white.png")
    config = make_search_config(data={"root": folder, "format": "folder"}, num_workers=2, working_size=160)
    store = ProposalStore(run_stage(config, tmp_path / "ws"))
    found = {entry.file_name: (entry.size_hw, entry.count) for entry in store.images()}
    assert found.keys() == {*images, "black-and-white.png"}
    assert all(size_hw == images[name].shape[:2] for name, (size_hw, _) in found.items() if name in images)
    without = {"dot.png", "dot.jpg", "panorama.jpg", "tower.jpg", "uniform.png"}
    assert all(found[name][1] == 0 for name in without)
    assert all(found[name][1] > 2 for name in ("gray.jpg", "twelve-megapixel.jpg"))
    # Boxes of the reduced image are in pixels of the full one: some reach its far edges.
    index = list(found).index("twelve-megapixel.jpg")
    assert store.boxes_of(index)[:, 2:].max(axis=0).tolist() == [4000, 3000]


def test_equal_files_are_counted(tmp_path, root, make_search_config):
    for name in ("003.png", "005.png"):
        shutil.copy(root / "train2017" / "001.png", root / "train2017" / name)
    report = read_json(run_stage(make_search_config(), tmp_path / "ws") / "report.json")
    assert (report["duplicate_images"], report["duplicate_share"]) == (2, round(2 / 7, 4))


def test_ground_truth_boxes_are_taken_without_crowds(tmp_path, make_config):
    config = make_config(source="ground-truth")
    plan = stage.prepare(config, Workspace(tmp_path / "ws"))
    folder = run_stage(config, tmp_path / "ws")
    store = ProposalStore(folder)
    assert store.counts.tolist() == [1] * 7
    expected = plan.image_set.boxes[~plan.image_set.is_crowd]
    np.testing.assert_array_equal(store.boxes, expected)
    labels = read_json(folder / "report.json")["labels"]["all"]
    perfect = {"50": 1.0, "100": 1.0, "300": 1.0, "all": 1.0}
    assert (labels["objects"], labels["recall_at_iou_0.5"], labels["mean_best_overlap"]) == (7, perfect, perfect)


def test_settings_without_effect_are_refused(tmp_path, make_config, root):
    workspace = Workspace(tmp_path / "ws")
    with pytest.raises(ConfigError, match="nms: no effect with --source ground-truth"):
        stage.prepare(make_config(source="ground-truth", nms=0.7), workspace)
    with pytest.raises(ConfigError, match="exclude each other"):
        stage.prepare(make_config(source="ground-truth", import_file=root / "x.json"), workspace)


def test_changed_settings_are_refused_and_max_per_image_is_kept(tmp_path, make_search_config):
    folder = run_stage(make_search_config(max_per_image=2), tmp_path / "ws")
    assert ProposalStore(folder).counts.max() == 2
    with pytest.raises(ConfigError, match=r"max_per_image: 2 -> 3.*--force"):
        stage.prepare(make_search_config(max_per_image=3), Workspace(tmp_path / "ws"))
    run_stage(make_search_config(max_per_image=3), tmp_path / "ws", force=True)
    assert ProposalStore(folder).counts.max() == 3


def test_describe_shows_what_takes_effect(tmp_path, make_search_config, make_config):
    shown = stage.describe(stage.prepare(make_search_config(name="mine"), Workspace(tmp_path / "ws")))
    assert shown["mode"] == "opencv-single"
    assert shown["output"].endswith("proposals/mine")
    shown = stage.describe(stage.prepare(make_config(source="ground-truth"), Workspace(tmp_path / "ws")))
    assert "mode" not in shown
    assert not (tmp_path / "ws").exists()


def test_only_the_main_process_writes(tmp_path, make_search_config):
    plan = stage.prepare(make_search_config(), Workspace(tmp_path / "ws"))
    stage.run(plan, Process(rank=1, world_size=2))
    assert not (tmp_path / "ws").exists()


def test_real_photos(tmp_path, shared_data, make_config):
    config = make_config(data={"root": shared_data / "minicoco", "limit": 6}, num_workers=2)
    folder = run_stage(config, tmp_path / "ws")
    labels = read_json(folder / "report.json")["labels"]
    assert ProposalStore(folder).total > 400
    # On all 128 photos 78 % of the objects of 32 px and more are found; six photos vary.
    assert labels["reach_min_size"]["recall_at_iou_0.5"]["all"] > 0.6
