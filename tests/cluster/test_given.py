"""`cluster --import`: labels taken from a file."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.cluster import stage
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.files import read_json
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage as proposals_stage
from aligndet_cli.workspace import Workspace
from helpers.commandline import BACKBONE, RANDOM, RESOLUTION, aligndet

CLUSTERS = [{"id": number, "name": f"cluster_{number}"} for number in (1, 2, 3, 4, 5)]
# (image id, box xywh, category id): ids and sizes of the images are those of `draw_root`, 11 is 97 px wide and 71 high,
# 18 is 94 x 75. The second box of 18 occurs twice, with two clusters.
ROWS: list[tuple[int, list[float], int]] = [
    (18, [0, 0, 40, 40], 5),
    (11, [1, 2, 30, 40], 3),
    (18, [5.25, 6, 20, 30], 1),
    (18, [5.25, 6, 20, 30], 4),
    (11, [60, 50, 90, 90], 5),  # reaches beyond the image
]


def content_of(
    rows: list[tuple[int, list[float], int]] = ROWS, categories: Any = CLUSTERS, **more: Any
) -> dict[str, Any]:
    annotations = [{"image_id": image, "bbox": box, "category_id": cluster, **more} for image, box, cluster in rows]
    return {"images": [], "annotations": annotations, "categories": categories}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


@pytest.fixture
def import_proposals(tmp_path: Path, root: Path, workspace: Workspace) -> Callable[..., ProposalStore]:
    """Makes proposals of a file."""

    def run(content: Any, **settings: Any) -> ProposalStore:
        file = tmp_path / "proposals.json"
        file.write_text(json.dumps(content))
        values = {"data": {"root": root}, "import_file": file, "runtime": {"num_workers": 1}, **settings}
        plan = proposals_stage.prepare(proposals_stage.ProposalsConfig.model_validate(values), workspace)
        with plan.output.lock():
            proposals_stage.run(plan, Process())
        return ProposalStore(plan.output.folder)

    return run


@pytest.fixture
def import_clusters(tmp_path: Path, workspace: Workspace) -> Callable[..., Path]:
    """Takes clusters from a file; returns the artifact's folder."""

    def run(content: Any, **settings: Any) -> Path:
        file = tmp_path / "clusters.json"
        file.write_text(json.dumps(content))
        plan = stage.prepare(ClusterConfig.model_validate({"import_file": file, **settings}), workspace)
        with plan.output.lock():
            stage.run(plan, Process())
        return plan.output.folder

    return run


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("aligndet"), "propagate", True)
    caplog.set_level(logging.INFO, logger="aligndet")
    return caplog


def test_one_file_gives_proposals_and_their_clusters(workspace, import_proposals, import_clusters, logged, contents_of):
    import_proposals(content_of())
    folder = import_clusters(content_of())
    assert folder == workspace.root / "cluster" / "train2017-imported"
    # In the order of the data, then of the file: 11 has 3, 5; 18 has 5, 1, 4. Cluster n - 1 is category n.
    labels = np.load(folder / "labels.npy")
    assert (labels.tolist(), labels.dtype) == ([2, 4, 4, 0, 3], np.int16)
    names = {"labels.npy", "categories.json", "report.json", "sheet.jpg", "plots/sizes.png", "config.json"}
    assert set(contents_of(folder)) == names
    report = read_json(folder / "report.json")
    assert report["k"] == 5 and report["dead_clusters"] == [1] and report["num_unused_boxes"] == 0
    assert [entry["size"] for entry in report["clusters"]] == [1, 0, 1, 1, 2]
    assert report["clusters"][3] == {
        "cluster_id": 3,
        "size": 1,
        "share": 0.2,
        "category_id": 4,
        "name": "cluster_4",
    }
    manifest = read_json(folder / "manifest.json")
    assert manifest["inputs"]["proposals"] == workspace.require("proposals").content_hash
    assert len(manifest["inputs"]["import"]) == 16
    assert manifest["result"]["k"] == 5
    assert "not cluster_1" not in logged.text and "none of the proposals" not in logged.text


def test_clusters_follow_their_boxes_in_any_order(import_proposals, import_clusters):
    import_proposals(content_of())
    expected = np.load(import_clusters(content_of()) / "labels.npy").tolist()
    # Boxes that occur once may stand anywhere; the equal ones keep their order.
    other = import_clusters(content_of([ROWS[4], ROWS[2], ROWS[0], ROWS[3], ROWS[1]]), name="other")
    assert np.load(other / "labels.npy").tolist() == expected
    swapped = import_clusters(content_of([ROWS[3], ROWS[0], ROWS[2], ROWS[1], ROWS[4]]), name="swapped")
    assert np.load(swapped / "labels.npy").tolist() == [2, 4, 4, 3, 0]


def test_scores_and_limits_of_the_proposals_are_respected(import_proposals, import_clusters, logged):
    content = content_of()
    for annotation, score in zip(content["annotations"], (0.1, 0.2, 0.5, 0.3, 0.9), strict=True):
        annotation["score"] = score
    store = import_proposals(content, max_per_image=1)
    assert store.boxes.tolist() == [[60, 50, 97, 71], [5.25, 6, 25.25, 36]]  # the best of each image
    folder = import_clusters(content)
    assert np.load(folder / "labels.npy").tolist() == [4, 0]
    assert read_json(folder / "report.json")["num_unused_boxes"] == 3
    assert "3 boxes of the file are none of the proposals and are left out" in logged.text


