"""Object proposals from one image without labels. The only place that knows how the boxes are found."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.proposals.compiling import compiled
from aligndet_cli.proposals.filters import FilterRules, filter_proposals
from aligndet_cli.proposals.grouping import Groups, Mix, group
from aligndet_cli.proposals.regions import Regions, describe_regions
from aligndet_cli.proposals.segmentation import edge_strength, segment
from aligndet_cli.proposals.soco import search_as_soco
from aligndet_cli.training.logs import logger

SearchMode = Literal["fast", "quality", "soco", "opencv-fast", "opencv-quality", "opencv-single"]

# Below this short side (px) there is nothing to segment: OpenCV's filters reach several pixels around each one.
_MIN_SHORT_SIDE = 16

_NUM_CODES = 16  # histogram bins per channel: the upper four bits
_STRONG_EDGE = 100.0  # gradient, in steps of 8-bit channels per pixel, from which an edge counts fully
_BLUR = 0.7  # sigma in pixels
_MIN_SIDE = 10  # pixels; smaller boxes are not told from noise


@dataclass(frozen=True)
class _Preset:
    """How much is searched.

    Attributes:
        working_size: square root of the number of pixels.
        scales: of the over-segmentations; see `segment`.
        min_region: pixels of their regions, at least.
        colours: colour spaces that are segmented, as conversions of OpenCV; None for RGB itself.
        mixes: similarities that regions are grouped by.
        pairs_at: see `group`.
    """

    working_size: int
    scales: tuple[float, ...]
    min_region: int
    colours: tuple[int | None, ...]
    mixes: tuple[Mix, ...]
    pairs_at: tuple[int, ...]


_EFFORT = Mix(fill=1, effort=1)
_COLOUR_BORDER = Mix(colour=1, border=1)
_SIZE_FILL = Mix(size=1, fill=1)
_COLOUR_SIZE_FILL = Mix(colour=1, size=1, fill=1)

# Found on minicoco and a part of bccd; examples/benchmarks.md has the figures.
_PRESETS = {
    "fast": _Preset(
        working_size=256,
        scales=(50, 150),
        min_region=24,
        colours=(cv2.COLOR_RGB2LAB,),
        mixes=(_EFFORT, _COLOUR_BORDER, _SIZE_FILL, _COLOUR_SIZE_FILL),
        pairs_at=(200, 100, 50),
    ),
    "quality": _Preset(
        working_size=288,
        scales=(40, 80),
        min_region=20,
        colours=(cv2.COLOR_RGB2LAB, cv2.COLOR_RGB2HSV, None),
        mixes=(_EFFORT, _COLOUR_BORDER, _SIZE_FILL, _COLOUR_SIZE_FILL),
        pairs_at=(200, 100, 50, 25),
    ),
}

# Weights of what makes a good box: large, with a strong border, found in several ways, joined rather than tried.
_SIZE, _BORDER, _AGREEMENT, _PAIR = 0.6, 4.0, 0.35, 1.5
_PATIENCE = 2.0  # seconds without an explanation
_SAME = 0.7  # IoU from which two boxes count as one find


def pixels_needed(mode: SearchMode, working_size: int | None) -> int | None:
    """Number of pixels that the search works on; None for the full resolution.

    Args:
        working_size: square root of it; None for the mode's own, or for the full image, as in the originals, where a
            mode has none.
    """
    if working_size is None and mode in _PRESETS:
        working_size = _PRESETS[mode].working_size
    return None if working_size is None else working_size**2


def search(
    image: NDArray[np.uint8], mode: SearchMode, working_size: int | None, size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Boxes of regions that selective search groups, best first; the same for every call, thread and process.

    The search runs on a copy scaled down to at most `pixels_needed`: an area rather than a side, so that the cost of
    a panorama is bounded as well.

    Args:
        image: (H, W, 3) uint8 RGB, possibly decoded at a reduced size of at least `pixels_needed`.
        working_size: see `pixels_needed`.
        size_hw: height and width of the full image, in whose pixels the boxes are.

    Returns:
        (N, 4) float32, xyxy, whole absolute pixels of the full image, unique. Empty for an image too thin to segment
        or in which nothing stands out.

    Source: Uijlings et al. 2013. `soco` is SoCo's recipe (Wei et al. 2021), as used by the paper (D.1), and keeps
        its order; `opencv-*` are OpenCV's, larger boxes first: OpenCV ranks by `rand()`, so that its first boxes
        change from call to call. `fast` and `quality` differ from the paper in the scaled copy, in cues (edge
        strength between regions instead of texture), in also giving out pairs of neighbours, and in the order.
    """
    small = _scaled_down(image, pixels_needed(mode, working_size))
    if small is None:
        return np.zeros((0, 4), dtype=np.float32)
    if mode in _PRESETS:
        boxes = _search_preset(small, _PRESETS[mode])
    elif mode == "soco":
        boxes = _first_of_each(search_as_soco(small))
    else:
        boxes = _first_of_each(_search_opencv(small, mode))
    boxes = boxes * np.tile([size_hw[1] / small.shape[1], size_hw[0] / small.shape[0]], 2)
    # A single region is the image itself: nothing was told apart from anything.
    return np.rint(boxes if len(boxes) > 1 else boxes[:0]).astype(np.float32)


