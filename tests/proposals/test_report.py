import contextlib
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet_cli.artifacts.proposals import ImageProposals, ProposalStore, write_store
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.proposals.recall import BUDGETS, measure_recall
from aligndet_cli.proposals.report import covered_shares, describe_store, sample_boxes


def image_set_of(boxes_per_image: list[list[list[float]]], crowd_rows: tuple[int, ...] = ()) -> ImageSet:
    boxes = np.array([box for boxes in boxes_per_image for box in boxes], np.float32).reshape(-1, 4)
    num_boxes, num_images = len(boxes), len(boxes_per_image)
    is_crowd = np.zeros(num_boxes, bool)
    is_crowd[list(crowd_rows)] = True
    return ImageSet(
        format="coco",
        root=Path("data"),
        split="train",
        images_dir=Path("data"),
        file_names=[f"{index}.jpg" for index in range(num_images)],
        image_ids=np.arange(num_images, dtype=np.int64) + 10,
        sizes_hw=np.full((num_images, 2), 400, np.int32),
        offsets=np.cumsum([0, *map(len, boxes_per_image)]).astype(np.int64),
        boxes=boxes,
        class_ids=np.zeros(num_boxes, np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        is_crowd=is_crowd,
        segmentations=None,
        categories=(Category(1, "thing"),) if num_boxes else (),
        fingerprint="",
        problems={},
    )


def store_of(folder: Path, boxes_by_id: dict[int, list[list[float]]]) -> ProposalStore:
    images = [
        ImageProposals(image_id, f"{image_id}.jpg", (400, 400), np.array(boxes, np.float32).reshape(-1, 4))
        for image_id, boxes in boxes_by_id.items()
    ]
    write_store(folder, images)
    return ProposalStore(folder)


def test_values_worked_out_by_hand(tmp_path):
    # Image 10: a 100x100 object, covered by its left 60x100 (IoU 0.6) and left 40x100 (0.4); a 20x20 object covered
    # by nothing; a crowd covered perfectly, which does not count. Image 11: a 50x40 object covered exactly, but by
    # the 51st proposal; the 50 before it are 8x8. Image 12 was skipped: its object does not count.
    objects = [[[0, 0, 100, 100], [300, 300, 320, 320], [200, 200, 260, 260]], [[50, 50, 100, 90]], [[0, 0, 50, 50]]]
    proposals = {
        10: [[0, 0, 40, 100], [0, 0, 60, 100], [200, 200, 260, 260]],
        11: [[300, 300, 308, 308]] * 50 + [[50, 50, 100, 90]],
    }
    report = describe_store(store_of(tmp_path, proposals), image_set_of(objects, (2,)), min_size=32)
    assert report["images"] == 2
    assert report["proposals"] == 54
    assert report["images_without_proposals"] == 0
    # Counts 3 and 51: mean 27; quartiles on the straight line between them: 3 + 0.25 * 48 = 15.
    assert report["proposals_per_image"] == {
        "mean": 27.0,
        "min": 3.0,
        "p05": 5.4,
        "p25": 15.0,
        "median": 27.0,
        "p75": 39.0,
        "p95": 48.6,
        "max": 51.0,
    }
    assert report["size_px"]["median"] == 8.0
    assert report["size_px"]["max"] == round(6000**0.5, 4)
    assert report["aspect_ratio"]["min"] == 0.4
    assert report["aspect_ratio"]["max"] == 1.25
    labels = report["labels"]
    # Best overlaps of the three objects: 0.6, 0, 1 (0 within the first 50).
    assert labels["all"]["objects"] == 3
    assert labels["all"]["recall_at_iou_0.5"] == {"50": 0.3333, "100": 0.6667, "300": 0.6667, "all": 0.6667}
    assert labels["all"]["mean_best_overlap"] == {"50": 0.2, "100": 0.5333, "300": 0.5333, "all": 0.5333}
    # The first proposal of image 10 overlaps by 0.4, the second by 0.6; that of image 11 comes at 51, budget 70.
    assert labels["budgets"] == [*BUDGETS, "all"] and BUDGETS[9:11] == (50, 70)
    assert labels["all"]["curve"]["recall_at_iou_0.5"] == [0.0, *[0.3333] * 9, *[0.6667] * 9]
    assert labels["all"]["curve"]["mean_best_overlap"] == [0.1333, *[0.2] * 9, *[0.5333] * 9]
    # 400 px is small (< 32 x 32), 2000 medium (< 96 x 96), 10000 large.
    assert labels["small"]["mean_best_overlap"]["all"] == 0.0
    assert labels["medium"]["mean_best_overlap"]["all"] == 1.0
    assert labels["large"]["mean_best_overlap"]["all"] == 0.6
    assert labels["reach_min_size"]["objects"] == 2
    assert labels["reach_min_size"]["mean_best_overlap"]["all"] == 0.8
    # Within 10 boxes, the first object is found at IoU 0.5, 0.55 and 0.6; with 100, the third one at all ten.
    assert labels["all"]["average_recall"] == {"10": 0.1, "100": 0.4333, "1000": 0.4333}
    assert labels["reach_min_size"]["average_recall"]["100"] == 0.65
    # One of three is right, but the third lies in the crowd and does not count; of the 51 of image 11, none within 50.
    assert labels["precision_at_iou_0.5"] == {"5": round(1 / 7, 4), "15": round(1 / 17, 4), "50": round(1 / 52, 4)}


@pytest.mark.parametrize("seed", range(4))
def test_average_recall_and_precision_are_those_of_pycocotools(tmp_path, seed):
    rng = np.random.default_rng(seed)
    objects, crowds, proposals = [], [], {}
    for image in range(6):
        corners = rng.uniform(0, 250, (0 if image == 2 else rng.integers(1, 12), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 150, corners.shape)], axis=1)
        is_crowd = rng.random(len(boxes)) < 0.2
        # Several near each object, so that they compete, also for doubled objects; more than 1000 on some images.
        near = np.repeat(boxes, rng.integers(0, 90), axis=0)
        near = near + rng.normal(0, 12, near.shape)
        corners = rng.uniform(0, 250, (rng.integers(0, 900), 2))
        far = np.concatenate([corners, corners + rng.uniform(8, 150, corners.shape)], axis=1)
        shuffled = rng.permutation(np.concatenate([near, far]))
        crowds += is_crowd.tolist()
        objects.append(boxes.tolist())
        proposals[10 + image] = shuffled[(shuffled[:, 2:] > shuffled[:, :2]).all(axis=1)].tolist()
    proposals[14] = []
    image_set = image_set_of(objects, tuple(np.flatnonzero(crowds).tolist()))
    labels = measure_recall(store_of(tmp_path, proposals), image_set, min_size=32)

    def entry_of(box, **others):
        x1, y1, x2, y2 = np.float32(box).astype(float).tolist()
        return {"category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), **others}

    truth, found = COCO(), COCO()
    images = [{"id": image_id, "height": 400, "width": 400} for image_id in proposals]
    entries = [(10 + image, box) for image, boxes in enumerate(objects) for box in boxes]
    truth.dataset = {
        "images": images,
        "categories": [{"id": 1}],
        "annotations": [
            entry_of(box, id=place + 1, image_id=image_id, iscrowd=int(is_crowd))
            for place, ((image_id, box), is_crowd) in enumerate(zip(entries, crowds, strict=True))
        ],
    }
    ranked = [(image_id, box, -rank) for image_id, boxes in proposals.items() for rank, box in enumerate(boxes)]
    found.dataset = {
        "images": images,
        "categories": [{"id": 1}],
        "annotations": [
            entry_of(box, id=place + 1, image_id=image_id, score=score, iscrowd=0)
            for place, (image_id, box, score) in enumerate(ranked)
        ],
    }
    with contextlib.redirect_stdout(None):
        truth.createIndex(), found.createIndex()
        judges = COCOeval(truth, found, "bbox"), COCOeval(truth, found, "bbox")
        for judge, budgets in zip(judges, ([10, 100, 1000], [5, 15, 50]), strict=True):
            judge.params.useCats, judge.params.maxDets = 0, budgets
            judge.evaluate()
        judges[0].accumulate()
    recalls = judges[0].eval["recall"][:, 0].mean(axis=0)  # (all, small, medium, large) by budgets
    for name, expected in zip(("all", "small", "medium", "large"), recalls, strict=True):
        np.testing.assert_allclose(list(labels[name]["average_recall"].values()), expected, atol=5e-5)
    of_all_sizes = [image for image in judges[1].evalImgs if image and image["aRng"] == judge.params.areaRng[0]]
    for budget, value in labels["precision_at_iou_0.5"].items():
        kept = [(np.array(i["dtMatches"])[0, : int(budget)], i["dtIgnore"][0, : int(budget)]) for i in of_all_sizes]
        num_right = sum(int(((matches > 0) & ~ignored).sum()) for matches, ignored in kept)
        assert value == pytest.approx(num_right / sum(int((~ignored).sum()) for _, ignored in kept), abs=5e-5)
    assert 0 < labels["precision_at_iou_0.5"]["5"] < 1


def test_data_without_labels_has_no_coverage(tmp_path):
    report = describe_store(store_of(tmp_path, {10: [[0, 0, 9, 9]]}), image_set_of([[]]), min_size=32)
    assert report["labels"] is None


def test_store_without_proposals(tmp_path):
    report = describe_store(store_of(tmp_path, {10: []}), image_set_of([[[0, 0, 50, 50]]]), min_size=32)
    assert report["size_px"] is None
    assert report["images_without_proposals"] == 1
    assert report["covered_share"]["max"] == 0.0
    assert report["labels"]["all"]["mean_best_overlap"]["all"] == 0.0
    nothing = dict.fromkeys(("recall_at_iou_0.5", "mean_best_overlap", "average_recall", "curve"))
    assert report["labels"]["small"] == {"objects": 0, **nothing}
    assert report["labels"]["precision_at_iou_0.5"] == {"5": 0.0, "15": 0.0, "50": 0.0}


@pytest.mark.parametrize("min_size", [50, 51])
def test_min_size_group_includes_the_limit(tmp_path, min_size):
    report = describe_store(store_of(tmp_path, {10: []}), image_set_of([[[0, 0, 50, 50]]]), min_size=min_size)
    assert report["labels"]["reach_min_size"]["objects"] == (1 if min_size == 50 else 0)


def test_covered_share_is_that_of_the_union(tmp_path):
    # Of 400 x 400: a 200 x 400 half; and with it a 400 x 200 half, of which a quarter is new; nothing; all of it twice.
    boxes = {
        10: [[0, 0, 200, 400]],
        11: [[0, 0, 200, 400], [0, 0, 400, 200]],
        12: [],
        13: [[0, 0, 400, 400], [0, 0, 400, 400]],
    }
    assert np.concatenate(list(covered_shares(store_of(tmp_path, boxes)))).tolist() == [0.5, 0.75, 0.0, 1.0]


def test_covered_share_of_many_boxes_is_that_of_pixels(tmp_path):
    # 400 px on 64 cells: an edge is off by half of 6.25 px at most, so that the union is off by a few percent.
    rng = np.random.default_rng(5)
    boxes_by_id, expected = {}, []
    for image_id in range(130):  # more than are done at once
        corners = rng.integers(0, 300, (image_id % 5, 2))
        boxes = np.concatenate([corners, corners + rng.integers(20, 100, corners.shape)], axis=1)
        pixels = np.zeros((400, 400), bool)
        for x1, y1, x2, y2 in boxes.tolist():
            pixels[y1:y2, x1:x2] = True
        boxes_by_id[image_id], _ = boxes.tolist(), expected.append(pixels.mean())
    found = np.concatenate(list(covered_shares(store_of(tmp_path, boxes_by_id))))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_duplicate_images_are_those_after_the_first(tmp_path):
    store = store_of(tmp_path, {number: [] for number in range(10, 15)})
    report = describe_store(store, image_set_of([[]] * 5), min_size=32, digests=[7, 8, 7, 9, 7])
    assert (report["duplicate_images"], report["duplicate_share"]) == (2, 0.4)


def test_sample_is_spread_over_all_boxes(tmp_path, monkeypatch):
    store = store_of(tmp_path, {10: [[0, 0, 1 + number, 9] for number in range(23)]})
    assert len(sample_boxes(store)) == 23
    monkeypatch.setattr("aligndet_cli.proposals.report._MAX_SAMPLE", 10)
    # 23 boxes in steps of 3: the 1st, 4th, ... 22nd.
    assert sample_boxes(store)[:, 2].tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
