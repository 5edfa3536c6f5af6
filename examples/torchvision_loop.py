"""Fine-tune a pre-trained detector in a loop like torchvision's references/detection, then keep it as a weights.pt.

    python examples/torchvision_loop.py workspace/pretrain-box/retinanet-resnet50 coco/ --split train2017

The detector takes the place of `torchvision.models.get_model(...)`: same images, same targets, same losses.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

import aligndet_cli as aligndet


def labelled_images(coco: Path, split: str) -> Dataset[Any]:
    """Return `(image, target)` of the images with a label; labels are COCO's category ids."""
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    labels = coco / "annotations" / f"instances_{split}.json"
    images = CocoDetection(str(coco / split), str(labels), transforms=transforms)
    with_boxes = [place for place, number in enumerate(images.ids) if images.coco.getAnnIds(number, iscrowd=False)]
    wrapped = wrap_dataset_for_transforms_v2(images, target_keys=("boxes", "labels", "masks"))
    return Subset(wrapped, with_boxes)


def train_one_epoch(
    detector: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Any, Any]],
    device: torch.device,
    *,
    warmup_steps: int = 0,
) -> list[dict[str, float]]:
    """Take one step per batch, the first ones at a rising learning rate, and return the losses of each step."""
    warmup = LinearLR(optimizer, start_factor=0.001, total_iters=warmup_steps) if warmup_steps else None
    detector.train()
    told = []
    for images, targets in batches:
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        losses = detector(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if warmup is not None:
            warmup.step()
        told.append({name: loss.item() for name, loss in losses.items()})
    return told


def collate(batch: list[tuple[Any, Any]]) -> tuple[Any, ...]:
    """Return the images of a batch, and its targets."""
    return tuple(zip(*batch, strict=True))


def read_words(description: str) -> argparse.Namespace:
    """Return the words of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", help="weights.pt or folder of a run of pretrain-box")
    parser.add_argument("coco", type=Path, help="COCO root")
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--num-classes", type=int, default=91, help="with background; labels are category ids")
    parser.add_argument("--short-side", type=int, nargs="+", help="by recipe")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("weights.pt"))
    return parser.parse_args()


def load(asked: argparse.Namespace) -> tuple[aligndet.ImageDetector, DataLoader[Any]]:
    """Return the detector and the batches that the words ask for."""
    config = {"resolution.short_side": asked.short_side} if asked.short_side else {}
    detector = aligndet.load(asked.run, num_classes=asked.num_classes, config=config)
    images = labelled_images(asked.coco, asked.split)
    return detector, DataLoader(images, asked.batch_size, shuffle=True, drop_last=True, collate_fn=collate)


def main() -> None:
    """Read the words of the command line, train, and save."""
    asked = read_words(__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector, loader = load(asked)
    detector.to(device)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    rate = 0.015 * asked.batch_size / 16  # RetinaNet's after pre-training
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=5e-5)
    drops = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [round(asked.epochs * 2 / 3), round(asked.epochs * 11 / 12)]
    )
    for epoch in range(asked.epochs):
        warmup_steps = min(500, len(loader) - 1) if epoch == 0 else 0
        told = train_one_epoch(detector, optimizer, loader, device, warmup_steps=warmup_steps)
        drops.step()
        print(f"epoch {epoch + 1}:", ", ".join(f"{name} {value:.3f}" for name, value in told[-1].items()))
    detector.save(asked.output)
    print(f"{asked.output}: try aligndet predict --weights {asked.output} IMAGES")


if __name__ == "__main__":
    main()
