"""`cluster` as a stage: its files, its refusals, and the same bytes after being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.cluster import kmeans, rows, stage
from aligndet_cli.errors import ConfigError, Preempted, RunError, WeightsError
from aligndet_cli.files import read_json
from aligndet_cli.processes.devices import Process
from aligndet_cli.workspace import Workspace

# Kills itself the hard way right before (even) or after (odd) the n-th piece of work is recorded.
KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from aligndet_cli.cluster import rows, stage
from aligndet_cli.processes.launch import Process
from aligndet_cli.workspace import Workspace

def die_at(function, moment):
    calls = 0
    def wrapped(*args):
        nonlocal calls
        for step in (0, 1):
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            if step == 0:
                function(*args)
    return wrapped

if __name__ == "__main__":
    rows.DoneMarks.mark = die_at(rows.DoneMarks.mark, int(sys.argv[3]))
    config = stage.ClusterConfig.model_validate_json(Path(sys.argv[1]).read_text())
    plan = stage.prepare(config, Workspace(Path(sys.argv[2])))
    with plan.output.lock():
        stage.run(plan, Process())
"""
FILES = {"labels.npy", "centroids.npy", "pca.npz", "report.json", "sheet.jpg", "config.json", "manifest.json"}


class Crash(Exception):
    """Stands for a crash in the middle of a run."""


def test_artifact(make_workspace, config, run_stage):
    workspace = make_workspace()
    folder = run_stage(config, workspace)
    assert folder == workspace.root / "cluster" / "train2017-k5"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == FILES | {"plots/sizes.png"}
    labels, centroids = np.load(folder / "labels.npy"), np.load(folder / "centroids.npy")
    assert labels.shape == (3 + 7 + 2 + 5 + 1,)
    assert labels.dtype == np.int16
    assert labels.min() >= 0
    assert labels.max() < 5
    assert (centroids.shape, centroids.dtype) == ((5, 4), np.float32)
    with np.load(folder / "pca.npz") as pca:
        assert pca["components"].shape == (4, 512)
    report = read_json(folder / "report.json")
    assert sum(entry["size"] for entry in report["clusters"]) == 18
    assert [entry["size"] for entry in report["clusters"]] == np.bincount(labels, minlength=5).tolist()
    assert sum(entry["clusters"] for entry in report["size_histogram"]) == 5
    assert report["num_images_with_proposals"] == 5
    assert cv2.imread(str(folder / "sheet.jpg")) is not None
    manifest = read_json(folder / "manifest.json")
    assert manifest["inputs"]["proposals"] == workspace.require("proposals").content_hash
    assert manifest["result"]["inertia"] == report["inertia"]
    assert stage.prepare(config, workspace).output.action == "complete"


def test_equal_boxes_get_equal_labels_and_rows_follow_the_store(make_workspace, make_config, run_stage, tmp_path):
    # Every image is one flat colour per half: left boxes of all images look alike, and so do right boxes.
    root = tmp_path / "halves"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations, expected = [], [], []
    for index in range(7):
        pixels = np.full((64, 128, 3), 10, dtype=np.uint8)
        pixels[:, 64:] = 245
        cv2.imwrite(str(root / "train2017" / f"{index}.png"), pixels)
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 128})
        for position in range(index):
            is_right = (position + index) % 2
            box = [64 * is_right, 0, 64, 64]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "bbox": box,
                    "area": 4096,
                    "iscrowd": 0,
                }
            )
            expected.append(is_right)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "half"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    workspace = make_workspace(data_root=root)
    boxes = ProposalStore(workspace.require("proposals").folder).boxes
    folder = run_stage(make_config(k=2, pca_dim=2, short_side=64, long_side=128), workspace)
    labels = np.load(folder / "labels.npy")
    is_right = np.asarray(boxes)[:, 0] >= 64
    assert sorted(is_right.tolist()) == sorted(bool(side) for side in expected)
    assert len(set(zip(labels.tolist(), is_right.tolist(), strict=True))) == 2


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_files(make_workspace, config, run_stage, contents_of, tmp_path):
    expected = contents_of(run_stage(config, make_workspace("whole")))
    workspace = make_workspace("killed")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "script.py").write_text(KILL_SCRIPT)
    arguments = [tmp_path / "script.py", tmp_path / "config.json", workspace.root, 3]
    environment = {**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[2])}
    ended = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert stage.prepare(config, workspace).output.action == "resume"
    assert contents_of(run_stage(config, workspace)) == expected


