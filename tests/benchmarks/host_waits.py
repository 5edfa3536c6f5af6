"""How often a step makes the host wait for a GPU, and how many kernels it launches there, counted on a CPU. Not a test.

    python tests/benchmarks/host_waits.py [--images 16] [--boxes 7 ...] [--detectors retinanet ...] [--lines]

Counted are the calls that read a number or a size from a tensor, and the operations that compute something, in the
losses of fine-tuning and in those of pre-training, with their gradients; views and optimizer are left out. Detectors
are narrow and images small: the numbers depend on neither. That of kernels depends on the boxes of an image: what is
matched at once on a GPU is bounded, so many boxes are matched in several turns.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`
from aligndet_cli.backbones import BackboneConfig, build_backbone  # noqa: E402
from aligndet_cli.data.sample import Sample  # noqa: E402
from aligndet_cli.data.transforms import ViewParams, make_batch  # noqa: E402
from aligndet_cli.detectors import DETECTORS  # noqa: E402
from aligndet_cli.training.trial import draw_samples  # noqa: E402
from helpers.host_reads import host_reads, operations, shown  # noqa: E402
from helpers.narrow import narrow_backbones  # noqa: E402
from helpers.small_detectors import SMALL, build_pretext  # noqa: E402

NUM_CLASSES, CPU = 3, torch.device("cpu")
SIZES_HW = ((96, 128), (128, 90))


def main() -> None:
    """Print a line for each detector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--boxes", nargs="+", type=int, default=[7], help="of each image, in turns")
    parser.add_argument("--detectors", nargs="+", choices=sorted(DETECTORS), default=sorted(DETECTORS))
    parser.add_argument("--lines", action="store_true", help="name the lines that make the host wait")
    arguments = parser.parse_args()
    for family in arguments.detectors:
        with narrow_backbones:
            found = count(family, arguments.images, arguments.boxes)
        told = (f"{name} {reads.total():4d} waits {num:6,d} kernels  " for name, (reads, num) in found.items())
        print(f"{family:<18}", *told, flush=True)
        if arguments.lines:
            print(*(f"{name}:{shown(reads)}" for name, (reads, _) in found.items()), sep="\n")


def count(family: str, num_images: int, num_boxes: Sequence[int]) -> dict[str, tuple[Counter[str], int]]:
    """The waits and kernels in the losses of a batch, by the name of the stage."""
    config = SMALL[family]
    samples = draw_samples(
        num_images, SIZES_HW, num_boxes=max(num_boxes), num_classes=NUM_CLASSES, with_masks=config.RECIPE.needs_masks
    )
    samples = [with_first_boxes(sample, num) for sample, num in zip(samples, cycle(num_boxes), strict=False)]
    views = [make_batch(samples, [ViewParams(side, 160)] * num_images, CPU, instance_offset=0) for side in (96, 120)]
    detector = config.build(build_backbone(BackboneConfig(name="resnet18")), NUM_CLASSES)
    pretext = build_pretext(config.build(build_backbone(BackboneConfig(name="resnet18")), NUM_CLASSES), config)
    work = {
        "fine-tuning": lambda: sum(detector(*views[0]).values()).backward(),
        "pre-training": lambda: sum(pretext(*views)[0].values()).backward(),
    }
    return {name: (host_reads(step, CPU), operations(step)) for name, step in work.items()}


def with_first_boxes(sample: Sample, num: int) -> Sample:
    """The sample without its other boxes."""
    masks = None if sample.masks is None else sample.masks[:num]
    return replace(sample, boxes=sample.boxes[:num], class_ids=sample.class_ids[:num], masks=masks)


if __name__ == "__main__":
    main()
