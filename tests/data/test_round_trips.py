"""Labels that are written and read again are the same, by our reader and by those of other people."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection

from aligndet_cli.artifacts.exchange import boxes_from_coco, export_coco
from aligndet_cli.artifacts.proposals import ImageProposals, write_store
from aligndet_cli.config import DataConfig
from aligndet_cli.data.coco import to_coco_dict
from aligndet_cli.data.dataset import ImageRecord, ImageSet
from aligndet_cli.data.folds import SplitConfig, fraction_of, write_folds
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import DataError
from helpers.data_sets import coco_content, make_coco
from helpers.random_labels import KINDS, draw_labels

SEEDS = range(4)


def masks_of(image_set: ImageSet, index: int) -> list[list[int]]:
    """Return the pixels of the masks of an image; crowds too, which `LabelMasks` leaves out."""
    record = image_set.record(index)
    assert record.size_hw is not None
    everything = replace(image_set, is_crowd=np.zeros_like(image_set.is_crowd))
    return [np.flatnonzero(mask).tolist() for mask in LabelMasks(everything).masks_of(index, record.size_hw)]


def described(image_set: ImageSet, index: int) -> dict[str, Any]:
    """Return all that is known of an image, as plain values."""
    record = image_set.record(index)
    fields = ("image_id", "file_name", "size_hw")
    arrays = ("boxes", "class_ids", "areas", "is_crowd")
    return {
        **{name: getattr(record, name) for name in fields},
        **{name: getattr(record, name).tolist() for name in arrays},
        "categories": image_set.categories,
        "masks": masks_of(image_set, index),
        "has_mask": list(map(bool, record.segmentations)),
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_coco_json_is_read_as_it_was(kind: str, seed: int, tmp_path: Path) -> None:
    draw_labels(kind, tmp_path / "data", seed)
    first = open_images(DataConfig(root=tmp_path / "data"), purpose="train", with_masks=kind != "voc")
    assert first.format == kind and len(first.boxes) > 3 and not first.problems
    file = tmp_path / "written.json"
    file.write_text(json.dumps(to_coco_dict(first)), encoding="utf-8")
    again = open_images(DataConfig(annotations=file, images=first.images_dir), purpose="train", with_masks=True)
    assert [described(again, index) for index in range(len(again))] == [
        {**described(first, index), "has_mask": described(first, index)["has_mask"] or [False] * len(boxes)}
        for index, boxes in enumerate(np.split(first.boxes, first.offsets[1:-1]))
    ]
    assert to_coco_dict(again) == to_coco_dict(first) if kind != "voc" else True


def read_by_others(file: Path, images_dir: Path) -> tuple[COCO, CocoDetection]:
    return COCO(str(file)), CocoDetection(str(images_dir), str(file))


def xyxy(entry: dict[str, Any]) -> list[float]:
    x, y, width, height = np.array(entry["bbox"], dtype=np.float64).tolist()
    return np.array([x, y, x + width, y + height], dtype=np.float32).tolist()


def masks_by_others(coco: COCO, entries: list[dict[str, Any]], size_hw: tuple[int, int]) -> list[list[int]]:
    def pixels(entry: dict[str, Any]) -> NDArray[np.uint8]:
        return coco.annToMask(entry) if entry.get("segmentation") else np.zeros(size_hw, dtype=np.uint8)

    return [np.flatnonzero(pixels(entry)).tolist() for entry in entries]


def check_fold(file: Path, whole: ImageSet, chosen: list[int]) -> None:
    """Make sure that our reader, pycocotools and torchvision read a fold as these images of a data set."""
    ours = open_images(DataConfig(annotations=file, images=whole.images_dir), purpose="train", with_masks=True)
    coco, detection = read_by_others(file, whole.images_dir)
    assert sorted(coco.getImgIds()) == sorted(ours.image_ids.tolist()) == sorted(detection.ids)
    assert len(ours) == len(chosen) and len(coco.anns) == len(coco.dataset["annotations"])
    assert {entry["id"]: entry["name"] for entry in coco.loadCats(coco.getCatIds())} == {
        category.category_id: category.name for category in whole.categories
    }
    truths = to_coco_dict(whole)["annotations"]
    for index, position in enumerate(chosen):
        expected = described(whole, position)
        assert {**described(ours, index), "has_mask": expected["has_mask"]} == expected
        record = ours.record(index)
        entries = coco.loadAnns(coco.getAnnIds([record.image_id]))
        picture, targets = detection[detection.ids.index(record.image_id)]
        assert targets == entries and picture.size[::-1] == record.size_hw
        check_entries(coco, entries, [entry for entry in truths if entry["image_id"] == record.image_id])
        if not whole.problems:  # nothing is clipped or left out
            assert [xyxy(entry) for entry in entries] == record.boxes.tolist()
        check_image(coco, entries, record, whole, position)


def check_entries(coco: COCO, entries: list[dict[str, Any]], truths: list[dict[str, Any]]) -> None:
    """Make sure that the annotations of an image, as others read them, are what its labels say."""
    assert all(type(entry["id"]) is int and 0 < entry["id"] < 2**53 for entry in entries)
    assert {type(number) for entry in entries for number in entry["bbox"]} <= {int, float}
    for key in ("image_id", "category_id", "bbox", "area", "iscrowd"):
        assert [entry[key] for entry in entries] == [truth[key] for truth in truths]
    # pycocotools itself chooses boxes by size and by crowd
    image_ids = list({entry["image_id"] for entry in entries})
    numbers = coco.getAnnIds(image_ids, areaRng=[0, 1e10], iscrowd=False)
    assert len(numbers) == sum(not truth["iscrowd"] for truth in truths) or not truths


def check_image(coco: COCO, entries: list[dict[str, Any]], record: ImageRecord, whole: ImageSet, position: int) -> None:
    """Make sure that others know the size of an image and draw its masks as we do; nobody can if sizes are not told."""
    (image,) = coco.loadImgs([record.image_id])
    assert image["file_name"] == record.file_name and record.size_hw is not None
    if image.get("height") and image.get("width"):
        assert (image["height"], image["width"]) == record.size_hw
        if whole.segmentations is not None and not whole.problems:
            assert masks_by_others(coco, entries, record.size_hw) == masks_of(whole, position)


def check_split(data: DataConfig, output: Path) -> None:
    whole = open_images(data, purpose="train", with_masks=True, with_truths=True)
    config = SplitConfig(data=data, fractions=(60,), folds=(5,), unlabeled=True, output=output)
    fold, rest = write_folds(config)
    chosen = sorted(fraction_of(len(whole), 60, 5))
    left_out = sorted(set(range(len(whole))) - set(chosen))
    for written, positions in ((fold, chosen), (rest, left_out)):
        check_fold(written.file, whole, positions)
        owners = [entry["image_id"] for entry in to_coco_dict(whole)["annotations"]]
        num_boxes = sum(owners.count(image_id) for image_id in whole.image_ids[positions].tolist())
        assert (written.num_images, written.num_boxes) == (len(positions), num_boxes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_folds_are_read_by_others_as_by_us(kind: str, seed: int, tmp_path: Path) -> None:
    draw_labels(kind, tmp_path / "data", seed)
    check_split(DataConfig(root=tmp_path / "data"), tmp_path / "folds")


def clean_content() -> dict[str, Any]:
    content = coco_content()
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry.update(segmentation=[[x, y, x + width, y, x + width, y + height]], area=width * height / 2)
    return content


def with_annotation(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Return an edit of the first annotation."""
    return lambda content: content["annotations"][0].update(fields)