def test_crash_at_any_record_gives_the_same_files(make_workspace, config, run_stage, contents_of, monkeypatch):
    expected = contents_of(run_stage(config, make_workspace("whole")))
    clean = make_workspace("clean")
    calls = {"left": 0}

    def crashing(function):
        def wrapped(*args):
            if calls["left"] == 0:
                raise Crash
            calls["left"] -= 1
            return function(*args)

        return wrapped

    num_crashes = 0
    for moment in range(0, 40, 3):
        workspace = Workspace(clean.root.with_name("crashing"))
        shutil.rmtree(workspace.root, ignore_errors=True)
        shutil.copytree(clean.root, workspace.root)
        calls["left"] = moment
        with monkeypatch.context() as patch:
            for where, name in (
                (rows.DoneMarks, "mark"),
                (rows.RowFile, "write"),
                (kmeans, "save_arrays"),
                (stage, "save_array"),
                (stage, "write_json"),
                (stage, "draw_cluster_sheet"),
            ):
                patch.setattr(where, name, crashing(getattr(where, name)))
            try:
                run_stage(config, workspace)
            except Crash:
                num_crashes += 1
            else:
                break
        assert contents_of(run_stage(config, workspace)) == expected
    # 3 batches and 1 projected block (2 records each), PCA, 2 epochs, 4 files: 15, every third of which was tried.
    assert num_crashes == 5


def test_stopped_by_a_signal(make_workspace, config, run_stage, contents_of, monkeypatch):
    workspace = make_workspace()
    mark = rows.DoneMarks.mark

    def mark_and_signal(marks, index):
        mark(marks, index)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(rows.DoneMarks, "mark", mark_and_signal)
        run_stage(config, workspace)
    assert (workspace.root / "cluster" / ".train2017-k5.partial" / "resume" / "features.done").read_bytes() == b"\1\0\0"
    assert contents_of(run_stage(config, workspace)) == contents_of(run_stage(config, make_workspace("whole")))


def test_workers_do_not_change_the_result(make_workspace, make_config, run_stage, contents_of):
    one = contents_of(run_stage(make_config(), make_workspace("one")))
    two = contents_of(run_stage(make_config(runtime={"num_workers": 2}), make_workspace("two")))
    assert [one[name] for name in FILES - {"config.json", "manifest.json"}] == [
        two[name] for name in FILES - {"config.json", "manifest.json"}
    ]


def test_seed_changes_the_result(make_workspace, make_config, run_stage, contents_of):
    workspace = make_workspace()
    one = contents_of(run_stage(make_config(name="one"), workspace))
    two = contents_of(run_stage(make_config(name="two", seed=1), workspace))
    assert one["centroids.npy"] != two["centroids.npy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 19}, "--k 18"),
        ({"pca_dim": 513}, "--pca-dim 512"),
        ({"pca_dim": 19}, "--pca-dim 18"),
        ({"proposals": "other"}, "train2017"),
        ({"backbone": {"name": "resnet18", "frozen_stages": 1}}, "frozen_stages"),
        ({"data": {"limit": 3}}, r"data\.limit"),
    ],
)
def test_refusals(make_workspace, make_config, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        stage.prepare(make_config(**settings), make_workspace())
    assert "\n" not in str(caught.value)


def test_no_proposals_yet(tmp_path, config):
    with pytest.raises(ConfigError, match="aligndet proposals DATA"):
        stage.prepare(config, Workspace(tmp_path))


def test_changed_settings_are_refused(make_workspace, make_config, run_stage):
    workspace = make_workspace()
    run_stage(make_config(), workspace)
    with pytest.raises(ConfigError, match="kmeans_epochs: 2 -> 3"):
        stage.prepare(make_config(kmeans_epochs=3), workspace)


def test_untrained_backbone_must_be_asked_for(make_workspace, make_config):
    with pytest.raises(WeightsError, match=r"cluster: its backbone stays as it is.*--backbone-weights DEFAULT"):
        stage.prepare(make_config(backbone={"name": "resnet18"}), make_workspace())


def test_weights_file_is_an_input(make_workspace, make_config, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(build_backbone(BackboneConfig(name="resnet18")).state_dict(), file)
    workspace = make_workspace()
    with_weights = stage.prepare(make_config(backbone={"name": "resnet18", "weights": str(file)}), workspace)
    without = stage.prepare(make_config(), workspace)
    assert with_weights.output.header["inputs"]["weights"] != without.output.header["inputs"]["weights"]
    assert str(file) in stage.describe(with_weights)["backbone"]


def test_full_disk_is_one_line(make_workspace, config, monkeypatch):
    def no_room(*_args):
        raise OSError(28, "No space left on device")

    plan = stage.prepare(config, make_workspace())
    monkeypatch.setattr(rows.os, "posix_fallocate", no_room)
    with plan.output.lock(), pytest.raises(RunError, match="no room for"):
        stage.run(plan, Process())
