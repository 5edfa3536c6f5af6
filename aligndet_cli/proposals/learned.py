"""Boxes that a pre-trained run finds in one image, as a worker computes them. Apart, since it needs torch."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from aligndet_cli.data.images import decode_image, read_bytes
from aligndet_cli.data.transforms import normalise, pad_to_batch, resize, resized_hw
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import load_finder
from aligndet_cli.detectors.results import rescale_boxes
from aligndet_cli.proposals.filters import FilterRules, clip_to_image
from aligndet_cli.proposals.journal import ImageResult
from aligndet_cli.proposals.rounds import Finder, merge_boxes
from aligndet_cli.proposals.work import Job, digest_of, require_size, result_of


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread until the block ends: workers of this process set that for all of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_objects(finder: Finder, rules: FilterRules, job: Job) -> ImageResult:
    """Return the run's boxes of an image merged with the earlier ones, see `merge_boxes`; never raises a DataError.

    An image is a batch of its own and one thread computes it, so that the bytes do not depend on who else works.
    """
    return result_of(job, functools.partial(_find_objects, finder, rules))


@torch.inference_mode()
def _find_objects(finder: Finder, rules: FilterRules, job: Job) -> ImageResult:
    torch.set_num_threads(1)
    content = read_bytes(job.path)
    pixels = decode_image(content, job.path)
    size_hw = pixels.shape[0], pixels.shape[1]
    require_size(job, size_hw)
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    view_hw = resized_hw(size_hw, *finder.resolution)
    (found,) = _detector(finder.weights, finder.content_hash).find_objects(
        pad_to_batch([normalise(resize(image, view_hw))])
    )
    boxes = rescale_boxes(found.boxes, view_hw, size_hw).numpy().astype(np.float32)
    earlier = clip_to_image(job.boxes, size_hw) if job.boxes is not None else np.zeros((0, 4), dtype=np.float32)
    boxes, origins = merge_boxes(boxes, found.scores.numpy(), earlier, size_hw, rules)
    return ImageResult(job.position, size_hw, boxes, digest_of(content), origins=origins)


@functools.cache
def _detector(weights: Path, _content_hash: str) -> Detector:
    """Load a detector once per process; a worker that lives on must not use one of before."""
    return load_finder(weights)