def without(table: str, *keys: str) -> Callable[[dict[str, Any]], None]:
    """Return an edit that takes keys out of all entries of a list."""
    return lambda content: [entry.pop(key, None) for entry in content[table] for key in keys]  # type: ignore[func-returns-value]


def with_image(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["images"][1].update(fields)


ODDITIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "annotation id is a text": with_annotation(id="0b2e7c1a"),
    "annotation id is 0": with_annotation(id=0),
    "annotation id is beyond 53 bits": with_annotation(id=2**60),
    "annotation id occurs twice": lambda content: content["annotations"][1].update(id=3),
    "no annotation ids": without("annotations", "id"),
    "area is null": with_annotation(area=None),
    "area is a text": with_annotation(area="77"),
    "area is NaN": with_annotation(area=float("nan")),
    "no areas": without("annotations", "area"),
    "iscrowd is null": with_annotation(iscrowd=None),
    "iscrowd is a text": with_annotation(iscrowd="0"),
    "iscrowd is true": with_annotation(iscrowd=True),
    "no iscrowd": without("annotations", "iscrowd"),
    "box of texts": with_annotation(bbox=["5", "6.0", "20", "10"]),
    "box without area": with_annotation(bbox=[5, 6, 0, 10]),
    "box across the border": with_annotation(bbox=[-5, 6, 100, 10]),
    "box outside": with_annotation(bbox=[500, 6, 10, 10]),
    "polygon is a flat list": with_annotation(segmentation=[1, 1, 20, 1, 20, 20]),
    "polygon of four numbers": with_annotation(segmentation=[[1, 1, 20, 20]]),
    "polygon of texts": with_annotation(segmentation=[["1", "1", "20", "1", "20", "20"]]),
    "polygon and a broken one": with_annotation(segmentation=[[1, 1, 20, 1, 20, 20], [3, 4]]),
    "no sizes": without("images", "height", "width"),
    "size is a text": with_image(height="40", width="60"),
    "size is a float": with_image(height=40.0, width=60.0),
    "size is null": with_image(height=None),
    "no category names": without("categories", "name"),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_folds_of_odd_labels_are_read_by_others_as_by_us(name: str, tmp_path: Path) -> None:
    content = clean_content()
    ODDITIES[name](content)
    make_coco(tmp_path / "data", content)
    check_split(DataConfig(root=tmp_path / "data"), tmp_path / "folds")


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\n"])
def test_folds_of_labels_with_a_mark_are_read_by_others_as_by_us(mark: bytes, tmp_path: Path) -> None:
    file = make_coco(tmp_path / "data")
    file.write_bytes(mark + file.read_bytes())
    check_split(DataConfig(root=tmp_path / "data"), tmp_path / "folds")


@pytest.mark.parametrize(
    "edit",
    [
        with_annotation(category_id=5),
        with_annotation(image_id=99),
        with_annotation(bbox=[1, 2, float("nan"), 4]),
        with_annotation(bbox=None),
        with_image(id=30),
        with_image(id="x"),
        with_image(file_name="../b.jpg"),
        with_annotation(area="wide"),
        with_image(height=-1),
        lambda content: content["categories"][0].update(id=4),
    ],
)
def test_labels_that_training_refuses_are_not_split(edit: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    content = coco_content()
    edit(content)
    make_coco(tmp_path, content)
    data = DataConfig(root=tmp_path)
    with pytest.raises(DataError) as refused:
        open_images(data, purpose="train")
    with pytest.raises(DataError) as also:
        write_folds(SplitConfig(data=data, fractions=(60,), folds=(5,), output=tmp_path / "folds"))
    assert str(also.value) == str(refused.value) and not (tmp_path / "folds").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_exported_proposals_come_back_to_the_same_images(kind: str, tmp_path: Path) -> None:
    """Ids with gaps, names with folders and images without proposals; their order on disk does not matter."""
    draw_labels(kind, tmp_path / "data", 7)
    image_set = open_images(DataConfig(root=tmp_path / "data"), purpose="train")
    rng = np.random.default_rng(7)
    boxes = []
    for index in range(len(image_set)):
        corners = rng.uniform(0, 5, (index % 3, 2)).astype(np.float32)
        boxes.append(np.concatenate([corners, corners + rng.uniform(1, 6, corners.shape).astype(np.float32)], axis=1))
    records = [image_set.record(index) for index in rng.permutation(len(image_set)).tolist()]
    given = {record.image_id: found for record, found in zip(records, boxes, strict=True)}
    write_store(
        tmp_path,
        [ImageProposals(one.image_id, one.file_name, one.size_hw or (1, 1), given[one.image_id]) for one in records],
    )
    export_coco(tmp_path, tmp_path / "out.json")
    read = boxes_from_coco(tmp_path / "out.json", image_set)
    for index, image_id in enumerate(image_set.image_ids.tolist()):
        np.testing.assert_array_equal(read.of(index), given[image_id])
