"""`--batch-size auto`: the search, what is remembered, and what happens without a GPU."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.processes.devices import Devices, Process
from aligndet_cli.training import batch_size
from aligndet_cli.training.batch_size import Split, find_largest, largest_on_gpu, settle_batch_size
from aligndet_cli.training.loop import Learner, LoopSettings
from aligndet_cli.training.recipe import Rates
from aligndet_cli.training.schedules import Schedule
from aligndet_cli.training.settings import TrainingConfig
from aligndet_cli.training.trial import Trial, draw_samples, worst_sizes
from helpers.commandline import DETECTOR, NECK, RANDOM, RESOLUTION, aligndet

RATES = Rates(0.01, 1e-4, "some recipe", batch_size=16)


class Memory(nn.Module):
    """A model for which memory runs out beyond a number of pixels."""

    def __init__(self, max_pixels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.max_pixels = max_pixels
        self.tried: list[int] = []

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if step == 0:
            self.tried.append(len(samples))
        if sum(sample.image[0].numel() for sample in samples) > self.max_pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"loss_a": self.weight.sum()}, {}


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 8, 13, 64, 99, 100, 101])
def test_the_search_finds_the_largest(room: int, limit: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= room

    assert find_largest(fits, limit) == min(room, limit)
    assert max(tried) <= limit and len(tried) == len(set(tried)) <= 2 * limit.bit_length()


def trial_of(model: Memory, num_images: int = 100) -> Trial:
    return Trial(
        build=lambda process: Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), {"model": model}),
        settings=LoopSettings(schedule=Schedule(10, 0, ()), base_lr=0.1, weight_decay=0.0, seed=0),
        sizes_hw=worst_sizes((32, 64), 96),  # 64 x 96 and 96 x 64: 6,144 pixels each
        num_boxes=3,
        num_classes=2,
        num_images=num_images,
        gaps=2.0,
        pools_regions=False,
    )


def largest(model: Memory, limit: int = 100) -> int:
    return largest_on_gpu(trial_of(model, limit), Process())


def test_before_the_run_a_strip_is_tried_that_views_do_not_enlarge() -> None:
    (sample,) = trial_of(Memory(0)).draw_small()
    assert tuple(sample.image.shape) == (3, 3, 96) and len(sample.boxes) == 3


def test_steps_are_taken_until_memory_runs_out() -> None:
    model = Memory(max_pixels=11 * 6144)
    assert largest(model) == 11
    assert model.tried == [1, 2, 4, 8, 16, 12, 10, 11]
    assert largest(Memory(max_pixels=11 * 6144), limit=6) == 6


def test_not_even_one_image() -> None:
    with pytest.raises(RunError, match="single image: lower --short-side"):
        largest(Memory(max_pixels=100))


def test_samples_are_of_the_worst_kind() -> None:
    samples = draw_samples(3, worst_sizes((640, 800), 1333), num_boxes=5, num_classes=4, with_masks=True)
    assert [tuple(sample.image.shape[1:]) for sample in samples] == [(800, 1333), (1333, 800), (800, 1333)]
    for sample in samples:
        height, width = sample.image.shape[1:]
        assert (sample.boxes >= 0).all() and (sample.boxes <= torch.tensor([width, height] * 2)).all()
        assert sample.masks is not None and sample.masks.flatten(1).any(dim=1).all()


def test_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = TrainingConfig(batch_size="auto", accumulate=2)
    gpus = Devices("cuda", per_node=3)
    monkeypatch.setattr(batch_size, "largest_on_gpu", lambda trial, process: 5)

    def settled(training: TrainingConfig, devices: Devices, recorded: Split | None = None) -> tuple[object, int]:
        trial = trial_of(Memory(0))
        found, _ = settle_batch_size(training, RATES, devices, recorded=recorded, trial=trial)
        return found.batch_size, found.accumulate

    assert settled(auto, gpus) == (3 * 2 * 5, 2)
    assert settled(auto, gpus, recorded=Split(12, 2, is_complete=False)) == (12, 2)
    assert settled(TrainingConfig(batch_size=6), gpus, recorded=Split(12, 2, is_complete=False)) == (6, 1)


def test_without_a_gpu_it_is_the_recipes_and_stays_with_the_run(chain: Path, tmp_path: Path) -> None:
    words = ("pretrain-box", "-w", chain, *DETECTOR, *RANDOM, *NECK, *RESOLUTION, "--steps", "6", "--dry-run")
    words = (*words, "--name", "auto")
    shown = aligndet(*words, "--batch-size", "auto").stderr
    assert "--batch-size auto: 16 (RetinaNet pre-training recipe)" in shown
    assert "16 (1 cpu process x 16)" in shown and "0.01 x 16/16" in shown
    # The finished run of the chain has batch size 2: "auto" is what it was begun with, so nothing has changed.
    effective = aligndet(*words[:-1], "retinanet-resnet18", "--batch-size", "auto", "--json").json()
    assert effective["action"] == "complete" and effective["effective"]["batch size"].startswith("2 (")
    line = aligndet(*words, "--batch-size", "many", code=2).error_line()
    assert "training.batch_size" in line and "auto" in line


def test_the_number_is_remembered_in_the_config_of_the_run(chain: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(chain, tmp_path / "workspace"))
    words = ("finetune", "-w", workspace, "--init", "scratch", *DETECTOR, *NECK, *RESOLUTION, "--steps", "1")
    aligndet(*words, "--batch-size", "auto")
    folder = workspace / "finetune" / "retinanet-resnet18-scratch"
    assert json.loads((folder / "config.json").read_text())["training"]["batch_size"] == 16
    for again in ("auto", "16"):
        assert "already complete" in aligndet(*words, "--batch-size", again).stdout
    assert "training.batch_size: 16 -> 8" in aligndet(*words, "--batch-size", "8", code=2).error_line()
