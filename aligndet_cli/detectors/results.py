"""Turn detections into COCO results: original image and category ids, boxes in the original image's pixels."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.detectors.interface import Detections, Detector
from aligndet_cli.detectors.parts.mask_head import paste_mask
from aligndet_cli.errors import RunError
from aligndet_cli.training.placement import autocast

# Finer than the accuracy of float32, and short in the file.
BOX_DECIMALS = 3
SCORE_DECIMALS = 6

# Positions in the image set, images, and original sizes (height, width).
EvaluationBatch = tuple[list[int], ImageBatch, list[tuple[int, int]]]


@contextlib.contextmanager
def forward_pass(device: torch.device, precision: str) -> Iterator[None]:
    """Compute the block in a precision: `32-true`, `bf16-mixed` or `16-mixed`.

    Raises:
        RunError: out of GPU memory.
    """
    try:
        with autocast(device, precision):
            yield
    except torch.OutOfMemoryError as error:
        raise RunError("out of GPU memory: lower --batch-size or --short-side and --long-side") from error


def predict_images(
    model: Detector, batches: Iterable[EvaluationBatch], image_set: ImageSet, categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """Return the COCO results of all images; arguments as in `predict_each`."""
    return [entry for _, found in predict_each(model, batches, image_set, categories) for entry in found]


@torch.inference_mode()
def predict_each(
    model: Detector, batches: Iterable[EvaluationBatch], image_set: ImageSet, categories: Sequence[Category]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield `(index, COCO results)` of each image, in the order of the batches.

    Args:
        model: in evaluation mode; the caller sets that, and the precision.
        batches: with positions in `image_set`.
        categories: the model's, by class id.
    """
    for index, found in entries_of_each(model, batches, categories):
        image_id = int(image_set.image_ids[index])
        yield index, [{"image_id": image_id, **entry} for entry in found]


@torch.inference_mode()
def entries_of_each(
    model: Detector, batches: Iterable[EvaluationBatch], categories: Sequence[Category]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield `(index, COCO results without image id)`, as `predict_each`; the batches may be of any images."""
    unused = {category.category_id for category in categories if category.is_unused}
    for indices, images, original_sizes in batches:
        for index, detections, view_hw, size_hw in zip(
            indices, model.detect(images), images.sizes_hw, original_sizes, strict=True
        ):
            found = detections_to_coco(detections, view_hw, size_hw, categories)
            yield index, [entry for entry in found if entry["category_id"] not in unused]


def detections_to_coco(
    detections: Detections, view_hw: tuple[int, int], size_hw: tuple[int, int], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """Return COCO result entries without image id: `category_id`, `bbox` (xywh), `score`, `segmentation` if masks.

    Args:
        detections: N boxes in the pixels of the resized image.
        view_hw: height and width of the resized image, without padding.
        size_hw: height and width of the original.
        categories: by class id.

    Source: as mmdetection, divide by `new_w / w` and `new_h / h` (the true factors after rounding), then clip.
    """
    rescaled = rescale_boxes(detections.boxes, view_hw, size_hw)
    boxes = rescaled.cpu().numpy()  # (N, 4)
    scores = detections.scores.cpu().double().numpy()
    class_ids = detections.class_ids.cpu().numpy()
    boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    entries: list[dict[str, Any]] = [
        {
            "category_id": categories[int(class_id)].category_id,
            "bbox": [round(value, BOX_DECIMALS) for value in box],
            "score": round(score, SCORE_DECIMALS),
        }
        for class_id, box, score in zip(class_ids, boxes_xywh.tolist(), scores.tolist(), strict=True)
    ]
    if detections.masks is not None:
        for entry, mask, box in zip(entries, detections.masks, rescaled.float(), strict=True):
            entry["segmentation"] = _mask_to_rle(mask, box, size_hw)
    return entries


def rescale_boxes(boxes: Tensor, view_hw: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """Scale (N, 4) xyxy boxes from the resized image to the pixels of the original, and clip them to it."""
    (view_height, view_width), (height, width) = view_hw, size_hw
    scale_x, scale_y = view_width / width, view_height / height
    rescaled = boxes.double() / boxes.new_tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float64)
    return torch.minimum(rescaled.clamp(min=0), rescaled.new_tensor([width, height, width, height]))


def _mask_to_rle(probabilities: Tensor, box: Tensor, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Return the COCO run-length code, at the original size, of the (M, M) mask in a (4,) box."""
    mask, (top, left) = paste_mask(probabilities, box, size_hw)
    pixels = np.zeros(size_hw, dtype=np.uint8, order="F")
    pixels[top : top + mask.shape[0], left : left + mask.shape[1]] = mask.cpu().numpy()
    code = coco_mask.encode(pixels)
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}
