"""The unit of work: the proposals of a few images, computed in a worker process and saved in one atomic file.

Kept apart from the stage so that a worker does not import matplotlib.
"""

import functools
import io
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.images import read_image
from aligndet_cli.errors import DataError
from aligndet_cli.proposals.filters import FilterRules, filter_proposals, is_valid
from aligndet_cli.proposals.selective_search import SearchMode, search
from aligndet_cli.proposals.store import ImageProposals
from aligndet_cli.workspace import write_bytes


@dataclass(frozen=True)
class Job:
    """One image to do.

    Attributes:
        size_hw: what the labels say, to be checked against the file; None where they say nothing.
        boxes: (N, 4) float32 xyxy boxes to take over; None to search for them.
    """

    image_id: int
    path: Path
    file_name: str
    size_hw: tuple[int, int] | None
    boxes: NDArray[np.float32] | None


@dataclass(frozen=True)
class Recipe:
    """How boxes are made, equal for all images: `search` arguments and filter rules."""

    mode: SearchMode
    working_size: int
    rules: FilterRules


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    image_id: int
    file: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """What came of a few consecutive images."""

    images: list[ImageProposals]
    skipped: list[Skipped]


def process_chunk(jobs: Sequence[Job], recipe: Recipe) -> Chunk:
    """Proposals of some images; unreadable images are reported, not raised. Runs in a worker process."""
    cv2.setNumThreads(1)  # one worker per core already
    images: list[ImageProposals] = []
    skipped: list[Skipped] = []
    for job in jobs:
        try:
            images.append(_process_image(job, recipe))
        except DataError as error:
            # Without the absolute path, so that the artifact does not depend on where the data lies.
            reason = str(error).removeprefix(f"{job.path}: ").replace(str(job.path), job.file_name)
            skipped.append(Skipped(job.image_id, job.file_name, reason))
    return Chunk(images, skipped)


@functools.cache
def end_with_parent(parent_pid: int) -> None:
    """Make a worker process end within a second of its parent; nothing happens in the parent itself.

    joblib's workers outlive a parent that was ended by `kill -9`, waiting for work that cannot come any more.
    """
    if os.getppid() == parent_pid:
        threading.Thread(target=_exit_once_orphaned, args=(parent_pid,), daemon=True).start()


def save_chunk(file: Path, chunk: Chunk) -> None:
    """Write a chunk so that a crash leaves all of it or nothing."""
    images = [(image.image_id, image.file_name, image.size_hw, len(image.boxes)) for image in chunk.images]
    text = json.dumps({"images": images, "skipped": [asdict(entry) for entry in chunk.skipped]})
    boxes = [image.boxes for image in chunk.images] or [np.zeros((0, 4), np.float32)]
    buffer = io.BytesIO()
    np.savez(buffer, boxes=np.concatenate(boxes), text=np.frombuffer(text.encode(), dtype=np.uint8))
    write_bytes(file, buffer.getvalue())


def load_chunk(file: Path) -> Chunk:
    """The chunk that `save_chunk` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        boxes, content = arrays["boxes"], json.loads(arrays["text"].tobytes().decode())
    images, start = [], 0
    for image_id, file_name, (height, width), count in content["images"]:
        images.append(ImageProposals(image_id, file_name, (height, width), boxes[start : start + count]))
        start += count
    return Chunk(images, [Skipped(**entry) for entry in content["skipped"]])


def _exit_once_orphaned(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def _process_image(job: Job, recipe: Recipe) -> ImageProposals:
    image = read_image(job.path)
    height, width = image.shape[:2]
    if job.size_hw is not None and job.size_hw != (height, width):
        said = f"{job.size_hw[1]}x{job.size_hw[0]}"
        raise DataError(f"{job.path}: is {width}x{height} px but the labels say {said}; correct the labels")
    if job.boxes is None:
        found = search(image, recipe.mode, recipe.working_size)
        boxes = filter_proposals(found, (height, width), recipe.rules)
    else:
        boxes = clip_to_image(job.boxes, (height, width))[: recipe.rules.max_per_image]
    return ImageProposals(job.image_id, job.file_name, (height, width), boxes)


def clip_to_image(boxes: NDArray[np.float32], size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """The parts of the boxes inside the image; boxes without any, or not finite, are left out.

    Args:
        boxes: (N, 4) float32, xyxy, absolute pixels.
    """
    finite = boxes[np.isfinite(boxes).all(axis=1)]
    limits = np.array([size_hw[1], size_hw[0]] * 2, dtype=np.float32)
    clipped = np.clip(finite, 0, limits).astype(np.float32)
    return clipped[is_valid(clipped)]
