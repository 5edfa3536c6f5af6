"""How many boxes of the contrast meet their instance in the other view, and what the contrast takes in memory.

    python tests/benchmarks/counterparts.py DATA [--workspace W] [--images-per-step 2 16]

Of the photographs of DATA (COCO, VOC, YOLO or a folder) with `fast` proposals, made here unless the workspace has them,
in the default views and with the default settings of each detector, on one process, one epoch. `before` is how it was:
all proposals, and for FCOS 2,048 points whatever the batch; of the first 16 photos, since it takes so long.

Photos are decoded, views drawn, boxes assigned and sampled by the code of the stage. Feature maps are noise, for
nothing here is trained: RetinaNet and FCOS assign by place and size alone. An R-CNN's RoIs are its proposals and what
its RPN finds near them; a fresh RPN finds less than a trained one, so there is also a line for the most RoIs there can
be, 1,000 an image besides the proposals. Mask R-CNN pre-trains as Faster R-CNN does: one function serves both.

The memory is that of the largest step: how much the peak of a process of its own (VmHWM of Linux) grows in value and
gradient of the contrast between random embeddings with the instances of that step. `one matrix` is what the
similarities of all queries and keys take, of which the loss once kept five.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.config import DataConfig
from aligndet_cli.data.batch import PAD_DIVISOR, BoxTargets
from aligndet_cli.data.loaders import SampleStream, StreamSampler
from aligndet_cli.data.transforms import make_batch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.interface import Features
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.pretrain_box.boxes import ProposalBoxes, open_proposal_data
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.contrastive import contrastive_loss
from aligndet_cli.pretrain_box.views import VIEWS, draw_views
from aligndet_cli.processes.devices import Process
from aligndet_cli.workspace import Workspace

CPU = torch.device("cpu")
CHANNELS = 8  # of the noise; what the boxes are does not depend on it
CONFIGS = (RetinaNetConfig, FCOSConfig, FasterRCNNConfig)
FIRST_STRIDE = {"retinanet": 8, "fcos": 8, "faster-rcnn": 4}
FCOS_BEFORE = 2048  # points per step
PHOTOS_BEFORE = 16
MOST_ROIS = 1000


class NoisyPyramid(nn.Module):
    """In place of a neck: noise on five levels of the size that the real ones have."""

    def __init__(self, first_stride: int) -> None:
        super().__init__()
        self.first_stride = first_stride

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        num_images, _, height, width = maps["image"].shape
        strides = [self.first_stride << level for level in range(5)]
        return [torch.randn(num_images, CHANNELS, -(-height // stride), -(-width // stride)) for stride in strides]


@dataclass(frozen=True)
class DrawnView:
    """One view of a photograph: its size and all its proposals, best first."""

    size_hw: tuple[int, int]
    boxes: Tensor


@dataclass
class Step:
    """Instances of the sampled boxes of one step."""

    online_ids: Tensor
    momentum_ids: Tensor

    @property
    def num_queries(self) -> int:
        return int((self.online_ids >= 0).sum())

    @property
    def share(self) -> float:
        queries = self.online_ids[self.online_ids >= 0]
        return float(torch.isin(queries, self.momentum_ids).float().mean()) if len(queries) else 1.0

    @property
    def size(self) -> int:
        return self.num_queries * (len(self.online_ids) + len(self.momentum_ids))


def draw_all_views(data: Path, workspace: Path) -> list[list[DrawnView]]:
    """Both views of each photograph that has proposals, in the order of a run's first epoch."""
    if not (workspace / "proposals").is_dir():
        command = [
            sys.executable,
            "-c",
            "from aligndet_cli.cli import main; main()",
            "proposals",
            str(data),
            "-w",
            str(workspace),
            "-q",
        ]
        subprocess.run(command, check=True)
    config = PretrainBoxConfig()
    found = open_proposal_data(Workspace(workspace), None, DataConfig(root=data))
    stream = SampleStream(found.image_set, found.indices, ProposalBoxes(found.store, found.rows, None), "fail")
    sampler = StreamSampler(
        len(stream.indices), len(stream.indices), seed=0, start_step=0, num_steps=1, process=Process()
    )
    drawn = []
    for place in next(iter(sampler)):
        sample = stream[place]
        views = []
        for number in VIEWS:
            params = draw_views([sample], number, config.views, config.seed)
            images, [targets] = make_batch([sample], params, CPU)
            views.append(DrawnView(images.sizes_hw[0], targets.boxes))
        drawn.append(views)
    return drawn


