"""Object proposals for one image without labels, in every mode of the search."""

import threading
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.logs import logger
from aligndet_cli.proposals.filters import FilterRules, filter_proposals
from aligndet_cli.proposals.grouping import Groups, Mix, group, group_alone
from aligndet_cli.proposals.ranking import box_keys, ranked
from aligndet_cli.proposals.regions import describe_regions
from aligndet_cli.proposals.segmentation import edge_strength, segment
from aligndet_cli.proposals.soco import search_as_soco

SearchMode = Literal["fast", "quality", "soco", "opencv-fast", "opencv-quality", "opencv-single"]

# Images with a shorter side (px) are not segmented: OpenCV's filters reach several pixels around each one.
_MIN_SHORT_SIDE = 16

_NUM_CODES = 16  # histogram bins per channel: the upper four bits
_STRONG_EDGE = 100.0  # gradient, in 8-bit steps per pixel, that gives the full edge strength of 1
_BLUR = 0.7  # sigma in pixels
_MIN_SIDE = 10  # pixels; smaller boxes cannot be told from noise


@dataclass(frozen=True)
class _Preset:
    """Effort of a search.

    Attributes:
        working_size: square root of the number of pixels that are searched.
        scales: of the over-segmentations, see `segment`.
        min_region: least number of pixels of their regions.
        colours: colour spaces that are segmented, as conversions of OpenCV; None for RGB.
        pairs_at: see `group`.
    """

    working_size: int
    scales: tuple[float, ...]
    min_region: int
    colours: tuple[int | None, ...]
    pairs_at: tuple[int, ...]


# Each gives a hierarchy of its own.
_MIXES = (
    Mix(fill=1, effort=1),
    Mix(colour=1, border=1),
    Mix(size=1, fill=1),
    Mix(colour=1, size=1, fill=1),
    Mix(border=1, size=1, fill=1),
)

# Found on the training photos of minicoco and bccd; examples/benchmarks.md has the figures.
_PRESETS = {
    "fast": _Preset(
        working_size=256, scales=(50, 150), min_region=24, colours=(cv2.COLOR_RGB2LAB,), pairs_at=(200, 100, 50)
    ),
    "quality": _Preset(
        working_size=304,
        scales=(40, 80, 200),
        min_region=20,
        colours=(cv2.COLOR_RGB2LAB, cv2.COLOR_RGB2HSV, None),
        pairs_at=(200, 100, 50, 25),
    ),
}

_PATIENCE = 2.0  # seconds until the log explains the wait


def pixels_needed(mode: SearchMode, working_size: int | None) -> int | None:
    """Return the number of pixels that the search works on; None for the full resolution.

    Args:
        working_size: square root of that number. None for the mode's own; modes of others' methods have none and
            search the full image.
    """
    if working_size is None and mode in _PRESETS:
        working_size = _PRESETS[mode].working_size
    return None if working_size is None else working_size**2


