"""A second round: the boxes of a pre-trained run, merged with earlier proposals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet_cli.artifacts.proposals import ORIGINS, ProposalStore
from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors.checkpoint import OBJECTNESS, DetectorFile, kept_state, load_finder, write_detector
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import read_json
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage
from aligndet_cli.proposals.filters import FilterRules, nms
from aligndet_cli.proposals.journal import Journals
from aligndet_cli.proposals.rounds import merge_boxes
from aligndet_cli.workspace import Workspace
from helpers.commandline import NECK, RESOLUTION, aligndet
from helpers.small_detectors import SMALL

NUM_IMAGES, NAME = 7, "train2017-teacher"  # of `root`
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
    plan = stage.prepare(stage.ProposalsConfig.model_validate_json(sys.argv[1]), Workspace(Path(sys.argv[2])))
    with plan.output.lock():
        stage.run(plan, Process())
"""


def run_stage(config: stage.ProposalsConfig, folder: Path) -> Path:
    plan = stage.prepare(config, Workspace(folder))
    with nullcontext() if plan.output.is_shared else plan.output.lock():
        stage.run(plan, Process())
    return plan.output.folder


def save_run(workspace: Workspace, proposals: str, family: str = "faster-rcnn", **settings: object) -> None:
    """Write a pre-training with random weights; only DETR and those with `objectness` keep the class predictor."""
    config = PretrainBoxConfig.model_validate(
        {
            "name": "teacher",
            "detector": SMALL[family].model_dump(),
            "backbone": {"name": "resnet18", "weights": "none"},
            "views": {"short_side": [64, 96], "long_side": 128},
            **settings,
        }
    )
    torch.manual_seed(3)
    model = config.detector.build(build_backbone(BackboneConfig(name="resnet18")), 5 if family == "detr" else 1)
    parts = {OBJECTNESS: model.class_predictor.state_dict()} if config.objectness else {}
    output = workspace.plan_output("pretrain-box", "teacher", config, {"proposals": proposals}, force=True)
    with output.lock():
        output.begin(config)
        state = kept_state(model, "pretrain-box")
        content = DetectorFile("pretrain-box", config.detector, config.backbone, (), None, state, parts)
        write_detector(output.partial / "weights.pt", content)
        output.complete({}, ["weights.pt"])


@pytest.fixture
def first_round(tmp_path: Path, make_search_config: Callable[..., stage.ProposalsConfig]) -> Workspace:
    """A workspace with proposals of `root` and a run that was trained on them."""
    workspace = Workspace(tmp_path / "first")
    run_stage(make_search_config(), workspace.root)
    save_run(workspace, workspace.require("proposals").content_hash)
    return workspace


