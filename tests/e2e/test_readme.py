"""The lines of the README run as they are typed, made small by what is added to them."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet50_Weights, resnet50

from helpers.commandline import aligndet

README = Path(__file__).parents[2] / "README.md"
SIDES = ("--short-side", "64", "--long-side", "96")
TRAINING = (*SIDES, "--steps", "2", "--batch-size", "2")
SMALLER = {
    "proposals": ("--num-workers", "1"),
    "cluster": (*SIDES, "--k", "4", "--pca-dim", "4"),
    "pretrain-box": TRAINING,
    "finetune": TRAINING,
    "evaluate": (),
}


def lines_of(section: str) -> list[list[str]]:
    """The commands in a section's first block of code, without `aligndet` and the remarks."""
    text = README.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [line.split("#")[0].split()[1:] for line in re.findall(r"^    (aligndet .*)$", text, flags=re.MULTILINE)]


@pytest.mark.slow
def test_the_five_stages(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGNDET_WORKSPACE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(resnet50().state_dict(), cache / Path(ResNet50_Weights.DEFAULT.url).name)
    (tmp_path / "coco").symlink_to(toy)
    lines = lines_of("The five stages")
    assert [words[0] for words in lines] == list(SMALLER)
    for words in lines:
        aligndet(*words, *SMALLER[words[0]])
    assert "already complete" in aligndet(*lines[-1]).stdout
