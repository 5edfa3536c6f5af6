"""A pre-trained detector in a loop like torchvision's references/detection (examples/torchvision_loop.py)."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import pil_to_tensor

import aligndet_cli as aligndet
from aligndet_cli.config import DataConfig
from aligndet_cli.data.loaders import StreamSampler
from aligndet_cli.data.open import open_images
from aligndet_cli.data.transforms import resize, resized_hw
from aligndet_cli.finetune.views import ResolutionConfig, draw_labelled_view, resolve_resolution
from aligndet_cli.processes.devices import Process
from helpers.commandline import aligndet as command
from helpers.scripts import load_script

NUM_STEPS, BATCH, SEED = 20, 2, 0
SIDES = {"short_side": [64], "long_side": 96}


class CocoImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and targets as in torchvision's own loop, read without this package.

    Items are asked for by `(position, index)`. Where `finetune` mirrors the image at that position, it comes mirrored,
    and resized before: resizing a mirrored image may round its pixels in another way.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.coco, self.folder = COCO(str(root / "annotations" / f"instances_{split}.json")), root / split
        self.num_mirrored = 0

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        position, index = place
        number = sorted(self.coco.imgs)[index]
        pixels = pil_to_tensor(Image.open(self.folder / self.coco.imgs[number]["file_name"]).convert("RGB"))
        entries = [entry for entry in self.coco.imgToAnns[number] if not entry["iscrowd"]]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy").float()
        size_hw = (pixels.shape[1], pixels.shape[2])
        resolution = resolve_resolution(ResolutionConfig.model_validate(SIDES), "resize", (64,))
        _, view = draw_labelled_view((SEED, position), size_hw, resolution)
        if view.flip:
            self.num_mirrored += 1
            height, width = resized_hw(size_hw, 64, 96)
            pixels = resize(pixels, (height, width)).flip(-1)
            boxes = boxes * torch.tensor([width / size_hw[1], height / size_hw[0]] * 2)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        labels = torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64)
        return pixels / 255, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(number)}


def test_twenty_steps_have_the_losses_of_finetune(toy: Path, chain: Path, tmp_path: Path) -> None:
    file = chain / "pretrain-box" / "retinanet-resnet18" / "weights.pt"
    loop = load_script("torchvision_loop.py")
    # 30 steps: the rate drops after the 20 that are compared; a tenth of them is the warm-up
    run = aligndet.finetune(
        {"resolution": SIDES, "init": str(file)}, tmp_path, data=toy, steps=30, batch_size=BATCH, log_every=1
    )
    expected = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]

    torch.manual_seed(SEED)
    images = open_images(DataConfig(root=toy), purpose="train")
    names = [category.name for category in images.categories]
    detector = aligndet.load(file, classes=names, config={"resolution": SIDES})
    dataset = CocoImages(toy, "train")
    label_of = {category.category_id: label for label, category in enumerate(images.categories, start=1)}
    sampler = StreamSampler(
        images.aspects(range(len(images))), BATCH, seed=SEED, start_step=0, num_steps=NUM_STEPS, process=Process()
    )

    def collate(batch: list[Any]) -> tuple[Any, ...]:
        for _, target in batch:  # named classes have the labels 1 to 5, and not the ids of the label file
            target["labels"] = torch.tensor([label_of[int(label)] for label in target["labels"]], dtype=torch.int64)
        return tuple(loop.collate(batch))

    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.015 * BATCH / 16, momentum=0.9, weight_decay=5e-5)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]  # of places
    told = loop.train_one_epoch(detector, optimizer, loader, torch.device("cpu"), warmup_steps=3)

    assert len(told) == NUM_STEPS and 0 < dataset.num_mirrored < NUM_STEPS * BATCH
    differences = [abs(told[step][name] - expected[step][name]) for step in range(NUM_STEPS) for name in told[step]]
    assert set(told[0]) == {"loss_cls", "loss_box_reg"}
    assert max(differences) < 1e-6


def test_the_example_trains_saves_and_its_weights_predict(
    toy: Path, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pt"
    words = [chain / "pretrain-box" / "retinanet-resnet18", toy, "--split", "train", "--num-classes", "12"]
    words += ["--short-side", "64", "--epochs", "1", "--batch-size", "4", "--output", file]
    monkeypatch.setattr(sys, "argv", ["torchvision_loop.py", *map(str, words)])
    load_script("torchvision_loop.py").main()
    assert "epoch 1: loss_cls" in capsys.readouterr().out
    detector = aligndet.load(file)
    assert detector.names == {label: str(label) for label in range(1, 12)} and detector.test_sides[0] == 64
    ran = command("predict", toy / "val", "--weights", file, "--output", tmp_path / "found", "--score", "0")
    assert "11 images" in ran.stdout
