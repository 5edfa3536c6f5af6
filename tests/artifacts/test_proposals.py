import json
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from aligndet_cli.artifacts.proposals import STORE_FILES, ImageProposals, ProposalStore, write_store
from aligndet_cli.data.dataset import positions_of
from aligndet_cli.errors import DataError


def image(image_id: int, num_boxes: int) -> ImageProposals:
    boxes = np.arange(4 * num_boxes, dtype=np.float32).reshape(-1, 4) + image_id
    return ImageProposals(image_id, f"dir/{image_id}.jpg", (480, 640), boxes)


@pytest.fixture
def images() -> list[ImageProposals]:
    # Ids out of order; the first, a middle and the last image have no boxes.
    return [image(70, 0), image(5, 3), image(900, 0), image(11, 2), image(6, 0)]


def test_what_was_written_is_read(tmp_path, images):
    write_store(tmp_path, images)
    store = ProposalStore(tmp_path)
    assert len(store) == 5
    assert store.total == 5
    assert store.image_ids.tolist() == [70, 5, 900, 11, 6]
    assert store.counts.tolist() == [0, 3, 0, 2, 0]
    for index, expected in enumerate(images):
        np.testing.assert_array_equal(store.boxes_of(index), expected.boxes)
        assert store.boxes_of(index).shape == expected.boxes.shape
    assert [(entry.file_name, entry.size_hw, entry.count) for entry in store.images()][1] == (
        "dir/5.jpg",
        (480, 640),
        3,
    )


def test_a_store_may_have_no_boxes(tmp_path):
    write_store(tmp_path, [image(1, 0)])
    store = ProposalStore(tmp_path)
    assert (len(store), store.total) == (1, 0)
    assert store.boxes_of(0).shape == (0, 4)


def test_unknown_images_are_told(tmp_path, images):
    write_store(tmp_path, images)
    store = ProposalStore(tmp_path)
    assert positions_of(np.array([0, 12, 901, 11]), store.image_ids).tolist() == [-1, -1, -1, 3]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            store.boxes_of(outside)


def test_pickled_store_carries_no_boxes(tmp_path):
    write_store(tmp_path, [image(1, 10_007)])
    content = pickle.dumps(ProposalStore(tmp_path))
    assert len(content) < 1000
    assert pickle.loads(content).total == 10_007


def test_the_same_input_gives_the_same_bytes(tmp_path, images):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_store(tmp_path / name, iter(images))
        contents.append([(tmp_path / name / file).read_bytes() for file in STORE_FILES])
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == sorted(STORE_FILES)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("file", STORE_FILES[:3])
def test_missing_or_damaged_files_are_named(tmp_path, images, file):
    write_store(tmp_path, images)
    (tmp_path / file).write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match=f"{file}: damaged"):
        ProposalStore(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=f"{file}: not found"):
        ProposalStore(tmp_path)


def test_files_of_different_runs_are_refused(tmp_path, images):
    write_store(tmp_path, images)
    np.save(tmp_path / "offsets.npy", np.array([0, 0, 3, 3, 5, 6]))
    with pytest.raises(DataError, match="do not belong together"):
        ProposalStore(tmp_path)


def test_ten_million_boxes_open_at_once_and_stay_on_disk(tmp_path):
    num_images, per_image = 100_000, 100
    with (tmp_path / "boxes.npy").open("wb") as handle:  # sparse: 160 MB that take no disk space
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_images * per_image, 4)}
        np.lib.format.write_array_header_1_0(handle, header)
        handle.truncate(handle.tell() + num_images * per_image * 16)
    np.save(tmp_path / "offsets.npy", np.arange(num_images + 1) * per_image)
    np.save(tmp_path / "image_ids.npy", np.arange(num_images)[::-1])
    (tmp_path / "images.jsonl").write_text("not read")
    began = time.process_time()
    store = ProposalStore(tmp_path)
    (place,) = positions_of(np.array([17]), store.image_ids)
    assert store.boxes_of(place).shape == (per_image, 4)
    assert time.process_time() - began < 1
    # In a process of its own, opening and reading one image must not load the 160 MB.
    script = (
        "import json, sys, resource, pathlib\n"
        "from aligndet_cli.artifacts.proposals import ProposalStore\n"
        "usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = usage(); store = ProposalStore(pathlib.Path(sys.argv[1]))\n"
        "store.boxes_of(store.image_ids.tolist().index(17)).sum(); print(json.dumps(usage() - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) < 30_000  # KiB
