"""Fit the weights that order the proposals, and show what they find in photos they were not fitted to.

    python tests/benchmarks/proposal_order.py COCO_OR_VOC_ROOT [MORE_ROOTS ...] [--mode fast] [--split train]

What is fitted: whether a box that passes the paper's filters has an IoU of at least 0.8 with an object of at least
32 px a side. All roots count the same, whatever the number of their photos. Recall at IoU 0.5 of the first
50 / 100 / 300 boxes is printed per root, of the program's order and of one fitted to the other half of the photos.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from proposals import BUDGETS, RULES, objects_of
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import decode_reduced, read_bytes
from aligndet_cli.data.open import open_images
from aligndet_cli.proposals.filters import has_allowed_ratio, has_allowed_size, nms, pairwise_iou
from aligndet_cli.proposals.ranking import WEIGHTS, describe_boxes
from aligndet_cli.proposals.selective_search import SearchMode, find_groups, pixels_needed, scaled_down

GOOD = 0.8  # IoU with an object


class Photo(NamedTuple):
    """Boxes (N, 4) xyxy of one photo, their cues (N, 6) and their IoU with its objects (N, G)."""

    boxes: np.ndarray
    cues: np.ndarray
    overlaps: np.ndarray


def describe(image_set: ImageSet, index: int, mode: SearchMode) -> Photo:
    """Search one photo."""
    path = image_set.record(index).path
    image, size_hw = decode_reduced(read_bytes(path), path, pixels_needed(mode, None) or 1)
    small = scaled_down(image, pixels_needed(mode, None))
    if small is None:
        raise SystemExit(f"{path} is too thin to be searched")
    boxes, cues = describe_boxes(*find_groups(small, mode))
    boxes = np.rint(boxes * np.tile([size_hw[1] / small.shape[1], size_hw[0] / small.shape[0]], 2)).astype(np.float32)
    passes = has_allowed_ratio(boxes, RULES.max_ratio) & has_allowed_size(
        boxes, size_hw, RULES.min_size, RULES.max_size
    )
    columns = np.stack([cues[name] for name in WEIGHTS], axis=1)
    return Photo(boxes[passes], columns[passes], pairwise_iou(boxes[passes], objects_of(image_set, index)))


def fit(roots: Sequence[Sequence[Photo]]) -> np.ndarray:
    """(6,) weights of the cues."""
    cues = np.concatenate([photo.cues for photos in roots for photo in photos])
    is_good = np.concatenate([photo.overlaps.max(axis=1, initial=0) >= GOOD for photos in roots for photo in photos])
    counts = [sum(len(photo.boxes) for photo in photos) for photos in roots]
    weights = np.repeat(len(cues) / (np.array(counts) * len(roots)), counts)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(cues, is_good, logisticregression__sample_weight=weights)
    return model[-1].coef_[0] / model[0].scale_


def recall(photos: Sequence[Photo], weights: np.ndarray) -> str:
    """Of the objects of some photos, at each budget."""
    best = []
    for boxes, cues, overlaps in photos:
        order = np.argsort(-cues @ weights, kind="stable")
        order = order[nms(boxes[order], RULES.nms)]
        best.append([overlaps[order[:budget]].max(axis=0, initial=0) for budget in BUDGETS[:3]])
    found = np.concatenate(best, axis=1) >= 0.5
    return " / ".join(f"{value:.1f}" for value in found.mean(axis=1) * 100)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+")
    parser.add_argument("--mode", choices=("fast", "quality"), default="fast")
    parser.add_argument("--split")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    image_sets = [
        open_images(DataConfig(root=root, split=arguments.split), purpose="train") for root in arguments.roots
    ]
    roots = [[describe(images, index, arguments.mode) for index in range(len(images))] for images in image_sets]
    halves = [[photos[start::2] for photos in roots] for start in range(2)]
    own = np.array(list(WEIGHTS.values()))
    print("| photos | program's order | fitted to the other half |\n|---|---|---|")
    for start, half in enumerate(halves):
        weights = fit(halves[1 - start])
        for images, photos in zip(image_sets, half, strict=True):
            name = f"{len(photos)} of {images.root.name}"
            print(f"| {name} | {recall(photos, own)} | {recall(photos, weights)} |")
    weights = fit(roots)
    print("\nfitted to all:", ", ".join(f"{name} {value:.2f}" for name, value in zip(WEIGHTS, weights, strict=True)))


if __name__ == "__main__":
    main()
