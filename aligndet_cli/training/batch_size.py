"""`--batch-size auto`: the largest batch that fits on the GPU, found by taking steps before the run."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from aligndet_cli.data.transforms import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.training.launch import Devices, Process
from aligndet_cli.training.logs import logger
from aligndet_cli.training.loop import Learner, LoopSettings, build_scaler, train_step, watch_divergence
from aligndet_cli.training.optimizer import TrainingConfig
from aligndet_cli.training.schedules import Rates
from aligndet_cli.workspace import Workspace, read_json

MAX_IMAGES = 512  # per GPU; no recipe goes beyond
# Of the GPU's memory: the rest is for its other users, fragments, and proposals that come out more numerous.
USED_SHARE = 0.9
_STEPS = 2  # the optimizer's state is there from the second on


def settle_batch_size(
    training: TrainingConfig, rates: Rates, devices: Devices, *, recorded: int | None, largest: Callable[[Process], int]
) -> TrainingConfig:
    """The settings with a number in the place of "auto".

    Args:
        rates: the recipe, whose batch size is used where there is no GPU.
        recorded: what was found when the interrupted or finished run of this name began, if there is one.
        largest: images that fit on the GPU of a process; called only where it matters.
    """
    if training.batch_size != "auto":
        return training
    parts = devices.world_size * training.accumulate
    if recorded is not None:
        number, origin = recorded, "as when the run began"
    elif devices.kind == "cuda":
        number, origin = largest(Process(device=devices.first)) * parts, f"what fits on {devices.world_size} GPU(s)"
    else:
        number, origin = -(-rates.batch_size // parts) * parts, f"{rates.origin}; only GPUs are searched for more"
    logger.info(f"--batch-size auto: {number} ({origin})")
    return training.model_copy(update={"batch_size": number})


def recorded_batch_size(
    workspace: Workspace, stage: str, name: str, *, resume: bool = True, force: bool = False
) -> int | None:
    """The batch size of the run of this name that would be continued, or is complete; None where a new one begins."""
    folder = workspace.root / stage / name
    partial = folder.with_name(f".{name}.partial")
    candidates: list[Path] = [] if force else [folder, *([partial] if resume else [])]
    for candidate in candidates:
        if (candidate / "manifest.json").exists():
            return int(read_json(candidate / "config.json")["training"]["batch_size"])
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


def largest_on_gpu(
    learner: Learner, settings: LoopSettings, draw: Callable[[int], list[Sample]], *, process: Process, limit: int
) -> int:
    """Images of the largest micro-batch that the learner can take steps on.

    Args:
        learner: thrown away afterwards; its weights change.
        draw: samples of the worst kind, that many.

    Raises:
        RunError: not even one image fits.
    """
    device = torch.device(process.device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(USED_SHARE, device)
    try:
        found = find_largest(lambda count: _fits(learner, settings, draw(count), process), min(limit, MAX_IMAGES))
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
