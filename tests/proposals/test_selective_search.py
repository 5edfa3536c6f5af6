import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aligndet_cli.proposals.selective_search import search

DIGEST_SCRIPT = """
import hashlib, os, sys
import numpy as np
from aligndet_cli.proposals.selective_search import search
image = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
print(hashlib.sha256(search(image, "opencv-fast", 280).tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def mosaic() -> np.ndarray:
    """6 x 8 squares of 24 px in random colours."""
    tiles = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return tiles.repeat(24, axis=0).repeat(24, axis=1)


def test_two_squares_are_found():
    image = np.full((211, 307, 3), 40, dtype=np.uint8)
    image[30:110, 20:90] = (220, 30, 30)
    image[70:190, 150:280] = (30, 200, 60)
    boxes = search(image, "opencv-fast", 280)
    for expected in ([20, 30, 90, 110], [150, 70, 280, 190]):
        assert np.abs(boxes - expected).max(axis=1).min() <= 4


def test_boxes_are_in_full_resolution_pixels():
    image = np.full((1055, 1535, 3), 40, dtype=np.uint8)
    image[350:950, 750:1400] = (30, 200, 60)
    boxes = search(image, "opencv-fast", 280)
    # One pixel of the searched copy is 1535 / 338 = 4.5 pixels of the image.
    assert np.abs(boxes - [750, 350, 1400, 950]).max(axis=1).min() <= 15
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= [1535, 1055]).all()


def test_boxes_are_unique_and_large_first(mosaic):
    boxes = search(mosaic, "opencv-fast", 280)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert len(boxes) > 20
    assert boxes.dtype == np.float32
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert (np.diff(areas) <= 0).all()


def test_same_bytes_on_every_call_thread_and_process(mosaic):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: search(mosaic, "opencv-fast", 280).tobytes(), range(4)))
    digests = {hashlib.sha256(boxes).hexdigest() for boxes in found}
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST_SCRIPT], env=environment, check=True, capture_output=True, text=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize("mode", ["opencv-fast", "opencv-single", "opencv-quality"])
def test_modes_work(mosaic, mode):
    assert len(search(mosaic[:96, :96], mode, 280)) > 5


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 20_000), (20_000, 2), (15, 300), (64, 64)])
def test_tiny_thin_and_uniform_images_have_no_proposals(size_hw):
    assert search(np.full((*size_hw, 3), 127, dtype=np.uint8), "opencv-fast", 280).shape == (0, 4)


def test_panorama_is_searched_at_bounded_size():
    image = np.zeros((100, 9_000, 3), dtype=np.uint8)
    image[20:80, 4_000:4_150] = 255
    boxes = search(image, "opencv-single", 280)
    assert np.abs(boxes - [4_000, 20, 4_150, 80]).max(axis=1).min() <= 12
