"""The card beside every `weights.pt`."""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from aligndet_cli.backbones import weights
from aligndet_cli.cards import card
from helpers.commandline import CHAIN, NECK, RESOLUTION, aligndet

MANIFEST = {
    "stage": "finetune",
    "name": "cells",
    "result": {"images": 1234, "protocol": {"backbone_weights": "supervised"}, "explanation": "long"},
    "packages": {"aligndet": "0.1.0"},
    "settings": {"seed": 0, "recipe": None, "pipe": "a|b"},
}


def config(**changes: object) -> dict[str, object]:
    backbone = {"name": "resnet50", "weights": changes.pop("weights", "auto")}
    return {"data": {"root": "/home/me/cells"}, "detector": {"family": "mask_rcnn"}, "backbone": backbone, **changes}


def test_every_file_of_weights_has_a_card(chain: Path) -> None:
    files = sorted(chain.rglob("weights.pt"))
    assert {file.parts[-3] for file in files} == {"pretrain-box", "finetune"}
    for file in files:
        text = file.with_name("README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["library_name"] == "aligndet" and "retinanet" in front["tags"]
        assert ("pipeline_tag" in front) == (file.parts[-3] == "finetune")
        assert "| `training.steps` | 6 |" in text and "- Data: `toy`, " in text and str(chain.parent) not in text


def test_a_card_is_no_input_of_what_comes_next(chain: Path) -> None:
    """Somebody may add to it: later stages take the weights alone."""
    readme = chain / "finetune" / "retinanet-resnet18" / "README.md"
    before = readme.read_bytes()
    try:
        readme.write_text("mine")
        assert aligndet("evaluate", "-w", chain, *CHAIN["evaluate"]).stdout.startswith("already complete")
    finally:
        readme.write_bytes(before)


def test_the_hub_reads_the_card() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra hub is missing")
    measured = {"split": "val", "AP": 0.351, "AP50": 0.594, "AP75": None, "segm": {"AP": 0.3, "AP50": 0.5}}
    text = card(MANIFEST, config(), [measured])
    data = hub.ModelCard(text).data
    assert data.pipeline_tag == "object-detection" and data.library_name == "aligndet"
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("AP", 0.351),
        ("AP50", 0.594),
        ("mask_AP", 0.3),
        ("mask_AP50", 0.5),
    ]
    assert "| val | last | 35.1 | 59.4 | - |" in text and "1,234 images" in text
    assert "| `pipe` | a\\|b |" in text and "recipe` |" not in text and "long" not in text
    assert "/home" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"init": "pretrain"},
            "started from a run of `pretrain-box`, whose card says from what (backbone: supervised)",
        ),
        (
            {"init": "backbone", "weights": "IMAGENET1K_V1"},
            "`IMAGENET1K_V1`. Licence: BSD-3-Clause for torchvision's code; its weights learned from ImageNet, whose "
            "own terms may hold for them.",
        ),
        ({"init": "backbone", "weights": "ResNet50_Weights.DEFAULT"}, "Licence: BSD-3-Clause for torchvision's code"),
        (
            {"init": "backbone", "weights": "timm"},
            "from timm's weights of `resnet50`. Licence: not recorded; see where",
        ),
        ({"init": "backbone", "weights": "mine.pth"}, "`mine.pth`. Licence: not known to aligndet"),
        ({"init": "backbone", "weights": "/x/MINE.PTH"}, "`MINE.PTH`. Licence: not known to aligndet"),
        ({"init": "backbone", "weights": "/x/moco.pth"}, "`moco.pth`. Licence: not known to aligndet"),
        ({"init": "backbone", "weights": "workspace"}, "weights that `aligndet` had made (supervised)"),
        ({"init": "/x/other.pt"}, "It started from `other.pt`. Licence: not known"),
        ({"layout": "detectron2", "file": "/x/model.pkl"}, "Imported from `model.pkl`. Licence: CC BY-SA 3.0"),
        ({"layout": "aligndet", "file": "/x/model.pth"}, "Imported from `model.pth`. Licence: not known"),
    ],
)
def test_a_card_says_where_weights_are_from_and_their_terms(changes: dict[str, object], said: str) -> None:
    assert said in card(MANIFEST, config(**changes))


def test_random_weights_are_said_to_be_that() -> None:
    manifest = {**MANIFEST, "result": {"protocol": {"backbone_weights": "none"}}}
    assert "It started from random numbers." in card(manifest, config(init="scratch"))


def test_licences_that_timm_tells_are_in_the_card_once() -> None:
    result = {**MANIFEST["result"], "backbone_licence": "dinov3-license", "teacher_licence": "apache-2.0"}
    text = card({**MANIFEST, "result": result}, config(init="backbone", weights="timm"))
    assert "- Its backbone started from timm's weights of `resnet50`. Licence: dinov3-license." in text
    assert text.count("dinov3-license") == 1 and "apache-2.0" not in text
    student = {"weights": "none", "teacher": "timm:vit_small_patch14_dinov2.lvd142m"}
    text = card({**MANIFEST, "stage": "pretrain-image", "result": result}, config(**student))
    assert "- It learned from timm's `timm:vit_small_patch14_dinov2.lvd142m`. Licence: apache-2.0." in text
    text = card({**MANIFEST, "stage": "pretrain-image"}, config(weights="none", teacher="/x/dino.pth"))
    assert "- It learned from the network in `dino.pth`. Licence: not known to aligndet" in text


def test_a_run_from_weights_of_timm_records_their_licence(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    name = "mobilenetv3_small_050"
    save_file(timm.create_model(name).state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(weights, "fetch_timm_weights", lambda *_, **__: tmp_path / "model.safetensors")
    backbone = ("--backbone", f"timm:{name}", "--backbone-weights", "timm", "--init", "backbone")
    words = (toy, "-w", tmp_path / "w", "--detector", "retinanet", *backbone, *NECK, *RESOLUTION)
    ran = aligndet("finetune", *words, "--steps", "1", "--batch-size", "2", "-q", "--json").json()
    assert ran["result"]["backbone_licence"] == "apache-2.0" == timm.get_pretrained_cfg(name).license
    text = (Path(ran["folder"]) / "README.md").read_text()
    assert f"- Its backbone started from timm's weights of `timm:{name}`. Licence: apache-2.0." in text
