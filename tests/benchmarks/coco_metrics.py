"""COCO metrics by hotcoco against pycocotools: CPU seconds, and equality to the bit.

    python tests/benchmarks/coco_metrics.py [--images 5000] [--detections 19]

Drawn boxes (and their rectangles as masks) of 80 classes, 7 objects and so many detections per image, as many as COCO's
validation images have.
"""

import argparse
import json
import time
from typing import Any
from unittest import mock

import numpy as np
from pycocotools import mask as coco_mask

from aligndet_cli.evaluate.analysis import TOUCH_IOU
from aligndet_cli.metrics.coco import CocoEvaluation, IouType, evaluate_coco

HEIGHT, WIDTH, NUM_CLASSES, NUM_OBJECTS = 480, 640, 80, 7


def drawn_data(num_images: int, num_detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth, and predictions of which half are near an object."""
    rng = np.random.default_rng(0)
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        boxes = np.concatenate([rng.integers(0, 300, (NUM_OBJECTS, 2)), rng.integers(4, 180, (NUM_OBJECTS, 2))], axis=1)
        classes = rng.integers(1, NUM_CLASSES + 1, NUM_OBJECTS)
        for box, class_id in zip(boxes.tolist(), classes.tolist(), strict=True):
            truths.append(
                {
                    "id": len(truths) + 1,
                    **_entry(image_id, class_id, box),
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.02),
                }
            )
        for row in rng.integers(0, NUM_OBJECTS, num_detections):
            near = (boxes[row] * rng.normal(1, 0.1, 4)).clip(1).round(1).tolist()
            class_id = int(classes[row]) if rng.random() < 0.5 else int(rng.integers(1, NUM_CLASSES + 1))
            found.append({**_entry(image_id, class_id, near), "score": round(float(rng.random()), 3)})
    images = [{"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, num_images + 1)]
    categories = [{"id": number, "name": str(number)} for number in range(1, NUM_CLASSES + 1)]
    return {"images": images, "categories": categories, "annotations": truths}, found


def _entry(image_id: int, class_id: int, box: list[float]) -> dict[str, Any]:
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    code = coco_mask.frPyObjects([corners], HEIGHT, WIDTH)[0]
    return {
        "image_id": image_id,
        "category_id": class_id,
        "bbox": box,
        "segmentation": {**code, "counts": code["counts"].decode()},
    }


def timed(
    truth: dict[str, Any], found: list[dict[str, Any]], iou_type: IouType, *, fast: bool
) -> tuple[CocoEvaluation, float]:
    """The evaluation as `evaluate` does it, error analysis of boxes included, and its CPU seconds."""
    with mock.patch("aligndet_cli.metrics.coco._suits_hotcoco", return_value=fast):
        begin = time.process_time()
        result = evaluate_coco(truth, found, iou_type=iou_type, loose_iou=TOUCH_IOU if iou_type == "bbox" else None)
        return result, time.process_time() - begin


def main() -> None:
    """Print a line for boxes and one for masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=19)
    options = parser.parse_args()
    truth, found = drawn_data(options.images, options.detections)
    for iou_type in ("bbox", "segm"):
        (slow, slow_s), (fast, fast_s) = (timed(truth, found, iou_type, fast=fast) for fast in (False, True))
        same = (
            json.dumps(slow.metrics) == json.dumps(fast.metrics)
            and slow.precision.tobytes() == fast.precision.tobytes()
        )
        print(
            f"{iou_type}: {options.images} images, {len(found)} detections, AP {100 * slow.metrics['AP']:.1f}: "
            f"pycocotools {slow_s:.2f} CPU-s, hotcoco {fast_s:.2f}, {slow_s / fast_s:.1f} times less; "
            f"{'equal' if same else 'NOT EQUAL'}"
        )


if __name__ == "__main__":
    main()
