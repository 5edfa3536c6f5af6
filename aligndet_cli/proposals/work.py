"""Proposals of one image, as a worker computes them. Apart from the stage, so that workers do not import matplotlib."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.images import decode_image, decode_reduced, other_size, read_bytes
from aligndet_cli.errors import DataError
from aligndet_cli.proposals.filters import FilterRules, clip_to_image, filter_proposals
from aligndet_cli.proposals.journal import ImageResult
from aligndet_cli.proposals.selective_search import SearchMode, pixels_needed, search


@dataclass(frozen=True)
class Job:
    """One image to work on.

    Attributes:
        position: in the data set.
        size_hw: size according to the labels, to be checked against the file; None if the labels have none.
        boxes: (N, 4) float32 xyxy boxes to take over, or to merge with those of a run; None to search for them.
    """

    position: int
    path: Path
    file_name: str
    size_hw: tuple[int, int] | None
    boxes: NDArray[np.float32] | None


def find_boxes(mode: SearchMode, working_size: int | None, rules: FilterRules, job: Job) -> ImageResult:
    """Return the proposals of an image, or the reason why it cannot be used; never raises a DataError."""
    return result_of(job, functools.partial(_find_boxes, mode, working_size, rules))


def result_of(job: Job, find: Callable[[Job], ImageResult]) -> ImageResult:
    """Return what `find` returns, or a result with the reason why the image cannot be used."""
    cv2.setNumThreads(1)  # one worker per core already
    try:
        return find(job)
    except DataError as error:
        # Without the absolute path, so that the artifact does not depend on where the data lies.
        reason = str(error).removeprefix(f"{job.path}: ").replace(str(job.path), job.file_name)
        return ImageResult(job.position, (0, 0), np.zeros((0, 4), np.float32), 0, reason)


def _find_boxes(mode: SearchMode, working_size: int | None, rules: FilterRules, job: Job) -> ImageResult:
    content = read_bytes(job.path)
    # Boxes that are taken over need the size and an intact file, but no pixels.
    needed = pixels_needed(mode, working_size) if job.boxes is None else 1
    if needed is None:
        image = decode_image(content, job.path)
        size_hw = image.shape[0], image.shape[1]
    else:
        image, size_hw = decode_reduced(content, job.path, needed)
    require_size(job, size_hw)
    if job.boxes is None:
        boxes = filter_proposals(search(image, mode, working_size, size_hw), size_hw, rules)
    else:
        boxes = clip_to_image(job.boxes, size_hw)[: rules.max_per_image]
    return ImageResult(job.position, size_hw, boxes, digest_of(content))


def require_size(job: Job, size_hw: tuple[int, int]) -> None:
    """Make sure that an image has the size that its labels say.

    Raises:
        DataError: it has another one.
    """
    if job.size_hw is not None and job.size_hw != size_hw:
        raise DataError(f"{job.path}: {other_size(size_hw, job.size_hw)}")


def digest_of(content: bytes) -> int:
    """Return a 64-bit hash of the bytes of an image file."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
