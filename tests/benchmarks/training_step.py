"""One training step of every detector: pre-training, fine-tuning, and fine-tuning by plain torchvision.

    python tests/benchmarks/training_step.py [--detectors retinanet faster-rcnn:cb-resnet50 ...] [--rounds 5]
        [--backbone resnet50] [--size 512x640] [--apart]

Two 512x640 images with 30 boxes each, float32, one thread. Times are CPU seconds of whole steps (views, forward,
losses, backward, optimizer, momentum update), taken in turns in one process; the ratio is the median of those of the
turns. Memory is the peak of a process of its own for each side. A detector may name a backbone of its own. With
`--apart` that process takes the times as well, for less work: the sides take no turns.

The sides: `pretrain` and `finetune` as the stages do them by default; `equal` is `finetune` with the layers of `plain`,
a torchvision detector with a minimal loop (no norm in the neck, no weight decay groups). torchvision has no DETR,
cascade or HTC; the two last sides are for ResNet-18 and 50.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.resnet import resnet18, resnet50
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.views import Resolution, build_views
from aligndet_cli.pretrain_box import stage as pretrain_box
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.views import ViewsConfig
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.memory import keep_freed_memory
from aligndet_cli.training.learner import build_learner
from aligndet_cli.training.loop import Learner, train_step, watch_divergence
from aligndet_cli.training.settings import TrainingConfig, resolve_settings
from aligndet_cli.training.trial import draw_samples

HEIGHT, WIDTH, NUM_IMAGES, NUM_BOXES, NUM_CLASSES = 512, 640, 2, 30, 80
SIDES = ("pretrain", "finetune", "equal", "plain")
WARM_UP = 1
Step = Callable[[int], None]


def step_of_learner(learner: Learner, config: object, rates: object, samples: list[Sample]) -> Step:
    """A step of the real loop."""
    settings = resolve_settings(config.training, rates, num_images=1000, seed=0, runtime=RuntimeConfig())
    divergence = watch_divergence(learner, Process())

    def step(number: int) -> None:
        train_step(learner, samples, number, settings, divergence)
        learner.after_step(number)

    return step


def build_step(side: str, family: str, backbone: str) -> Step:
    """The step of one side."""
    samples = draw_samples(
        NUM_IMAGES,
        [(HEIGHT, WIDTH)],
        num_boxes=NUM_BOXES,
        num_classes=NUM_CLASSES,
        with_masks=family in ("mask-rcnn", "cascade-mask-rcnn", "htc"),
    )
    training, process = TrainingConfig(batch_size=NUM_IMAGES), Process()
    settings = {"detector": {"family": family}, "training": training}
    settings["backbone"] = BackboneConfig.model_validate({"name": backbone})
    if side == "plain":
        return step_of_torchvision(family, backbone, samples)
    if side == "pretrain":
        sides = ViewsConfig(short_side=(HEIGHT,), long_side=WIDTH)
        config = PretrainBoxConfig(**settings, views=sides)
        rates = config.detector.RECIPE.pretrain
        loop = resolve_settings(training, rates, num_images=1000, seed=0, runtime=RuntimeConfig())
        num_classes = NUM_CLASSES if config.detector.RECIPE.needs_clusters else 1
        if num_classes == 1:
            samples = [Sample(s.position, s.index, s.image, s.boxes, torch.zeros_like(s.class_ids)) for s in samples]
        views = pretrain_box.build_views(config, loop, num_classes)
        learner = build_learner(views, rates, loop, RuntimeConfig(), process)
        return step_of_learner(learner, config, rates, samples)
    neck_norm = {} if family == "detr" else {"neck_norm": "batch" if side == "finetune" else "none"}
    config = FinetuneConfig(
        **{**settings, "detector": {"family": family, **neck_norm}}, resolution={"long_side": WIDTH}
    )
    rates = config.detector.RECIPE.finetune
    loop = resolve_settings(training, rates, num_images=1000, seed=0, runtime=RuntimeConfig())
    resolution = Resolution("resize", (HEIGHT,), WIDTH, WIDTH)
    views = build_views(config.detector, config.backbone, NUM_CLASSES, resolution, config.seed)
    learner = build_learner(views, rates, loop, RuntimeConfig(), process)
    return step_of_learner(learner, config, rates, samples)


def step_of_torchvision(family: str, backbone: str, samples: list[Sample]) -> Step:
    """A step as its reference scripts do it."""
    model = build_torchvision(family, {"resnet18": resnet18, "resnet50": resnet50}[backbone]())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images = [sample.image for sample in samples]
    targets = [{"boxes": s.boxes, "labels": s.class_ids + 1} for s in samples]
    if family in ("retinanet", "fcos"):
        targets = [{"boxes": s.boxes, "labels": s.class_ids} for s in samples]
    if family == "mask-rcnn":
        targets = [{**t, "masks": s.masks.byte()} for t, s in zip(targets, samples, strict=True)]

    def step(_number: int) -> None:
        losses: dict[str, Tensor] = model([image / 255 for image in images], targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def build_torchvision(family: str, body: nn.Module) -> nn.Module:
    """torchvision's detector with the layers of ours, as far as its classes go."""
    size = {"min_size": HEIGHT, "max_size": WIDTH}
    if family in ("retinanet", "fcos"):
        extra = LastLevelP6P7(body.fc.in_features if family == "retinanet" else 256, 256)
        with_fpn = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=extra)
        return {"retinanet": RetinaNet, "fcos": FCOS}[family](with_fpn, NUM_CLASSES, **size)
    with_fpn = _resnet_fpn_extractor(body, 5)
    heads = {
        "rpn_anchor_generator": AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024]),
        "box_predictor": FastRCNNPredictor(1024, NUM_CLASSES + 1),
        "rpn_pre_nms_top_n_train": 2000,
        "rpn_post_nms_top_n_train": 1000,
    }
    if family == "faster-rcnn":
        return FasterRCNN(with_fpn, None, **size, **heads)
    from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

    return MaskRCNN(with_fpn, None, **size, **heads, mask_predictor=MaskRCNNPredictor(256, 256, NUM_CLASSES + 1))


