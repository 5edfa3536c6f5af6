import json
import logging
import re
from collections import Counter

import numpy as np
import pytest

from aligndet_cli.artifacts.exchange import export_coco
from aligndet_cli.artifacts.proposals import ImageProposals, ProposalStore, write_store
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage
from aligndet_cli.workspace import Workspace


@pytest.fixture(autouse=True)
def _logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("aligndet"), "propagate", True)
    caplog.set_level(logging.INFO, logger="aligndet")


@pytest.fixture
def import_boxes(tmp_path, make_config):
    """Run an import of some JSON value and return its store."""

    def run(content, **settings) -> ProposalStore:
        file = tmp_path / "boxes.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        plan = stage.prepare(make_config(import_file=file, **settings), Workspace(tmp_path / "ws"))
        with plan.output.lock():
            stage.run(plan, Process())
        return ProposalStore(plan.output.folder)

    return run


def test_export_and_import_give_the_same_store(tmp_path, make_search_config, import_boxes):
    plan = stage.prepare(make_search_config(name="first"), Workspace(tmp_path / "ws"))
    with plan.output.lock():
        stage.run(plan, Process())
    export_coco(plan.output.folder, tmp_path / "deep" / "out.json")
    exported = json.loads((tmp_path / "deep" / "out.json").read_text())
    first = ProposalStore(plan.output.folder)
    assert exported["categories"] == [{"id": 1, "name": "selective_search"}]
    assert exported["images"][1] == {"id": 103, "file_name": "001.png", "height": 83, "width": 127}
    assert Counter(entry["image_id"] for entry in exported["annotations"])[103] == len(first.boxes_of(1))
    assert len({entry["id"] for entry in exported["annotations"]}) == first.total
    again = import_boxes(exported, name="again")
    np.testing.assert_array_equal(again.boxes, first.boxes)
    np.testing.assert_array_equal(again.offsets, first.offsets)


def test_odd_float_coordinates_survive_the_round_trip(tmp_path, import_boxes):
    boxes = np.random.default_rng(2).uniform(0, 40, (97, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2] + 1
    images = [ImageProposals(100, "000.png", (83, 127), boxes), ImageProposals(103, "001.png", (83, 127), boxes[:0])]
    (tmp_path / "store").mkdir()
    write_store(tmp_path / "store", images)
    export_coco(tmp_path / "store", tmp_path / "out.json")
    np.testing.assert_array_equal(
        import_boxes((tmp_path / "out.json").read_text()).boxes_of(0), boxes.clip(max=[127, 83] * 2)
    )


def test_bare_list_is_matched_by_id_and_ordered_by_score(import_boxes, caplog):
    entries = [
        {"image_id": 106, "bbox": [1, 2, 30, 40], "score": 0.25},
        {"image_id": 100, "bbox": [5, 5, 10, 10], "score": 0.5},
        {"image_id": 106, "bbox": [3, 4, 20, 20], "score": 0.75},
        {"image_id": 999, "bbox": [0, 0, 9, 9], "score": 1.0},
    ]
    store = import_boxes(entries)
    assert len(store) == 7
    assert store.boxes_of(2).tolist() == [[3, 4, 23, 24], [1, 2, 31, 42]]
    assert store.counts.tolist() == [1, 0, 2, 0, 0, 0, 0]
    assert "1 of its 3 images are not in the data" in caplog.text
    assert "no boxes for 5 of the 7 images" in caplog.text


def test_names_count_more_than_ids(import_boxes):
    # The file has other ids: its 103 is our 100 (000.png), and its 0 is our 103 (001.png).
    images = [{"id": 103, "file_name": "000.png"}, {"id": 0, "file_name": "elsewhere/001.png"}]
    annotations = [{"image_id": 103, "bbox": [1, 1, 9, 9]}, {"image_id": 0, "bbox": [2, 2, 9, 9]}]
    store = import_boxes({"images": images, "annotations": annotations, "categories": []})
    assert store.boxes_of(0).tolist() == [[1, 1, 10, 10]]
    assert store.boxes_of(1).tolist() == [[2, 2, 11, 11]]


def test_boxes_are_cut_at_the_image_and_empty_ones_left_out(import_boxes):
    rows = [[-5, -5, 20, 20], [100, 60, 99, 99], [200, 10, 5, 5], [4, 4, 0, 9]]
    store = import_boxes([{"image_id": 100, "bbox": row} for row in rows])
    assert store.boxes_of(0).tolist() == [[0, 0, 15, 15], [100, 60, 127, 83]]


def test_nothing_matched_is_an_error(import_boxes):
    with pytest.raises(DataError, match=r"none of its 2 images .* 7 images .*--split"):
        import_boxes([{"image_id": 1, "bbox": [0, 0, 5, 5]}, {"image_id": 2, "bbox": [0, 0, 5, 5]}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "not valid JSON"),
        ({"images": []}, "no list 'annotations'"),
        ({"images": [3], "annotations": []}, "images[0] has no 'id'"),
        ([{"bbox": [1, 2, 3, 4]}], "annotations[0] has no 'image_id'"),
        ([{"image_id": 100, "bbox": [1, 2, 3, 4]}, {"image_id": 100, "bbox": [1, 2, 3]}], "annotations[1] has the"),
        ([{"image_id": 100, "bbox": 5}], "annotations[0] has 5 for 'bbox'"),
        ([{"image_id": "a", "bbox": [1, 2, 3, 4]}], "annotations[0] has 'a' for"),
        ([[1, 2]], "annotations[0] has no 'image_id'"),
        ([{"image_id": 100, "bbox": ["a", 2, 3, 4]}], "annotations[0] has the 'bbox'"),
        ([{"image_id": 100, "bbox": [float("nan"), 2, 3, 4]}], "annotations[0] has the 'bbox' [nan"),
        ([{"image_id": 100, "bbox": [1, 2, 3, 4], "score": "high"}], "annotations[0] has 'high' for 'score'"),
        ([], "none of its 0 images"),
    ],
)
def test_files_of_another_form_are_errors(import_boxes, content, message):
    with pytest.raises(DataError, match=rf"boxes\.json: .*{re.escape(message)}" if message[0] != "n" else message):
        import_boxes(content)


def test_changed_import_file_is_noticed(tmp_path, import_boxes):
    import_boxes([{"image_id": 100, "bbox": [0, 0, 5, 5]}])
    with pytest.raises(ConfigError, match="input import"):
        import_boxes([{"image_id": 100, "bbox": [0, 0, 6, 5]}])


def test_a_missing_import_file_and_a_bad_export_place_are_errors(tmp_path, make_config):
    with pytest.raises(ConfigError, match="--import .*no such file"):
        stage.prepare(make_config(import_file=tmp_path / "none.json"), Workspace(tmp_path / "ws"))
    (tmp_path / "store").mkdir()
    write_store(tmp_path / "store", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--export"):
        export_coco(tmp_path / "store", tmp_path / "file" / "out.json")
