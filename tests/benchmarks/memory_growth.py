"""Memory of a CPU run over its steps, with images of ever other sizes: a small Faster R-CNN at 256 pixels.

    python tests/benchmarks/memory_growth.py [--steps 200] [--capacities 1024 64] [--needed]

Four images a step, one thread, fine-tuning from nothing. Each line is a process of its own, in which oneDNN keeps so
many compiled operations (1024 is its own default): the memory that is its alone after 1, 20, 50, ... steps, and CPU
seconds of a step. With `--needed` a last line gives freed memory back at once, which is slow: what steps need, without
the gaps between blocks. The loss of the last step is the same in all lines.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time

import torch

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.finetune.views import Resolution, build_views
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.launch import run_here
from aligndet_cli.processes.memory import give_back_freed_memory, process_usage
from aligndet_cli.training.learner import build_learner
from aligndet_cli.training.loop import train_step, watch_divergence
from aligndet_cli.training.settings import TrainingConfig, resolve_settings
from aligndet_cli.training.trial import draw_samples

NUM_IMAGES, NUM_CLASSES = 4, 20
SHOWN = (1, 20, 50, 100, 200, 500)


def take_steps(num_steps: int, process: Process) -> None:
    """Print one line of JSON for every step in `SHOWN`."""
    detector = FasterRCNNConfig(neck_channels=64, head_convs=1, head_features=256)
    training = TrainingConfig(batch_size=NUM_IMAGES, lr=1e-4)
    rates = detector.RECIPE.finetune
    settings = resolve_settings(training, rates, num_images=1000, seed=0, runtime=RuntimeConfig())
    torch.manual_seed(0)
    resolution = Resolution("resize", (192, 208, 224, 240, 256), 427, 1024)
    views = build_views(detector, BackboneConfig(name="resnet18"), NUM_CLASSES, resolution, seed=0)
    learner = build_learner(views, rates, settings, RuntimeConfig(), process)
    divergence = watch_divergence(learner, process)
    generator = torch.Generator().manual_seed(1)
    largest, began = 0, time.process_time()
    for step in range(num_steps):
        sizes_hw = [draw_size(generator) for _ in range(NUM_IMAGES)]
        num_boxes = 10 + int(torch.randint(20, (1,), generator=generator))
        samples = draw_samples(NUM_IMAGES, sizes_hw, num_boxes=num_boxes, num_classes=NUM_CLASSES)
        losses, _ = train_step(learner, samples, step, settings, divergence)
        usage = process_usage()
        assert usage is not None
        largest = max(largest, usage.resident)
        if step + 1 in SHOWN:
            seconds = (time.process_time() - began) / (step + 1)
            shown = {"step": step + 1, "mb": largest / 1e6, "s": seconds, "loss": float(losses["loss_cls"])}
            sys.stdout.write(json.dumps(shown) + "\n")
            sys.stdout.flush()


def draw_size(generator: torch.Generator) -> tuple[int, int]:
    """Height and width of a photograph, most of them lying."""
    short, is_lying = torch.rand(2, generator=generator).tolist()
    sides = 480 + int(160 * short), 640
    return sides if is_lying < 0.7 else sides[::-1]


def main() -> None:
    """Print one line per capacity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--capacities", nargs="+", type=int, default=[1024, 64])
    parser.add_argument("--needed", action="store_true")
    parser.add_argument("--only", choices=("kept", "needed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        torch.set_num_threads(1)
        run_here(lambda _, process: work(args, process), None, Process())
        return
    for capacity, only in [*itertools.product(args.capacities, ["kept"]), *[(1024, "needed")] * args.needed]:
        words = [sys.executable, __file__, "--steps", str(args.steps), "--only", only]
        environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(capacity)}
        done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        memory = "  ".join(f"{line['step']}: {line['mb']:.0f} MB" for line in lines)
        last = f"{lines[-1]['s']:.3f} CPU-s  loss {lines[-1]['loss']!r}"
        sys.stdout.write(f"{'needed' if only == 'needed' else capacity:<8} {memory}  {last}\n")
        sys.stdout.flush()


def work(args: argparse.Namespace, process: Process) -> None:
    """Take the steps of one line."""
    if args.only == "needed":
        give_back_freed_memory()
    take_steps(args.steps, process)


if __name__ == "__main__":
    main()
