"""Run an exported file, and compare its detections with ours."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.tools.conversion.onnx_graph import WithNMS

BOX_TOLERANCE = 0.1  # pixels
SCORE_TOLERANCE = 1e-4
MASK_TOLERANCE = 1e-2  # of probabilities
_MOST_TIED = 0.1  # of the detections; where more have no counterpart, it is not for equal scores
_OTHER_CLASS = 1e9  # in tolerances


class Session(Protocol):
    """Session of onnxruntime, as far as it is used here."""

    def run(self, names: None, inputs: dict[str, NDArray[Any]], /) -> list[NDArray[Any]]:
        """Return all outputs."""


@dataclass(frozen=True)
class Comparison:
    """Differences of the detections of two programs.

    Attributes:
        num_images, num_detections: what was compared: images, and pairs of detections that belong together.
        boxes_px, scores, masks: largest differences of these pairs; masks are None without any.
        num_swapped: detections that stand behind one whose score is equal within the tolerance; more is a mistake.
        num_at_limit: detections that only one of the two has, because their score is just at the threshold, or the
            last of a full list, or because each has another one of two that overlap, whose scores are equal.
        mistakes: a sentence for each detection that differs by more.
    """

    num_images: int
    num_detections: int
    boxes_px: float
    scores: float
    masks: float | None
    num_swapped: int
    num_at_limit: int
    mistakes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        masks = "" if self.masks is None else f", masks {self.masks:.1g}"
        order = f"{self.num_swapped} of equal score swapped" if self.num_swapped else "in the same order"
        at_limit = f", {self.num_at_limit} at the limit in one of them only" if self.num_at_limit else ""
        return (
            f"{self.num_detections} detections in {self.num_images} images: boxes differ by up to {self.boxes_px:.2g} "
            f"px, scores {self.scores:.1g}{masks}; {order}{at_limit}"
        )


def compare(model: WithNMS | DETR, session: Session, batches: Sequence[ImageBatch], *, with_nms: bool) -> Comparison:
    """Compare a file's detections in some images with those of the model it was made from.

    Args:
        model: in evaluation mode, on the CPU.
        session: the file, run by onnxruntime.
        batches: the images.
        with_nms: False: the file leaves NMS and the choice of the best to us.
    """
    pairs = _detect_twice(model, session, batches, with_nms=with_nms)
    limit = model.config.max_detections
    nms_iou = None if isinstance(model, DETR) else model.config.nms_iou
    parts = [_compare_image(*pair, limit, nms_iou, f"image {number}") for number, pair in enumerate(pairs, start=1)]
    masks = [part.masks for part in parts if part.masks is not None]
    return Comparison(
        num_images=len(parts),
        num_detections=sum(part.num_detections for part in parts),
        boxes_px=max(part.boxes_px for part in parts),
        scores=max(part.scores for part in parts),
        masks=max(masks) if masks else None,
        num_swapped=sum(part.num_swapped for part in parts),
        num_at_limit=sum(part.num_at_limit for part in parts),
        mistakes=tuple(mistake for part in parts for mistake in part.mistakes),
    )


@torch.no_grad()
def _detect_twice(
    model: WithNMS | DETR, session: Session, batches: Sequence[ImageBatch], *, with_nms: bool
) -> Iterator[tuple[Detections, Detections]]:
    """Yield our detections of each image, and those of the file."""
    for batch in batches:
        inputs = {"pixels": batch.pixels.numpy(), "sizes": np.array(batch.sizes_hw, dtype=np.int64)}
        outputs = [torch.from_numpy(output) for output in session.run(None, inputs)]
        for index, (ours, size_hw) in enumerate(zip(model.detect(batch), batch.sizes_hw, strict=True)):
            theirs = Detections(*(output[index, outputs[1][index] > 0] for output in outputs))
            yield ours, theirs if with_nms else _suppress(model, theirs, size_hw)


def _suppress(model: WithNMS | DETR, found: Detections, size_hw: tuple[int, int]) -> Detections:
    """Do what a file without NMS leaves to its user."""
    assert not isinstance(model, DETR)
    config = model.config
    kept = select_detections(
        found.boxes,
        found.scores,
        found.class_ids,
        nms_iou=config.nms_iou,
        max_detections=config.max_detections,
        nms_type=config.nms_type if isinstance(config, RCNNConfig) else "nms",
    )
    return replace(kept, boxes=clip_boxes_to_image(kept.boxes, size_hw))


def _compare_image(
    ours: Detections, theirs: Detections, max_detections: int, nms_iou: float | None, name: str
) -> Comparison:
    """Compare the detections of one image.

    Each detection of one belongs to one of the other, so that they differ least in all.

    Args:
        nms_iou: IoU above which the worse of two is dropped; None without NMS.
    """
    boxes = (ours.boxes[:, None] - theirs.boxes).abs().amax(dim=2)  # (N, M) pixels
    scores = (ours.scores[:, None] - theirs.scores).abs()
    costs = torch.maximum(boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)
    costs = costs.masked_fill(ours.class_ids[:, None] != theirs.class_ids, _OTHER_CLASS)
    row, column = (torch.from_numpy(places) for places in linear_sum_assignment(costs.clamp(max=_OTHER_CLASS)))
    is_equal = costs[row, column] <= 1
    row, column = row[is_equal], column[is_equal]
    limits = [found.scores[-1].item() for found in (ours, theirs) if len(found.scores) == max_detections]
    limit = max(limits, default=0.0) + SCORE_TOLERANCE
    lone, their_lone = _others(len(ours.scores), row), _others(len(theirs.scores), column)
    tied = (costs < _OTHER_CLASS) & (scores <= SCORE_TOLERANCE)
    tied &= box_iou(ours.boxes, theirs.boxes) > (1 if nms_iou is None else nms_iou)
    tied = tied[lone][:, their_lone] & (len(lone) <= _MOST_TIED * len(row))
    alone = [
        *zip(ours.scores[lone].tolist(), tied.any(dim=1).tolist(), itertools.repeat("ours")),
        *zip(theirs.scores[their_lone].tolist(), tied.any(dim=0).tolist(), itertools.repeat("the file's")),
    ]
    mistakes = [
        f"{name}: {whose} of score {score:.5f} has no counterpart"
        for score, is_tied, whose in alone
        if score > limit and not is_tied
    ]
    in_their_order = ours.scores[row[column.argsort()]]
    num_swapped = int((row[column.argsort()].diff() < 0).sum())
    if len(in_their_order) and (in_their_order.diff() > 2 * SCORE_TOLERANCE).any():
        mistakes.append(f"{name}: detections are in another order")
    masks = None
    if ours.masks is not None and theirs.masks is not None:
        masks = _largest((ours.masks[row] - theirs.masks[column]).abs())
        if masks > MASK_TOLERANCE:
            mistakes.append(f"{name}: masks differ by {masks:.2g}")
    return Comparison(
        num_images=1,
        num_detections=len(row),
        boxes_px=_largest(boxes[row, column]),
        scores=_largest(scores[row, column]),
        masks=masks,
        num_swapped=num_swapped,
        num_at_limit=sum(score <= limit or is_tied for score, is_tied, _ in alone),
        mistakes=tuple(mistakes),
    )


def _others(count: int, paired: Tensor) -> Tensor:
    """Return the numbers below `count` that are not in `paired`."""
    return torch.ones(count, dtype=torch.bool).index_fill(0, paired, value=False).nonzero()[:, 0]


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
