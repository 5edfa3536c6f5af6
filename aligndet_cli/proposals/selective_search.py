"""Object proposals from one image without labels. The only place that knows how the boxes are found."""

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

SearchMode = Literal["opencv-fast", "opencv-quality", "opencv-single"]

# Below this short side (px) there is nothing to segment: OpenCV's filters reach several pixels around each one.
_MIN_SHORT_SIDE = 16


def search(image: NDArray[np.uint8], mode: SearchMode, working_size: int) -> NDArray[np.float32]:
    """Boxes of the regions that selective search groups, best first; the same for every call, thread and process.

    The search runs on a copy scaled down to at most `working_size` squared pixels: an area rather than a side, so
    that the cost of a panorama is bounded as well. Larger boxes come first, ties by coordinates.

    Args:
        image: (H, W, 3) uint8 RGB.
        working_size: square root of the number of pixels that are searched.

    Returns:
        (N, 4) float32, xyxy, whole absolute pixels of `image`, unique. Empty for an image too thin to segment or
        in which nothing stands out.

    Source: Uijlings et al. 2013, as implemented by OpenCV. We differ in the scaled copy and in the order:
        OpenCV ranks by `rand()`, so that its first boxes change from call to call.
    """
    height, width = image.shape[:2]
    scale = min(1.0, working_size / float(height * width) ** 0.5)
    small_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    if min(small_hw) < _MIN_SHORT_SIDE:
        return np.zeros((0, 4), dtype=np.float32)
    small = cv2.resize(image, small_hw[::-1], interpolation=cv2.INTER_AREA)
    boxes_xywh = _search_opencv(np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2BGR), dtype=np.uint8), mode).astype(
        np.float64
    )
    boxes = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
    boxes *= np.tile([width / small_hw[1], height / small_hw[0]], 2)
    ordered = _unique_large_first(np.rint(boxes).astype(np.float32))
    # A single region is the image itself: nothing was told apart from anything.
    return ordered if len(ordered) > 1 else ordered[:0]


def _search_opencv(image_bgr: NDArray[np.uint8], mode: SearchMode) -> NDArray[np.int32]:
    """(N, 4) int32 `boxes_xywh` in random order."""
    engine = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    engine.setBaseImage(image_bgr)
    if mode == "opencv-fast":
        engine.switchToSelectiveSearchFast()
    elif mode == "opencv-quality":
        engine.switchToSelectiveSearchQuality()
    else:
        engine.switchToSingleStrategy()
    return np.asarray(engine.process(), dtype=np.int32).reshape(-1, 4)


def _unique_large_first(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The distinct boxes, (N, 4) xyxy, by falling area and then by coordinates."""
    distinct = np.unique(boxes, axis=0)  # also sorts by x1, y1, x2, y2
    areas = (distinct[:, 2] - distinct[:, 0]) * (distinct[:, 3] - distinct[:, 1])
    return distinct[np.argsort(-areas, kind="stable")]