def split_name(name: str, backbone: str) -> tuple[str, str]:
    """Detector and backbone of a name like faster-rcnn:cb-resnet50; without a backbone the given one."""
    family, _, own = name.partition(":")
    return family, own or backbone


def sides_of(family: str, backbone: str, wanted: list[str]) -> list[str]:
    """Those there are."""
    has_plain = family in ("retinanet", "fcos", "faster-rcnn", "mask-rcnn") and backbone in ("resnet18", "resnet50")
    return [side for side in SIDES if side in wanted and (has_plain or side in SIDES[:2])]


def take_times(family: str, backbone: str, sides: list[str], rounds: int) -> dict[str, list[float]]:
    """CPU seconds per round of every side, the sides taking turns."""
    steps = {side: build_step(side, family, backbone) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + WARM_UP):
        for side, step in steps.items():
            began = time.process_time()
            step(number)
            if number >= WARM_UP:
                seconds[side].append(time.process_time() - began)
    return seconds


def take_memory(family: str, backbone: str, side: str) -> float:
    """Peak GB of this process after two steps."""
    take_times(family, backbone, [side], 2 - WARM_UP)
    return peak_gb()


def peak_gb() -> float:
    """Peak of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_own_process(*words: str) -> Any:
    """What this file prints when called with these words."""
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compare(name: str, args: argparse.Namespace) -> None:
    """Print the lines of one detector."""
    family, backbone = split_name(name, args.backbone)
    sides = sides_of(family, backbone, args.sides)
    common = ("--backbone", backbone, "--size", args.size, "--rounds", str(args.rounds), "--detectors", family)
    if args.apart:
        both = {side: in_own_process(*common, "--sides", side, "--only", "both") for side in sides}
        seconds, memory = ({side: both[side][place] for side in sides} for place in (0, 1))
    else:
        seconds = in_own_process(*common, "--sides", *sides, "--only", "times")
        memory = {side: in_own_process(*common, "--sides", side, "--only", "memory") for side in sides}
    for side in sides:
        others = {"pretrain": "finetune", "equal": "plain"}
        ratio = ""
        if others.get(side) in sides:
            other = others[side]
            turns = [a / b for a, b in zip(seconds[side], seconds[other], strict=True)]
            ratio = f"{statistics.median(turns):.2f} x {other} in time ({min(turns):.2f}..{max(turns):.2f})"
            ratio += f", {memory[side] / memory[other]:.2f} x in memory"
        median = statistics.median(seconds[side])
        sys.stdout.write(f"{name:<25} {side:<9} {median:6.2f} CPU-s {memory[side]:6.2f} GB  {ratio}\n")
        sys.stdout.flush()


def main() -> None:
    """Print one line per detector and side."""
    global HEIGHT, WIDTH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", metavar="NAME[:BACKBONE]", default=sorted(DETECTORS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--backbone", default="resnet50", metavar="NAME")
    parser.add_argument("--size", default=f"{HEIGHT}x{WIDTH}", metavar="HEIGHTxWIDTH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--only", choices=("times", "memory", "both"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    HEIGHT, WIDTH = map(int, args.size.split("x"))
    unknown = {split_name(name, "")[0] for name in args.detectors} - set(DETECTORS)
    if unknown:
        parser.error(f"--detectors: {', '.join(sorted(unknown))}: not one of {', '.join(sorted(DETECTORS))}")
    if args.only is None:
        for name in args.detectors:
            compare(name, args)
        return
    torch.set_num_threads(1)
    keep_freed_memory()  # as every training process on a CPU does
    family = args.detectors[0]
    if args.only == "times":
        sys.stdout.write(json.dumps(take_times(family, args.backbone, args.sides, args.rounds)))
    elif args.only == "memory":
        sys.stdout.write(json.dumps(take_memory(family, args.backbone, args.sides[0])))
    else:
        seconds = take_times(family, args.backbone, args.sides, args.rounds)
        sys.stdout.write(json.dumps([seconds[args.sides[0]], peak_gb()]))


if __name__ == "__main__":
    main()
