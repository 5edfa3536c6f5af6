"""Load samples from images and boxes on disk, in an order that depends on the seed alone."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import other_size, read_image
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.order import epoch_order
from aligndet_cli.data.packing import pin
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import normalise, pad_to_batch, resize, resized_hw
from aligndet_cli.data.workers import results_in_order
from aligndet_cli.errors import DataError
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.signals import interruptible

OnError = Literal["skip", "fail"]
Task = TypeVar("Task")
Result = TypeVar("Result")
_PATIENCE_S = 5.0  # for a batch, once a signal asks to stop, where it is better to stop after it


class BoxSource(Protocol):
    """Source of the boxes of images. Picklable."""

    def boxes_and_classes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return boxes (N, 4) xyxy, in pixels, and class ids (N,) of an image."""


class PixelClassSource(Protocol):
    """Source of the classes of pixels. Picklable."""

    def classes_of(self, index: int, size_hw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Return the class of every pixel of an image, (H, W)."""


@dataclass(frozen=True)
class LabelBoxes:
    """The labelled boxes without crowds, which are not trained on."""

    image_set: ImageSet

    def boxes_and_classes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return boxes (N, 4) xyxy and class ids (N,) of an image, without crowds."""
        record = self.image_set.record(index)
        kept = ~record.is_crowd
        return record.boxes[kept], record.class_ids[kept]


class SampleStream:
    """Decoded images by `(position, row)`; the next image replaces one that cannot be read, and names it.

    Args:
        indices: (N,) positions in the set of the images that take part.
        on_error: `fail` ends the run at the first unreadable image instead.
        masks: masks of the same boxes, for detectors that train on them.
        pixel_maps: classes of all pixels, likewise.
    """

    def __init__(
        self,
        image_set: ImageSet,
        indices: Sequence[int],
        boxes: BoxSource,
        on_error: OnError,
        masks: LabelMasks | None = None,
        pixel_maps: PixelClassSource | None = None,
    ) -> None:
        self.image_set, self.boxes, self.on_error = image_set, boxes, on_error
        self.indices = np.asarray(indices, dtype=np.int64)
        self.masks, self.pixel_maps = masks, pixel_maps

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Return the sample at a place `(position in the run, row of indices)`.

        Raises:
            DataError: it cannot be read and nothing may replace it (see `on_error`), or no image can be read.
        """
        position, row = place
        skipped: list[tuple[str, str]] = []
        for attempt in range(len(self.indices)):
            index = int(self.indices[(row + attempt) % len(self.indices)])
            try:
                sample = self._load(position, index)
            except DataError as error:
                if self.on_error == "fail":
                    raise
                # Without the absolute path, so that the artifact does not depend on where the data lies.
                name = self.image_set.file_names[index]
                skipped.append((name, str(error).removeprefix(f"{self.image_set.images_dir / name}: ")))
                continue
            return replace(sample, skipped=tuple(skipped))
        name, reason = skipped[-row % len(skipped)]  # of row 0, whichever was tried first
        raise DataError(
            f"{self.image_set.images_dir}: none of the {len(skipped)} images can be read; the first: {name}: {reason}"
        )

    def _load(self, position: int, index: int) -> Sample:
        image = load_image(self.image_set, index)
        boxes, class_ids = self.boxes.boxes_and_classes(index)
        height, width = image.shape[1:]
        masks = pixel_classes = None
        if self.masks is not None:
            masks = torch.from_numpy(self._draw_masks(index, (height, width)))
        if self.pixel_maps is not None:
            pixel_classes = torch.from_numpy(self.pixel_maps.classes_of(index, (height, width)))
        # The arrays may be read-only views of a memory map, and a sample must own its few boxes.
        owned = torch.from_numpy(boxes.copy()), torch.from_numpy(class_ids.copy())
        return Sample(position, index, image, *owned, masks, pixel_classes)

    def _draw_masks(self, index: int, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
        assert self.masks is not None
        try:
            return self.masks.masks_of(index, size_hw)
        except DataError as error:
            raise DataError(f"{self.image_set.record(index).path}: {error}; repair it in the labels") from None


def load_image(image_set: ImageSet, index: int) -> Tensor:
    """Read an image, (3, H, W) uint8 RGB.

    Raises:
        DataError: it cannot be read, or has another size than its labels say.
    """
    record = image_set.record(index)
    pixels = read_image(record.path)
    if record.size_hw is not None and pixels.shape[:2] != record.size_hw:
        raise DataError(f"{record.path}: {other_size((pixels.shape[0], pixels.shape[1]), record.size_hw)}")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class StreamSampler:
    """Places of the samples of every step of one rank, from `start_step` to `num_steps`.

    The stream is endless: one permutation of the images after the other, see `epoch_order`. Step s takes positions
    [s * batch_size, (s + 1) * batch_size), and rank r a contiguous part of them, so the images of a step do not
    depend on the number of processes. Equal `aspects` (N,), see `ImageSet.aspects`, disable the grouping.
    """

    def __init__(
        self,
        aspects: NDArray[np.float64],
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        num_steps: int,
        process: Process,
    ) -> None:
        self.aspects, self.batch_size, self.seed = aspects, batch_size, seed
        self.start_step, self.num_steps, self.process = start_step, num_steps, process

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        num_images, part = len(self.aspects), self.batch_size // self.process.world_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.num_steps):
            first = step * self.batch_size + self.process.rank * part
            places = []
            for position in range(first, first + part):
                if position // num_images != epoch:
                    epoch = position // num_images
                    order = epoch_order(self.aspects, self.batch_size, seed=self.seed, epoch=epoch)
                places.append((position, int(order[position % num_images])))
            yield places


def batches_of_run(
    stream: SampleStream,
    batch_size: int,
    *,
    steps: range,
    seed: int,
    num_workers: int | Literal["auto"],
    process: Process,
    aspects: NDArray[np.float64] | None = None,
) -> Generator[list[Sample], None, None]:
    """Yield the batches of one rank for some steps of a run, in the order of `StreamSampler`, until it is closed.

    For a GPU, the batches lie in pinned memory, from which copies to the device do not wait.

    Args:
        batch_size: images per step, over all ranks.
        num_workers: number of processes that decode images (0: this process), see `resolve_workers`.
        aspects: (N,) width / height to group the images by; None takes the real ones.

    Raises:
        DataError: see `SampleStream`.
    """
    if aspects is None:
        aspects = stream.image_set.aspects(stream.indices)
    places = StreamSampler(
        aspects, batch_size, seed=seed, start_step=steps.start, num_steps=steps.stop, process=process
    )
    yield from _loaded(
        partial(_samples_at, stream),
        places,
        resolve_workers(num_workers, process),
        is_pinned=process.device != "cpu",
        # Others wait for the batch, too: if it comes, all of them can stop after the same step.
        patience_s=0.0 if process.world_size == 1 else _PATIENCE_S,
    )


def _samples_at(stream: SampleStream, places: list[tuple[int, int]]) -> list[Sample]:
    return [stream[place] for place in places]


def _loaded(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    *,
    is_pinned: bool = False,
    patience_s: float = 0.0,
) -> Generator[Result, None, None]:
    """Yield `function(task)` of all tasks, see `results_in_order`; without workers, done by this process.

    With patience, this process cannot be interrupted while it does a task.
    """
    if num_workers:
        results = results_in_order(function, tasks, num_workers, is_pinned=is_pinned, patience_s=patience_s)
        with contextlib.closing(results):
            yield from results
        return
    made: Iterable[Result] = map(function, tasks)
    for result in made if patience_s else interruptible(made):
        yield pin(result) if is_pinned else result


def resolve_workers(num_workers: int | Literal["auto"], process: Process) -> int:
    """Return the number of decoding processes per rank; "auto" means a few for a GPU and none for the CPU."""
    if num_workers != "auto":
        return num_workers
    if process.device == "cpu":
        return 0
    return max(min((os.cpu_count() or 1) // process.world_size - 1, 8), 1)


def evaluation_batches(
    image_set: ImageSet,
    *,
    indices: Sequence[int],
    batch_size: int,
    resolution: tuple[int, int],
    num_workers: int,
    device: torch.device,
    skipped: dict[int, DataError] | None = None,
) -> Iterator[tuple[list[int], ImageBatch, list[tuple[int, int]]]]:
    """Yield batches in the given order as `(indices, images, original (height, width) of each)`.

    Args:
        resolution: short and long side that images are resized to.
        skipped: takes the errors of unreadable images by index, and these images are left out. With None they are
            errors, since evaluating without them would change the metric.

    Raises:
        DataError: an image cannot be read.
    """
    chunks = [list(indices[first : first + batch_size]) for first in range(0, len(indices), batch_size)]
    for chunk, loaded in zip(
        chunks, _loaded(partial(_images_at, image_set), chunks, num_workers, patience_s=_PATIENCE_S), strict=True
    ):
        errors = {index: item for index, item in zip(chunk, loaded, strict=True) if isinstance(item, DataError)}
        if errors and skipped is None:
            raise errors[min(errors, key=chunk.index)]
        if skipped is not None:
            skipped.update(errors)
        chunk = [index for index in chunk if index not in errors]
        if not chunk:
            continue
        yield (chunk, *batch_of([item for item in loaded if isinstance(item, Tensor)], resolution, device))


def batch_of(
    images: Sequence[Tensor], resolution: tuple[int, int], device: torch.device
) -> tuple[ImageBatch, list[tuple[int, int]]]:
    """Return images (3, H, W) uint8 as a batch to detect in, and the original (height, width) of each.

    Args:
        images: of any sizes, on any device.
        resolution: short and long side that they are resized to.
        device: device of the batch.
    """
    sizes_hw = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    resized = [
        normalise(resize(image.to(device), resized_hw(size_hw, *resolution)))
        for image, size_hw in zip(images, sizes_hw, strict=True)
    ]
    return pad_to_batch(resized), sizes_hw


def _images_at(image_set: ImageSet, indices: list[int]) -> list[Tensor | DataError]:
    """Return the images, or the errors of those that cannot be read."""
    loaded: list[Tensor | DataError] = []
    for index in indices:
        try:
            loaded.append(load_image(image_set, index))
        except DataError as error:
            loaded.append(error)
    return loaded