def warm_up(mode: SearchMode) -> None:
    """Search a small image, so that everything is compiled, or loaded from where it is kept, before the work begins.

    Workers that start afterwards find it compiled. Compiling takes some 20 seconds, once per installation.
    """
    notice = threading.Timer(
        _PATIENCE, logger.info, ["compiling the search: this takes some 20 seconds, once per installation"]
    )
    notice.daemon = True
    notice.start()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    try:
        filter_proposals(search(noise, mode, None, (64, 64)), (64, 64), FilterRules(1, 3, 1, 0.5))
    finally:
        notice.cancel()


def _scaled_down(image: NDArray[np.uint8], num_pixels: int | None) -> NDArray[np.uint8] | None:
    """The image with at most so many pixels; None if too thin to segment."""
    height, width = image.shape[:2]
    scale = 1.0 if num_pixels is None else min(1.0, (num_pixels / float(height * width)) ** 0.5)
    small_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    if min(small_hw) < _MIN_SHORT_SIDE:
        return None
    if small_hw == (height, width):
        return image
    # Means over areas blur unevenly where the size hardly changes, as it does for images decoded at reduced size.
    interpolation = cv2.INTER_CUBIC if scale > 0.5 else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, small_hw[::-1], interpolation=interpolation), dtype=np.uint8)


def _search_preset(image: NDArray[np.uint8], preset: _Preset) -> NDArray[np.float32]:
    """(N, 4) float32 xyxy boxes in pixels of `image`, best first."""
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
            found.append(_alone(regions))
            found += [group(regions, mix, num_pixels, preset.pairs_at, _MIN_SIDE) for mix in preset.mixes]
    return _ranked(found, num_pixels)


def _alone(regions: Regions) -> Groups:
    """The regions themselves as groups of one."""
    count = len(regions.sizes)
    lengths = np.bincount(regions.ends.ravel(), np.repeat(regions.lengths, 2), count)
    strengths = np.bincount(regions.ends.ravel(), np.repeat(regions.strengths, 2), count)
    borders = (strengths / np.maximum(lengths, 1)).astype(np.float32)
    is_large = (regions.boxes[:, 2:] - regions.boxes[:, :2]).min(axis=1) >= _MIN_SIDE
    return Groups(regions.boxes[is_large], borders[is_large], np.ones(is_large.sum(), dtype=np.bool_))


def _converted(image: NDArray[np.uint8], colour: int | None) -> NDArray[np.uint8]:
    return image if colour is None else np.asarray(cv2.cvtColor(image, colour), dtype=np.uint8)


def _blurred(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), _BLUR), dtype=np.float32)


def _ranked(found: Sequence[Groups], num_pixels: int) -> NDArray[np.float32]:
    """The distinct boxes, (N, 4) float32, by falling promise and then by size and coordinates."""
    boxes, borders, joined = (np.concatenate(parts) for parts in zip(*found, strict=True))
    keys = _keys(boxes)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    times = np.diff(starts, append=len(order)).astype(np.int32)
    looks = np.maximum.reduceat((_BORDER * borders - _PAIR * ~joined)[order], starts)
    boxes = boxes[order[starts]]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(areas, kind="stable")
    boxes, areas = boxes[order], areas[order]
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    similar = num_similar(x1, y1, x2, y2, times[order], _SAME)
    promise = _SIZE * np.log(areas / num_pixels) + looks[order] + _AGREEMENT * np.log(similar)
    return np.asarray(boxes[np.argsort(-promise, kind="stable")], dtype=np.float32)


def _keys(boxes: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(N,) one number for each of (N, 4) boxes, which sorts ten times faster than rows; sides are below 2**16."""
    x1, y1, x2, y2 = boxes.T.astype(np.uint64)
    return np.asarray(x1 | y1 << np.uint64(16) | x2 << np.uint64(32) | y2 << np.uint64(48))


@compiled
def num_similar(
    x1: NDArray[np.float32],
    y1: NDArray[np.float32],
    x2: NDArray[np.float32],
    y2: NDArray[np.float32],
    times: NDArray[np.int32],
    threshold: float,
) -> NDArray[np.int32]:
    """(N,) int32 how often a box with an IoU of at least the threshold was found, each itself included.

    Args:
        x1: (N,) float32 left sides of boxes by rising area; also y1, x2, y2. One array each, cut to the boxes in
            question, and no branches: so the inner loop compares eight boxes at a time, six times as fast.
        times: (N,) int32 how often each was found.
    """
    areas = (x2 - x1) * (y2 - y1)
    starts = np.searchsorted(areas, areas * threshold)  # IoU is at most the ratio of the areas
    ends = np.searchsorted(areas, areas / threshold, side="right")
    least = np.float32(threshold / (1 + threshold))  # of the sum of the areas
    similar = np.empty_like(times)
    for i in range(len(areas)):
        near = slice(starts[i], ends[i])
        left, top, right, bottom, near_areas, near_times = (
            x1[near],
            y1[near],
            x2[near],
            y2[near],
            areas[near],
            times[near],
        )
        total = np.int32(0)
        for j in range(len(left)):
            width = max(min(x2[i], right[j]) - max(x1[i], left[j]), np.float32(0))
            height = max(min(y2[i], bottom[j]) - max(y1[i], top[j]), np.float32(0))
            is_same = width * height >= least * (areas[i] + near_areas[j])
            total += near_times[j] if is_same else np.int32(0)
        similar[i] = total
    return similar


def _search_opencv(image: NDArray[np.uint8], mode: SearchMode) -> NDArray[np.float32]:
    """(N, 4) float32 xyxy boxes, larger ones first."""
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
    """The boxes without those that stand earlier already, (N, 4) xyxy."""
    return boxes[np.sort(np.unique(_keys(boxes), return_index=True)[1])]