def search(
    image: NDArray[np.uint8], mode: SearchMode, working_size: int | None, size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the boxes that selective search finds, best first; the same for every call, thread and process.

    The search runs on a copy scaled down to at most `pixels_needed`. The limit is an area, not a side, to bound the
    cost of a panorama as well.

    Args:
        image: (H, W, 3) uint8 RGB, possibly decoded at a reduced size of at least `pixels_needed`.
        working_size: see `pixels_needed`.
        size_hw: height and width of the full image.

    Returns:
        (N, 4) float32, xyxy, whole absolute pixels of the full image, unique. Empty for an image that is too thin to
        segment or has a single region.

    Source: Uijlings et al. 2013. `soco` is SoCo's recipe (Wei et al. 2021), as used by the paper (D.1), in its order.
        `opencv-*` are OpenCV's, larger boxes first: OpenCV itself ranks by `rand()`, so its first boxes change from
        call to call. `fast` and `quality` differ from Uijlings et al. in the scaled copy, in the cues (edge strength
        between regions instead of texture), in the pairs of neighbours, and in the order.
    """
    small = scaled_down(image, pixels_needed(mode, working_size))
    if small is None:
        return np.zeros((0, 4), dtype=np.float32)
    if mode in _PRESETS:
        boxes = ranked(*find_groups(small, mode))
    elif mode == "soco":
        boxes = _first_of_each(search_as_soco(small))
    else:
        boxes = _first_of_each(_search_opencv(small, mode))
    boxes = boxes * np.tile([size_hw[1] / small.shape[1], size_hw[0] / small.shape[0]], 2)
    # A single region is the whole image.
    return np.rint(boxes if len(boxes) > 1 else boxes[:0]).astype(np.float32)


def warm_up(mode: SearchMode) -> None:
    """Compile the search, or load it from the cache, by searching a small image; workers then find it compiled.

    Compiling takes some 20 seconds, once per installation.
    """
    text = "compiling the search: this takes some 20 seconds, once per installation"
    notice = threading.Timer(_PATIENCE, logger.info, [text])
    notice.daemon = True
    notice.start()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    try:
        filter_proposals(search(noise, mode, None, (64, 64)), (64, 64), FilterRules(1, 3, 1, 0.5))
    finally:
        notice.cancel()


def scaled_down(image: NDArray[np.uint8], num_pixels: int | None) -> NDArray[np.uint8] | None:
    """Return an (H, W, 3) image scaled down to at most `num_pixels` pixels; None if it is too thin to segment."""
    height, width = image.shape[:2]
    scale = 1.0 if num_pixels is None else min(1.0, (num_pixels / float(height * width)) ** 0.5)
    small_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    if min(small_hw) < _MIN_SHORT_SIDE:
        return None
    if small_hw == (height, width):
        return image
    # Area means blur unevenly if the size hardly changes, as for images that were decoded at a reduced size.
    interpolation = cv2.INTER_CUBIC if scale > 0.5 else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, small_hw[::-1], interpolation=interpolation), dtype=np.uint8)


def find_groups(image: NDArray[np.uint8], mode: SearchMode) -> tuple[list[Groups], NDArray[np.float32]]:
    """Return all groups that `fast` or `quality` find in an (H, W, 3) image, and its (H, W) edge strength, 0..1."""
    preset = _PRESETS[mode]
    num_pixels = image.shape[0] * image.shape[1]
    lab = _converted(image, cv2.COLOR_RGB2LAB)
    codes = np.right_shift(lab, 4, dtype=np.uint8)
    smooth_lab = _blurred(lab)
    strength = np.minimum(edge_strength(smooth_lab) / np.float32(_STRONG_EDGE), np.float32(1))
    found: list[Groups] = []
    for colour in preset.colours:
        pixels = smooth_lab if colour == cv2.COLOR_RGB2LAB else _blurred(_converted(image, colour))
        for labels in segment(pixels, np.array(preset.scales, dtype=np.float64), preset.min_region):
            regions = describe_regions(labels, codes, _NUM_CODES, strength)
            found.append(group_alone(regions, _MIN_SIDE))
            found += [group(regions, mix, num_pixels, preset.pairs_at, _MIN_SIDE) for mix in _MIXES]
    return found, strength


def _converted(image: NDArray[np.uint8], colour: int | None) -> NDArray[np.uint8]:
    return image if colour is None else np.asarray(cv2.cvtColor(image, colour), dtype=np.uint8)


def _blurred(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), _BLUR), dtype=np.float32)


def _search_opencv(image: NDArray[np.uint8], mode: SearchMode) -> NDArray[np.float32]:
    """Return OpenCV's boxes, (N, 4) float32 xyxy, largest first."""
    engine = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    engine.setBaseImage(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if mode == "opencv-fast":
        engine.switchToSelectiveSearchFast()
    elif mode == "opencv-quality":
        engine.switchToSelectiveSearchQuality()
    else:
        engine.switchToSingleStrategy()
    boxes_xywh = np.asarray(engine.process(), dtype=np.float32).reshape(-1, 4)
    boxes = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
    return boxes[np.lexsort((*boxes.T[::-1], -boxes_xywh[:, 2] * boxes_xywh[:, 3]))]


def _first_of_each(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Remove repeated boxes from (N, 4) xyxy; each first one stays in its place."""
    return boxes[np.sort(np.unique(box_keys(boxes), return_index=True)[1])]
