import dataclasses
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data import coco, index
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.data.segmentations import Segmentations
from aligndet_cli.errors import DataError
from helpers.data_sets import coco_content, make_coco

POLYGON = [[1, 2, 4, 2, 4, 6]]
CODE = {"size": [40, 60], "counts": [2400]}


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WORTHWHILE_BYTES", 0)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A COCO json as of a minute ago; its first annotation has no mask."""
    content = coco_content()
    content["annotations"][1]["segmentation"] = POLYGON
    content["annotations"][2]["segmentation"] = CODE
    file = make_coco(tmp_path / "data", content)
    settle(file)
    return file


def settle(file: Path, seconds_ago: float = 60) -> None:
    os.utime(file, (time.time() - seconds_ago,) * 2)


def open_indexed(root: Path, *, with_masks: bool = False) -> ImageSet:
    data = DataConfig(root=root / "data")
    return open_images(data, purpose="train", with_masks=with_masks, index_dir=root / "index")


def parsed_anew(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Collect the files that are parsed from now on."""
    files: list[Path] = []
    parse = coco.parse_coco

    def noting(file: Path, **options: object) -> object:
        files.append(file)
        return parse(file, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(coco, "parse_coco", noting)
    return files


def assert_equal(one: ImageSet, two: ImageSet) -> None:
    for name in (entry.name for entry in dataclasses.fields(ImageSet)):
        first, second = getattr(one, name), getattr(two, name)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype, name
            np.testing.assert_array_equal(first, second, err_msg=name)
        elif isinstance(first, Segmentations):
            assert list(first) == list(second)
        else:
            assert first == second, name


@pytest.mark.parametrize("with_masks", [False, True])
def test_the_second_time_gives_the_same_without_parsing(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_masks: bool
) -> None:
    fresh = open_images(DataConfig(root=tmp_path / "data"), purpose="train", with_masks=with_masks)
    assert_equal(open_indexed(tmp_path, with_masks=with_masks), fresh)
    files = parsed_anew(monkeypatch)
    again = open_indexed(tmp_path, with_masks=with_masks)
    assert files == []
    assert_equal(again, fresh)
    if with_masks:
        assert again.segmentations is not None and list(again.segmentations) == [POLYGON, CODE, []]
        assert isinstance(again.segmentations.block, np.memmap)


def test_mapped_masks_are_sent_by_name(labels: Path, tmp_path: Path) -> None:
    masks = open_indexed(tmp_path, with_masks=True).segmentations
    assert masks is not None
    received = pickle.loads(pickle.dumps(masks))
    assert list(received) == list(masks) and isinstance(received.block, np.memmap)
    assert masks.block.tobytes() not in pickle.dumps(masks)


def test_changed_labels_are_parsed_anew(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_indexed(tmp_path)
    content = json.loads(labels.read_text())
    content["annotations"][0]["category_id"] = 4  # the same size
    labels.write_text(json.dumps(content))
    settle(labels, 30)
    files = parsed_anew(monkeypatch)
    after = open_indexed(tmp_path)
    assert files == [labels]
    assert after.class_ids.tolist() != before.class_ids.tolist() and after.fingerprint != before.fingerprint
    assert_equal(open_indexed(tmp_path), after)
    assert files == [labels]


def test_other_images_are_noticed(labels: Path, tmp_path: Path) -> None:
    open_indexed(tmp_path)
    (tmp_path / "data" / "train2017" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg"):
        open_indexed(tmp_path)


def write_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["content.json", "boxes.npy"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, write_half, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"x" * 500)]
)
def test_a_damaged_index_is_replaced(
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], object],
) -> None:
    fresh = open_indexed(tmp_path)
    (folder,) = (tmp_path / "index").iterdir()
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder / name)
    files = parsed_anew(monkeypatch)
    with caplog.at_level(logging.INFO, logger="aligndet"):
        assert_equal(open_indexed(tmp_path), fresh)
    assert files == [labels] and caplog.text == ""
    assert list((tmp_path / "index").iterdir()) == [folder]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_an_index_takes_the_place_of_older_ones(labels: Path, tmp_path: Path) -> None:
    open_indexed(tmp_path)
    open_indexed(tmp_path, with_masks=True)
    before = sorted(folder.name for folder in (tmp_path / "index").iterdir())
    # Version 1 wrote a file; the index of another label file stays.
    (tmp_path / "index" / f"{before[0].split('.')[0]}.index").write_text("of version 1")
    (tmp_path / "index" / "instances_other-boxes-0.2-0-0").mkdir()
    settle(labels, 30)
    open_indexed(tmp_path)
    after = sorted(folder.name for folder in (tmp_path / "index").iterdir())
    assert len(after) == 3 and before[1] in after and "instances_other-boxes-0.2-0-0" in after
    assert before[0] not in after


def test_where_nothing_can_be_written_it_is_done_without(labels: Path, tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file where a folder should be")
    assert len(open_indexed(tmp_path)) == 3
    assert len(open_indexed(tmp_path)) == 3


def test_labels_that_have_just_changed_are_not_kept(labels: Path, tmp_path: Path) -> None:
    settle(labels, 0)
    open_indexed(tmp_path)
    assert not (tmp_path / "index").exists()


def test_wrong_labels_are_not_kept(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["image_id"] = 99
    settle(make_coco(tmp_path / "data", content))
    for _ in range(2):
        with pytest.raises(DataError, match="image id 99"):
            open_indexed(tmp_path)
    assert not (tmp_path / "index").exists()


def test_small_files_are_not_kept(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WORTHWHILE_BYTES", labels.stat().st_size + 1)
    open_indexed(tmp_path)
    assert not (tmp_path / "index").exists()


def test_several_processes_may_read_at_once(labels: Path, tmp_path: Path) -> None:
    found: list[ImageSet] = []
    threads = [threading.Thread(target=lambda: found.append(open_indexed(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({images.fingerprint for images in found}) == 1 and len(found) == 4
    assert len(list((tmp_path / "index").iterdir())) == 1  # and no temporary files


def test_unusual_names_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "Größe \u4e2d\n.jpg"
    settle(make_coco(tmp_path / "data", content))
    fresh = open_indexed(tmp_path)
    files = parsed_anew(monkeypatch)
    assert open_indexed(tmp_path).file_names == fresh.file_names and files == []
