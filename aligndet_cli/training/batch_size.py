"""What steps are tried with before a run, and the largest batch that fits on a GPU, found by taking some."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.files import read_json
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import Learner, LoopSettings, build_scaler, train_step, watch_divergence
from aligndet_cli.workspace import Workspace

# `Trial.gaps`, measured up to 3.1 and 1.55 with RetinaNet, reached within 40 steps (glibc 2.36).
GAPS_IN_PRETRAINING, GAPS_IN_FINETUNING = 3.0, 2.0
MAX_IMAGES = 512  # per GPU; no recipe goes beyond
# Of the GPU's memory: the rest is for its other users, fragments, and proposals that come out more numerous.
USED_SHARE = 0.9
_STEPS = 2  # the optimizer's state is there from the second on


@dataclass(frozen=True)
class Trial:
    """What steps are tried with before the run. Picklable.

    Attributes:
        build: makes what the stage would train, on the device of a process; thrown away afterwards.
        sizes_hw: of a lying and a standing image of the largest resolution, see `worst_sizes`.
        num_boxes: of each image, as many as any has.
        num_images: there are.
        gaps: memory that steps on a CPU take by what images need, where freed memory is kept (see
            `keep_freed_memory`): blocks of changing sizes leave gaps that the next do not fit into.
        pools_regions: the detector has a second stage, whose memory does not depend on the size of images.
    """

    build: Callable[[Process], Learner]
    settings: LoopSettings
    sizes_hw: Sequence[tuple[int, int]]
    num_boxes: int
    num_classes: int
    num_images: int
    gaps: float
    pools_regions: bool
    with_masks: bool = False

    @property
    def largest(self) -> str:
        """Height and width of the largest images, for people."""
        return "x".join(map(str, self.sizes_hw[0]))

    def draw(self, count: int) -> list[Sample]:
        """Samples of the worst kind, that many."""
        return self._draw(count, self.sizes_hw)

    def draw_small(self) -> list[Sample]:
        """A strip as long as the largest image, which therefore is not enlarged, and a twentieth as high."""
        height, width = self.sizes_hw[0]
        return self._draw(1, [(max(height // 20, 1), width)])

    def _draw(self, count: int, sizes_hw: Sequence[tuple[int, int]]) -> list[Sample]:
        return draw_samples(
            count,
            sizes_hw,
            num_boxes=self.num_boxes,
            num_classes=self.num_classes,
            with_masks=self.with_masks,
        )


class Split(NamedTuple):
    """Images of a step over all processes, and its micro-batches; whether the run that has them is complete."""

    batch_size: int
    accumulate: int
    is_complete: bool


def recorded_split(
    workspace: Workspace, stage: str, name: str, *, resume: bool = True, force: bool = False
) -> Split | None:
    """The split of the run of this name that would be continued, or is complete; None where a new one begins."""
    folder = workspace.root / stage / name
    partial = workspace.partial(stage, name)
    candidates: list[Path] = [] if force else [folder, *([partial] if resume else [])]
    for candidate in candidates:
        if (candidate / "manifest.json").exists():
            training = read_json(candidate / "config.json")["training"]
            return Split(int(training["batch_size"]), int(training["accumulate"]), candidate == folder)
    return None


def find_largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, by doubling and then halving the gap; 0 if not even 1 does."""
    best, tried = 0, 1
    while tried <= limit and fits(tried):
        best, tried = tried, tried * 2
    low, high = best, min(tried, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_on_gpu(trial: Trial, process: Process) -> int:
    """Images of the largest micro-batch that steps can be taken with on the GPU of a process.

    Raises:
        RunError: not even one image fits.
    """
    device, learner = torch.device(process.device), trial.build(process)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(USED_SHARE, device)
    try:
        limit = min(trial.num_images, MAX_IMAGES)
        found = find_largest(lambda count: _fits(learner, trial.settings, trial.draw(count), process), limit)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    if not found:
        raise RunError("--batch-size auto: out of GPU memory with a single image: lower --short-side and --long-side")
    return found


def _fits(learner: Learner, settings: LoopSettings, samples: list[Sample], process: Process) -> bool:
    scaler, divergence = build_scaler(settings, process), watch_divergence(learner, process)
    try:
        for step in range(_STEPS):
            train_step(learner, scaler, samples, step, settings, divergence)
            learner.after_step(step)
        if process.device != "cpu":
            torch.cuda.synchronize(process.device)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    # Outside of the handler: the exception holds on to the tensors of the step.
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def draw_samples(
    count: int, sizes_hw: Sequence[tuple[int, int]], *, num_boxes: int, num_classes: int, with_masks: bool = False
) -> list[Sample]:
    """Images of noise with boxes of a twentieth to a third of the sides, seeded.

    Args:
        sizes_hw: taken in turns.
        with_masks: that fill the left half of each box.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for position in range(count):
        height, width = sizes_hw[position % len(sizes_hw)]
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        limits = torch.tensor([width, height])
        sides = limits * (0.05 + 0.28 * torch.rand(num_boxes, 2, generator=generator))
        corners = (limits - sides) * torch.rand(num_boxes, 2, generator=generator)
        boxes = torch.cat([corners, corners + sides], dim=1)
        class_ids = torch.randint(num_classes, (num_boxes,), generator=generator)
        masks = _left_halves(boxes, (height, width)) if with_masks else None
        samples.append(Sample(position, position, image, boxes, class_ids, masks))
    return samples


def worst_sizes(short_sides: Sequence[int], long_side: int) -> list[tuple[int, int]]:
    """A lying and a standing image of the largest resolution: together they make the largest batch there is."""
    short = min(max(short_sides), long_side)
    return [(short, long_side), (long_side, short)]


def _left_halves(boxes: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = True
    return masks
