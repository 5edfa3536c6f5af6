import numpy as np

from aligndet_cli.data.images import read_image
from aligndet_cli.proposals.filters import FilterRules, filter_proposals, nms, pairwise_iou
from aligndet_cli.proposals.regions import measure
from aligndet_cli.proposals.soco import group_as_soco, search_as_soco


def as_boxes(rects: list) -> np.ndarray:
    """(N, 4) float32 xyxy of SoCo's (x, y, w, h)."""
    rects = np.array(rects, dtype=np.float32)
    return np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], axis=1)


def test_filtered_boxes_are_those_of_soco(shared_data, soco_reference):
    rules = FilterRules(min_size=32, max_ratio=3, max_size=0.8, nms=1)
    matched = total = 0
    for entry in soco_reference["images"]:
        image = read_image(shared_data / "minicoco/train2017" / entry["file"])
        ours = filter_proposals(search_as_soco(image), (entry["height"], entry["width"]), rules)
        theirs = as_boxes(entry["filtered"])
        matched += int((pairwise_iou(theirs, ours).max(axis=1) >= 0.9).sum())
        total += len(theirs)
        assert len(ours) == len(theirs)
    assert total == 1559
    assert matched / total >= 0.99


def test_same_regions_in_the_same_order(shared_data, soco_reference):
    for entry in soco_reference["images"]:
        image = read_image(shared_data / "minicoco/train2017" / entry["file"])
        with np.load(shared_data.parent / f"golden/g4_selective_search/seg_{entry['file'][:-4]}.npz") as arrays:
            boxes = group_as_soco(image, arrays["segments"].astype(np.int32))
        np.testing.assert_array_equal(boxes, as_boxes(entry["rects"]))


def test_nms_keeps_what_the_official_order_keeps(soco_reference):
    for entry in soco_reference["images"]:
        kept = nms(as_boxes(entry["filtered"]), 0.5)
        np.testing.assert_array_equal(kept, entry["nms"]["index"]["keep"])


def test_boxes_end_on_their_last_pixel():
    image = np.full((60, 80, 3), 40, dtype=np.uint8)
    image[10:40, 20:60] = (220, 30, 30)
    assert [20, 10, 59, 39] in search_as_soco(image).tolist()


def test_regions_of_more_pixels_than_float32_counts_are_measured() -> None:
    labels = np.zeros((4100, 4100), dtype=np.int32)
    sizes, boxes, _ = measure(labels, np.empty((*labels.shape, 0), dtype=np.uint8), 0)
    assert (sizes.tolist(), boxes.tolist()) == ([4100 * 4100], [[0, 0, 4100, 4100]])
