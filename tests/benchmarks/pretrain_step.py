"""One pre-training step of RetinaNet R50: two 512x640 images, 30 proposals each, float32, one thread.

    python tests/benchmarks/pretrain_step.py [--steps 3] [--backbone resnet50]

The step is the whole of it: views, frozen backbone, both sides, losses, backward, optimizer, momentum update.
The authors' code takes 72 CPU-seconds and 14.3 GB for the same (measured on a machine of this kind).
"""

import argparse
import resource
import time

import torch

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.data.transforms import Sample
from aligndet_cli.pretrain_box.stage import PretrainBoxConfig, build_pretext
from aligndet_cli.pretrain_box.views import TwoViews
from aligndet_cli.training.launch import Process, keep_freed_memory
from aligndet_cli.training.optimizer import TrainingConfig, build_optimizer, resolve_settings

AUTHORS_SECONDS, AUTHORS_GB = 72.0, 14.3


def draw_samples(num_images: int, num_proposals: int) -> list[Sample]:
    """Noise images of 512x640 with boxes of 32 to 200 pixels."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for position in range(num_images):
        image = torch.randint(0, 256, (3, 512, 640), generator=generator, dtype=torch.uint8)
        sides = 32 + 168 * torch.rand(num_proposals, 2, generator=generator)
        corners = torch.rand(num_proposals, 2, generator=generator) * (torch.tensor([640.0, 512.0]) - sides)
        boxes = torch.cat([corners, corners + sides], dim=1)
        samples.append(Sample(position, position, image, boxes, torch.zeros(num_proposals, dtype=torch.int64)))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--backbone", default="resnet50")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every training process on a CPU does
    config = PretrainBoxConfig(backbone=BackboneConfig(name=args.backbone), training=TrainingConfig(batch_size=2))
    process = Process()
    pretext = build_pretext(config, process)
    task = TwoViews(pretext, short_sides=(512,), long_side=640, seed=0, is_logged=lambda step: True)
    settings = resolve_settings(
        config.training, config.detector.RECIPE.pretrain, num_images=2, seed=0, runtime=RuntimeConfig()
    )
    optimizer = build_optimizer(task, config.detector.RECIPE.pretrain, settings, process)
    samples, seconds = draw_samples(2, 30), []
    for step in range(args.steps):
        began = time.process_time()
        losses, _ = task(samples, step)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        pretext.update_momentum(0.996)
        seconds.append(time.process_time() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"RetinaNet {args.backbone}, 2 x 512x640, 30 proposals each, one thread, float32; best of {args.steps}")
    print(f"step    {min(seconds):6.2f} CPU-s   {AUTHORS_SECONDS / min(seconds):5.1f} x less than the authors' code")
    print(f"memory  {memory:6.2f} GiB     {AUTHORS_GB / memory:5.1f} x less (peak of the whole process)")


if __name__ == "__main__":
    main()
