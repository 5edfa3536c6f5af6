"""Quality and cost of the search modes on labelled photos.

    python tests/benchmarks/proposals.py COCO_OR_VOC_ROOT [--split val2017] [--modes fast quality ...] [--every N]

For objects of at least 32 px a side, after the paper's filters and NMS at IoU 0.5: recall at IoU 0.5 of the first
50 / 100 / 300 / all boxes, mean best overlap (ABO), boxes per image. Modes take turns on each photo, one thread each;
the CPU time includes decoding (at reduced size where the mode allows it), filters and NMS, and stands beside the time
of the search alone.
"""

import argparse
import os
import time
from pathlib import Path
from typing import get_args

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import decode_reduced, read_bytes, read_image
from aligndet_cli.data.open import open_images
from aligndet_cli.proposals.filters import FilterRules, filter_proposals, has_allowed_size, pairwise_iou
from aligndet_cli.proposals.selective_search import SearchMode, pixels_needed, search

RULES = FilterRules(min_size=32, max_ratio=3, max_size=0.8, nms=0.5)
BUDGETS = (50, 100, 300, None)


class Tally:
    """What one mode found and cost."""

    def __init__(self) -> None:
        self.overlaps: list[np.ndarray] = []
        self.whole: list[float] = []
        self.alone: list[float] = []
        self.counts: list[int] = []

    def measure(self, mode: SearchMode, path: Path, objects: np.ndarray) -> None:
        """Search one photo; `objects` are its (G, 4) xyxy boxes."""
        began = time.process_time()
        needed = pixels_needed(mode, None)
        if needed is None:
            image = read_image(path)
            size_hw = image.shape[0], image.shape[1]
        else:
            image, size_hw = decode_reduced(read_bytes(path), path, needed)
        decoded = time.process_time()
        found = search(image, mode, None, size_hw)
        self.alone.append(time.process_time() - decoded)
        boxes = filter_proposals(found, size_hw, RULES)
        self.whole.append(time.process_time() - began)
        self.counts.append(len(boxes))
        if len(objects):
            iou = pairwise_iou(objects, boxes)
            self.overlaps.append(np.stack([iou[:, :budget].max(axis=1, initial=0) for budget in BUDGETS], axis=1))

    def row(self, mode: str) -> str:
        """One line of the table."""
        overlaps = np.concatenate(self.overlaps)
        recall = " / ".join(f"{value:.1f}" for value in (overlaps >= 0.5).mean(axis=0) * 100)
        times = f"{np.mean(self.whole) * 1e3:.1f} | {np.mean(self.alone) * 1e3:.1f}"
        return f"| {mode} | {times} | {recall} | {overlaps[:, -1].mean() * 100:.1f} | {np.mean(self.counts):.0f} |"


def objects_of(image_set: ImageSet, index: int) -> np.ndarray:
    """Labelled boxes that the filters could let through."""
    record = image_set.record(index)
    return record.boxes[~record.is_crowd & has_allowed_size(record.boxes, (1, 1), RULES.min_size, np.inf)]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--modes", nargs="+", choices=get_args(SearchMode), default=list(get_args(SearchMode)))
    parser.add_argument("--every", type=int, default=1, help="use every so many-th photo")
    parser.add_argument("--start", type=int, default=0, help="first photo")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    image_set = open_images(DataConfig(root=arguments.root, split=arguments.split), purpose="val")
    indices = range(arguments.start, len(image_set), arguments.every)
    for mode in arguments.modes:  # compile, and load what is loaded once
        Tally().measure(mode, image_set.record(0).path, np.zeros((0, 4), dtype=np.float32))
    tallies = {mode: Tally() for mode in arguments.modes}
    for index in indices:
        for mode, tally in tallies.items():
            tally.measure(mode, image_set.record(index).path, objects_of(image_set, index))
    print(f"{len(indices)} photos of {image_set.split}\n")
    print("| mode | CPU ms | search alone | recall @50 / 100 / 300 / all | ABO | boxes |\n|---|---|---|---|---|---|")
    for mode, tally in tallies.items():
        print(tally.row(mode))
    if "opencv-fast" in tallies and "fast" in tallies:
        whole, alone = (
            np.mean(getattr(tallies["opencv-fast"], name)) / np.mean(getattr(tallies["fast"], name))
            for name in ("whole", "alone")
        )
        print(f"\nfast: {whole:.0f}x less CPU than opencv-fast, {alone:.0f}x without decoding and filters")


if __name__ == "__main__":
    main()