def to_batch(views: Sequence[DrawnView], topk: int | None) -> tuple[Features, list[BoxTargets]]:
    """What the detector gets: the size of the padded batch, and the best proposals with their ids."""
    height, width = (-(-max(view.size_hw[axis] for view in views) // PAD_DIVISOR) * PAD_DIVISOR for axis in (0, 1))
    targets, start = [], 0
    for view in views:
        boxes = view.boxes[:topk]
        ids = torch.arange(start, start + len(boxes))
        targets.append(BoxTargets(boxes, torch.zeros_like(ids), ids))
        start += len(boxes)
    image = torch.zeros(()).expand(len(views), 1, height, width)
    return Features({"image": image}, tuple(view.size_hw for view in views), (height, width)), targets


def build(config: RetinaNetConfig | FCOSConfig | FasterRCNNConfig) -> Detector:
    """The detector with narrow heads and noise for features; all that picks boxes is the default's."""
    narrow = {"neck_channels": CHANNELS, "head_convs": 0, "head_norm": "none"}
    if isinstance(config, FasterRCNNConfig):
        narrow |= {"head_features": CHANNELS, "pool_size": 1}
    torch.manual_seed(0)
    detector = config.model_copy(update=narrow).build(build_backbone(BackboneConfig(name="resnet18")), 1)
    detector.neck = NoisyPyramid(FIRST_STRIDE[config.family])
    return detector


@torch.no_grad()
def steps_of(detector: Detector, drawn: list[list[DrawnView]], images: int, topk: int | None) -> Iterator[Step]:
    """The steps of the epoch; an incomplete last one is left out."""
    for start in range(0, len(drawn) - images + 1, images):
        ids = []
        for number in range(len(VIEWS)):
            batch, targets = to_batch([views[number] for views in drawn[start : start + images]], topk)
            ids.append(detector.box_candidates(batch, targets, with_losses=False).instance_ids)
        yield Step(*ids)


def measure_memory(step: Step) -> float:
    """GB that the contrast of a step takes, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ids.npz"
        np.savez(file, online=step.online_ids.numpy(), momentum=step.momentum_ids.numpy())
        command = [sys.executable, __file__, str(file), "--contrast"]
        done = subprocess.run(
            command, capture_output=True, check=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    return float(json.loads(done.stdout))


def measure_contrast(file: Path) -> float:
    """GB that value and gradient add to the peak of this process."""
    ids = [torch.from_numpy(array) for array in np.load(file).values()]
    small = torch.randn(4, 256, requires_grad=True)
    contrastive_loss(normalize(small, dim=1), torch.arange(4), small, torch.arange(4), temperature=0.5).loss.backward()
    online, momentum = (normalize(torch.randn(len(of_view), 256), dim=1) for of_view in ids)
    online.requires_grad_()
    before = peak()
    contrastive_loss(online, ids[0], momentum, ids[1], temperature=0.5).loss.backward()
    return (peak() - before) / 1e9


def peak() -> int:
    """Most bytes that this process had so far; `getrusage` would count its parent's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def most_rois(topk: int, images: int) -> Step:
    """All the RoIs that an R-CNN can have, as even as can be over its proposals."""
    ids = torch.arange((topk + MOST_ROIS) * images) % (topk * images)
    return Step(ids, ids)


def print_row(name: str, images: int, when: str, steps: Sequence[Step], with_memory: bool) -> None:
    largest = max(steps, key=lambda step: step.size)
    memory = f"{measure_memory(largest):7.2f} GB" if with_memory else f"{'-':>10}"
    shares = [step.share for step in steps]
    queries = sum(step.num_queries for step in steps) / len(steps)
    keys = sum(len(step.online_ids) + len(step.momentum_ids) for step in steps) / len(steps)
    print(
        f"{name:12} {images:6} {when:7} {sum(shares) / len(shares):8.1%} {min(shares):8.1%} {queries:9.0f} {keys:9.0f} "
        f"{largest.size * 4 / 1e9:8.2f} GB {memory}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--images-per-step", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--contrast", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contrast:
        print(json.dumps(measure_contrast(args.data)))
        return
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_all_views(args.data, args.workspace or Path(folder) / "workspace")
    counts = [len(views[0].boxes) for views in drawn]
    print(f"{len(drawn)} photos, {sum(counts) / len(counts):.0f} proposals each")
    print(
        f"{'detector':12} {'images':>6} {'':7} {'share':>8} {'least':>8} {'queries':>9} {'keys':>9} {'one matrix':>11} "
        f"{'contrast':>10}"
    )
    for config_class in CONFIGS:
        config, topk = config_class(), config_class.RECIPE.topk
        for images in args.images_per_step:
            old = config
            if isinstance(config, FCOSConfig):
                old = config.model_copy(update={"pretext_samples": FCOS_BEFORE // images})
            print_row(
                config.family, images, "before", list(steps_of(build(old), drawn[:PHOTOS_BEFORE], images, None)), False
            )
            print_row(config.family, images, "now", list(steps_of(build(config), drawn, images, topk)), True)
            if isinstance(config, FasterRCNNConfig):
                print_row(config.family, images, "at most", [most_rois(topk, images)], True)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