def test_a_proposal_without_its_box_is_an_error(workspace, import_proposals, import_clusters):
    import_proposals(content_of())
    message = (
        r"clusters\.json: has no such box for 2 of the 5 proposals in .*, first \[1\.0, 2\.0, 31\.0, 42\.0\] of image "
        r"0\.png; take both from one file: `aligndet proposals --import .*clusters\.json`"
    )
    with pytest.raises(DataError, match=message):
        import_clusters(content_of([ROWS[0], ROWS[2], ROWS[4]]))
    assert not (workspace.root / "cluster").exists()


def test_other_categories_are_numbered_by_id_and_named(import_proposals, import_clusters, logged):
    import_proposals(content_of())
    categories = [{"id": 5, "name": "far"}, {"id": 1, "name": "near"}, {"id": 3}, {"id": 4, "name": "odd"}]
    folder = import_clusters(content_of(categories=categories))
    # ids 1, 3, 4, 5 -> 0, 1, 2, 3
    assert np.load(folder / "labels.npy").tolist() == [1, 3, 3, 0, 2]
    assert [entry["name"] for entry in read_json(folder / "categories.json")] == ["near", "3", "odd", "far"]
    assert "are not cluster_1 to cluster_4: clusters are numbered by category id, from near to far" in logged.text


def test_without_categories_the_ids_of_the_boxes_are_the_clusters(import_proposals, import_clusters):
    import_proposals(content_of())
    folder = import_clusters(content_of()["annotations"])
    assert np.load(folder / "labels.npy").tolist() == [1, 3, 3, 0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (content_of(categories=CLUSTERS[:4]), "'categories' does not list category id 5 of annotation 0"),
        (content_of(categories=[*CLUSTERS, CLUSTERS[0]]), "categories have equal ids"),
        (content_of(categories=[{"name": "cluster_1"}]), "categories[0] has no 'id', expected a whole number"),
        (
            content_of([(image, box, 1) for image, box, _ in ROWS], [{"id": 1, "name": "selective_search"}]),
            "one category (selective_search) makes no clusters; name the file whose",
        ),
        (
            {"annotations": [{"image_id": 18, "bbox": [0, 0, 5, 5]}]},
            "annotations[0] has no 'category_id', expected a whole number",
        ),
        ({"annotations": []}, "none of its 0 images with boxes"),
    ],
)
def test_files_of_another_form_are_errors(import_proposals, import_clusters, content, message):
    import_proposals(content_of())
    with pytest.raises(DataError, match=r"clusters\.json: .*" + re.escape(message)):
        import_clusters(content)


def test_settings_of_making_clusters_are_refused(import_proposals, import_clusters):
    import_proposals(content_of())
    with pytest.raises(ConfigError, match=r"backbone, k, pca_dim: no effect with --import"):
        import_clusters(content_of(), k=5, pca_dim=4, backbone={"name": "resnet18"})
    with pytest.raises(ConfigError, match=r"batch_size, short_side: no effect with --import"):
        import_clusters(content_of(), batch_size=16, short_side=800)


def test_done_again_changed_and_missing(tmp_path, workspace, import_proposals, import_clusters):
    import_proposals(content_of())
    folder = import_clusters(content_of())
    config = ClusterConfig(import_file=tmp_path / "clusters.json")
    assert stage.prepare(config, workspace).output.action == "complete"
    moved = (tmp_path / "clusters.json").rename(tmp_path / "moved.json")
    assert stage.prepare(ClusterConfig(import_file=moved), workspace).output.action == "complete"
    with pytest.raises(ConfigError, match="input import"):
        import_clusters(content_of([*ROWS[:4], (11, [60, 50, 90, 90], 1)]))
    with pytest.raises(ConfigError, match=r"--import .*none\.json: no such file"):
        stage.prepare(ClusterConfig(import_file=tmp_path / "none.json"), workspace)
    assert folder.exists()


def test_detr_trains_on_imported_clusters(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "clustered.json"
    file.write_text(json.dumps(content_of()))
    words = ("-w", tmp_path / "w")
    aligndet("proposals", root, *words, "--import", file)
    shown = aligndet("cluster", *words, "--import", file, "--dry-run").stderr
    assert f"import of {file}" in shown and "5, the categories of the file by id" in shown
    assert aligndet("cluster", *words, "--import", file, "--json").json()["result"]["k"] == 5
    assert "no effect with --import" in aligndet("cluster", *words, "--import", file, "--k", "5", code=2).error_line()
    small = ("detector.hidden_dim=32", "detector.num_heads=4", "detector.encoder_layers=1", "detector.decoder_layers=1")
    settings = [word for setting in (*small, "detector.feedforward_dim=48") for word in ("--set", setting)]
    steps = (*BACKBONE, *RESOLUTION, "--steps", "2", "--batch-size", "2")
    ran = aligndet("pretrain-box", *words, "--detector", "detr", *RANDOM, *settings, *steps)
    assert "cluster/train2017-imported, 5 of them" in ran.stderr
    assert "cluster/train2017-imported" in aligndet("status", *words).stdout
