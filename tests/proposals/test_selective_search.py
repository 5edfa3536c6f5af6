import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.images import read_image
from aligndet_cli.data.open import open_images
from aligndet_cli.proposals import selective_search
from aligndet_cli.proposals.filters import FilterRules, filter_proposals, has_allowed_size, pairwise_iou
from aligndet_cli.proposals.selective_search import SearchMode, pixels_needed, search

DIGEST_SCRIPT = """
import hashlib, os, sys
import numpy as np
from aligndet_cli.proposals.selective_search import search
image = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
found = [search(image, mode, None, image.shape[:2]).tobytes() for mode in ("fast", "opencv-fast")]
print([hashlib.sha256(boxes).hexdigest() for boxes in found])
"""


@pytest.fixture(scope="module")
def mosaic() -> np.ndarray:
    """6 x 8 squares of 24 px in random colours."""
    tiles = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return tiles.repeat(24, axis=0).repeat(24, axis=1)


MODES = get_args(SearchMode)


def search_whole(image: np.ndarray, mode: SearchMode = "fast") -> np.ndarray:
    """`search` in an image decoded at full size."""
    return search(image, mode, None, (image.shape[0], image.shape[1]))


@pytest.mark.parametrize("mode", MODES)
def test_two_squares_are_found(mode):
    image = np.full((211, 307, 3), 40, dtype=np.uint8)
    image[30:110, 20:90] = (220, 30, 30)
    image[70:190, 150:280] = (30, 200, 60)
    boxes = search_whole(image, mode)
    for expected in ([20, 30, 90, 110], [150, 70, 280, 190]):
        assert np.abs(boxes - expected).max(axis=1).min() <= 4


def test_boxes_are_in_full_resolution_pixels():
    """Also where the image comes decoded at a reduced size."""
    image = np.full((1055, 1535, 3), 40, dtype=np.uint8)
    image[350:950, 750:1400] = (30, 200, 60)
    # One pixel of the searched copy is 1535 / 309 = 5 pixels of the image.
    for boxes in (search_whole(image), search(image[::2, ::2], "fast", None, (1055, 1535))):
        assert np.abs(boxes - [750, 350, 1400, 950]).max(axis=1).min() <= 15
        assert boxes.min() >= 0
        assert (boxes[:, 2:] <= [1535, 1055]).all()
        np.testing.assert_array_equal(boxes, np.rint(boxes))


@pytest.mark.parametrize("mode", MODES)
def test_boxes_are_unique(mosaic, mode):
    boxes = search_whole(mosaic, mode)
    assert len(boxes) > 20
    assert boxes.dtype == np.float32
    assert len(np.unique(boxes, axis=0)) == len(boxes)


@pytest.mark.parametrize("mode", ["opencv-fast", "opencv-single"])
def test_opencv_boxes_come_large_first(mosaic, mode):
    boxes = search_whole(mosaic, mode)
    assert (np.diff((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) <= 0).all()


def test_an_object_with_a_strong_border_comes_before_the_clutter():
    image = np.random.default_rng(1).integers(100, 130, (240, 320, 3), dtype=np.uint8)
    image[60:180, 90:230] = np.random.default_rng(2).integers(10, 40, (120, 140, 3), dtype=np.uint8)
    boxes = search_whole(image)
    assert pairwise_iou(np.array([[90, 60, 230, 180]], np.float32), boxes[:5]).max() > 0.9
    assert len(boxes) > 100


def test_same_bytes_on_every_call_thread_and_process(mosaic):
    with ThreadPoolExecutor(2) as pool:
        found = [
            list(pool.map(lambda _, mode=mode: search_whole(mosaic, mode).tobytes(), range(4)))
            for mode in ("fast", "opencv-fast")
        ]
    assert all(len(set(calls)) == 1 for calls in found)
    digests = {str([hashlib.sha256(calls[0]).hexdigest() for calls in found])}
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST_SCRIPT], env=environment, check=True, capture_output=True, text=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_works_without_a_place_for_compiled_code(tmp_path):
    """Neither the package nor the home folder can be written: as root, by files in the place of folders."""
    package = tmp_path / "aligndet_cli"
    shutil.copytree(Path(selective_search.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "proposals" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    code = (
        "import numpy as np; from aligndet_cli.proposals import segmentation as module;"
        "print(module.edge_strength(np.zeros((2, 2, 1), np.float32)).sum(), module.__file__)"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["0.0", str(package / "proposals" / "segmentation.py")], done.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size_hw", [(1, 1), (2, 20_000), (20_000, 2), (15, 300), (64, 64)])
def test_tiny_thin_and_uniform_images_have_no_proposals(size_hw, mode):
    if size_hw == (20_000, 2) and mode == "opencv-quality":
        pytest.skip("as (2, 20_000)")
    assert search_whole(np.full((*size_hw, 3), 127, dtype=np.uint8), mode).shape == (0, 4)


def test_noise_is_segmented_into_a_bounded_number_of_regions():
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    boxes = search_whole(noise)
    assert 0 < len(boxes) < 30_000
    assert np.isfinite(boxes).all()


def test_panorama_is_searched_at_bounded_size():
    image = np.zeros((100, 9_000, 3), dtype=np.uint8)
    image[20:80, 4_000:4_150] = 255
    boxes = search_whole(image)
    assert np.abs(boxes - [4_000, 20, 4_150, 80]).max(axis=1).min() <= 12


def test_pixels_needed():
    assert pixels_needed("fast", None) == 256**2
    assert pixels_needed("fast", 100) == 100**2
    assert pixels_needed("soco", None) is None
    assert pixels_needed("opencv-fast", 280) == 280**2


def test_objects_of_real_photos_are_found(shared_data):
    """At least 80 % of objects of 32 px in 32 photos at IoU 0.5; see examples/benchmarks.md for all of them."""
    image_set = open_images(DataConfig(root=shared_data / "minicoco", limit=32), purpose="val")
    found = []
    for index in range(32):
        record = image_set.record(index)
        image = read_image(record.path)
        boxes = filter_proposals(search_whole(image), (image.shape[0], image.shape[1]), FilterRules(32, 3, 0.8, 0.5))
        objects = record.boxes[~record.is_crowd & has_allowed_size(record.boxes, (1, 1), 32, np.inf)]
        found += (pairwise_iou(objects, boxes).max(axis=1, initial=0) >= 0.5).tolist()
    assert len(found) > 100
    assert np.mean(found) > 0.8