@pytest.fixture
def copies(first_round: Workspace, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of the workspace, to make the second round in."""
    return lambda name: Path(shutil.copytree(first_round.root, tmp_path / name))


@pytest.fixture
def make_round(make_config: Callable[..., stage.ProposalsConfig]) -> Callable[..., stage.ProposalsConfig]:
    return lambda **settings: make_config(**{"from_run": "teacher", "min_size": 8, **settings})


def test_boxes_take_turns_and_keep_score_and_source() -> None:
    # By score: A, B, and C, which overlaps A by 0.9 (IoU); D is too narrow. E of before is A again, F and G are new.
    found = np.array([[0, 0, 40, 40], [60, 0, 90, 40], [0, 0, 40, 36], [0, 60, 5, 100]], np.float32)
    scores = np.array([0.5, 0.25, 0.4, 0.9], np.float32)
    earlier = np.array([[0, 0, 40, 39], [50, 50, 90, 90], [0, 50, 40, 90]], np.float32)
    rules = FilterRules(min_size=8, max_ratio=3, max_size=0.8, nms=0.5)
    boxes, origins = merge_boxes(found, scores, earlier, (100, 100), rules)
    np.testing.assert_array_equal(boxes, np.concatenate([found[[0, 1]], earlier[[1, 2]]]))
    assert origins.tolist() == [[0.5, 0], [0.25, 0], [0, 1], [0, 1]]
    # With room for both A and E, the turns are A, E, B, F, G.
    rules = FilterRules(min_size=8, max_ratio=3, max_size=0.8, nms=0.98, max_per_image=4)
    boxes, origins = merge_boxes(found[[1, 0]], scores[[1, 0]], earlier, (100, 100), rules)
    assert origins[:, 1].tolist() == [0, 1, 0, 1] and boxes[3].tolist() == earlier[1].tolist()
    boxes, origins = merge_boxes(found[:0], scores[:0], earlier, (100, 100), rules)
    assert boxes.tolist() == earlier.tolist() and origins.tolist() == [[0, 1]] * 3


def test_the_artifact_says_where_each_box_is_from(first_round: Workspace, make_round) -> None:
    earlier = ProposalStore(first_round.root / "proposals" / "train2017")
    plan = stage.prepare(make_round(), first_round)
    assert stage.describe(plan)["source"] == "boxes of pretrain-box/teacher, merged with proposals/train2017"
    assert stage.describe(plan)["resized to"] == "short side 96, long side 128"
    folder = run_stage(make_round(), first_round.root)
    assert folder.name == NAME
    store, origins = ProposalStore(folder), np.load(folder / ORIGINS)
    assert origins.shape == (store.total, 2) and 0 < (origins[:, 1] == 0).mean() < 1
    finder = load_finder(first_round.root / "pretrain-box" / "teacher" / "weights.pt")
    assert not finder.training
    for row in range(NUM_IMAGES):
        boxes, of_image = store.boxes_of(row), origins[store.offsets[row] : store.offsets[row + 1]]
        is_own = of_image[:, 1] == 0
        known = {tuple(box) for box in earlier.boxes_of(row).tolist()}
        assert all((tuple(box) in known) != own for box, own in zip(boxes.tolist(), is_own.tolist(), strict=True))
        assert (np.diff(of_image[is_own, 0]) <= 0).all() and (of_image[is_own, 0] > 0).all()
        assert len(nms(boxes, 0.5)) == len(boxes)
        assert boxes[:, 2].max() <= 127 and boxes[:, 3].max() <= 83  # pixels of the image, not of the view
    manifest = read_json(folder / "manifest.json")
    run = first_round.require("pretrain-box", "teacher")
    before = first_round.require("proposals", "train2017")
    assert manifest["inputs"]["run"] == run.content_hash
    assert manifest["inputs"]["merged proposals"] == before.content_hash
    assert manifest["result"]["proposals_of_run"] == int((origins[:, 1] == 0).sum())
    assert "pretrain-box/teacher" in aligndet("status", "-w", first_round.root).stdout
    assert stage.prepare(make_round(), first_round).output.action == "complete"
    # Another run of the same name is noticed.
    save_run(first_round, before.content_hash, seed=1, detector={**SMALL["faster-rcnn"].model_dump(), "head_convs": 0})
    with pytest.raises(ConfigError, match=r"run.*--force"):
        stage.prepare(make_round(), first_round)


def test_bytes_do_not_depend_on_workers_or_shares(copies, make_round, contents_of) -> None:
    one = contents_of(run_stage(make_round(), copies("one")))
    assert ORIGINS in one
    for num_workers, backend in ((2, "processes"), (3, "threads")):
        config = make_round(num_workers=num_workers, backend=backend)
        assert contents_of(run_stage(config, copies(f"{num_workers} {backend}"))) == one
    shared = copies("shared")
    for share in ("3/3", "1/3", "2/3"):
        folder = run_stage(make_round(shard=share), shared)
    assert contents_of(folder) == one


def test_kill_and_resume_gives_the_same_files(copies, make_round, contents_of) -> None:
    config = make_round(num_workers=2, backend="processes")
    expected = contents_of(run_stage(config, copies("whole")))
    killed = copies("killed")
    journals = killed / "proposals" / f".{NAME}.partial" / "resume"

    def num_saved() -> int:
        return NUM_IMAGES - Journals(journals, NUM_IMAGES, with_origins=True).missing().size

    process = subprocess.Popen(
        [sys.executable, "-c", RUN_SCRIPT, config.model_dump_json(exclude_unset=True), str(killed)],
        env={**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[2])},
    )
    deadline = time.monotonic() + 240
    while num_saved() < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= num_saved() < NUM_IMAGES
    assert stage.prepare(config, Workspace(killed)).output.action == "resume"
    assert contents_of(run_stage(config, killed)) == expected


def test_the_number_of_threads_is_put_back(first_round: Workspace, make_round) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run_stage(make_round(), first_round.root)  # one worker: this thread
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_unreadable_images_are_left_out(first_round: Workspace, root: Path, make_round) -> None:
    good = (root / "train2017" / "003.png").read_bytes()
    (root / "train2017" / "003.png").write_bytes(bytes(len(good)))
    folder = run_stage(make_round(), first_round.root)
    assert len(ProposalStore(folder)) == NUM_IMAGES - 1 and len(np.load(folder / ORIGINS)) > 0
    assert '"file": "003.png"' in (folder / "skipped.jsonl").read_text()


@pytest.mark.parametrize("family", ["retinanet", "fcos", "detr", "mask-rcnn"])
def test_every_family_finds_boxes_if_it_was_trained_to(first_round: Workspace, make_round, family: str) -> None:
    before = first_round.require("proposals").content_hash
    if family != "mask-rcnn":
        save_run(first_round, before, family)
        with pytest.raises(WeightsError, match="has no score for objects without classes.*--objectness"):
            stage.prepare(make_round(), first_round)
    save_run(first_round, before, family, objectness=family != "mask-rcnn")
    folder = run_stage(make_round(merge="none", min_size=1, max_ratio=100.0), first_round.root)
    store, origins = ProposalStore(folder), np.load(folder / ORIGINS)
    assert store.counts.min() > 0 and (origins[:, 1] == 0).all()
    assert ((origins[:, 0] > 0) & (origins[:, 0] <= 1)).all()
    assert read_json(folder / "manifest.json")["inputs"]["merged proposals"] == "none"


def test_proposals_to_merge_are_those_of_training_else_the_newest_search(
    first_round: Workspace, make_round, make_search_config, root: Path
) -> None:
    def merged(**settings: object) -> str | None:
        plan = stage.prepare(make_round(**settings), first_round)
        assert plan.round is not None
        return plan.round.earlier.name if plan.round.earlier is not None else None

    run_stage(make_search_config(name="newer", min_size=10), first_round.root)
    assert (merged(), merged(merge="newer"), merged(merge="none")) == ("train2017", "newer", None)
    run_stage(make_round(), first_round.root)
    assert merged(name="again") == "train2017"
    save_run(first_round, first_round.require("proposals", NAME).content_hash, seed=1)
    assert merged(name="third") == NAME  # the third round builds on the second
    save_run(first_round, "of other images")
    assert merged(name="of-others") == "newer"
    with pytest.raises(ConfigError, match=r"--merge train2017: .*not of these images.*or write none"):
        merged(merge="train2017", data={"root": root, "limit": 3})
    with pytest.raises(ConfigError, match=r"no proposals of these images.*run `aligndet proposals`.*--merge none"):
        merged(data={"root": root, "limit": 3})


def test_mistakes_are_named(first_round: Workspace, make_round, root: Path) -> None:
    before = first_round.require("proposals").content_hash
    for settings, message in (
        ({"from_run": "others"}, "pretrain-box/others: not found; finished pretrain-box runs here: teacher"),
        ({"merge": "others"}, "proposals/others: not found"),
        ({"from_run": None, "merge": "train2017", "min_size": 32}, "--merge train2017: no effect without --from-run"),
        ({"mode": "quality"}, "mode: no effect with --from-run, which does not search"),
        ({"source": "ground-truth"}, "--source ground-truth and --from-run exclude each other"),
        ({"import_file": root / "x.json"}, "--import and --from-run exclude each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            stage.prepare(make_round(**settings), first_round)
    save_run(first_round, before, tasks="contrastive")
    with pytest.raises(ConfigError, match="--from-run teacher: was pre-trained on contrast alone"):
        stage.prepare(make_round(), first_round)
    save_run(first_round, before)
    (first_round.root / "pretrain-box" / "teacher" / "weights.pt").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"weights\.pt"):
        stage.prepare(make_round(), first_round)


def test_from_the_first_search_to_the_second_pre_training(toy: Path, tmp_path: Path) -> None:
    words = ("-w", tmp_path / "ws")
    aligndet("proposals", toy, *words, "--min-size", "16", "--num-workers", "1", "--set", "working_size=96")
    small = ("--backbone", "resnet18", "--backbone-weights", "none", *NECK, *RESOLUTION, "--steps", "2")
    train = ("pretrain-box", *words, "--detector", "retinanet", *small, "--batch-size", "2", "--topk", "5")
    aligndet(*train, "--name", "one", "--objectness")
    again = ("proposals", toy, *words, "--from-run", "one", "--min-size", "16", "--num-workers", "1")
    assert "would be written" in aligndet(*again, "--dry-run").stdout
    result = aligndet(*again, "--json").json()["result"]
    assert result["images"] == 13 and 0 < result["proposals_of_run"] < result["proposals"]
    aligndet(*train, "--name", "two")
    made_from = read_json(tmp_path / "ws" / "pretrain-box" / "two" / "manifest.json")["inputs"]["proposals"]
    assert made_from == Workspace(tmp_path / "ws").require("proposals", "train-one").content_hash
