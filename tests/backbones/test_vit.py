"""Plain ViTs of timm: positions, pyramid, freezing, weights as they are published, and through the commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from aligndet_cli.backbones import BackboneConfig, WeightsTraining, build_backbone
from aligndet_cli.backbones.from_timm import has_windows
from aligndet_cli.backbones.vit import PlainViT, resample
from aligndet_cli.backbones.weights import fill_backbone, read_backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.training.recipe import Freezing
from helpers.commandline import CHAIN, NECK, RESOLUTION, aligndet
from helpers.small_detectors import SMALL

timm = pytest.importorskip("timm")

TINY, DINO_V2, DINO_V3 = "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"


def config_of(name: str, **settings: Any) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": f"timm:{name}", **settings})


def build(name: str) -> PlainViT:
    torch.manual_seed(0)
    backbone = build_backbone(config_of(name)).eval()
    assert isinstance(backbone, PlainViT)
    return backbone


def whole(name: str) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = timm.create_model(name)
    return model.eval()


@pytest.mark.parametrize("name", [TINY, DINO_V2, DINO_V3])
def test_the_last_map_is_timms_own(name: str) -> None:
    backbone, reference = build(name), whole(name)
    backbone.body.load_state_dict(reference.state_dict(), strict=False)
    side, patch = reference.patch_embed.img_size[0], reference.patch_embed.patch_size[0]
    # At the size that the positions are made for, in cells of 16 pixels.
    pixels = torch.randn(2, 3, side // patch * 16, side // patch * 16)
    with torch.inference_mode():
        maps, own = backbone(pixels), backbone.own_input(pixels)
        given = own if patch == 16 else interpolate(own, (side, side), mode="bilinear")
        tokens = reference.forward_features(given)[:, reference.num_prefix_tokens :]
    assert (patch == 14) == (name == DINO_V2)
    torch.testing.assert_close(maps["c4"].flatten(2).transpose(1, 2), tokens, rtol=1e-5, atol=1e-5)
    assert {level: tuple(one.shape[1:]) for level, one in maps.items()} == {
        level: (reference.embed_dim, cells, cells)
        for level, cells in zip(("c2", "c3", "c4", "c5"), (side // patch * 4 // k for k in (1, 2, 4, 8)), strict=True)
    }


@pytest.mark.parametrize("name", [TINY, DINO_V2])
def test_images_of_any_size_are_padded_and_positions_interpolated(name: str) -> None:
    backbone, pixels = build(name), torch.randn(1, 3, 61, 83)
    with torch.inference_mode():
        maps, padded = backbone(pixels), backbone(pad(pixels, (0, 13, 0, 3)))
    for (level, one), size in zip(maps.items(), ((16, 21), (8, 11), (4, 6), (2, 3)), strict=True):
        assert one.shape[-2:] == size
        torch.testing.assert_close(one, padded[level][..., : size[0], : size[1]])
    # Positions matter: the same content elsewhere is another map.
    with torch.inference_mode():
        twice = backbone(torch.randn(1, 3, 32, 32).repeat(1, 1, 2, 2))["c4"]
    assert not torch.allclose(twice[..., :2, :2], twice[..., 2:, 2:], atol=1e-3)


def test_cells_of_all_levels_lie_where_they_should() -> None:
    # A map whose values are the horizontal places of its cells' middles, in pixels.
    last = (16.0 * torch.arange(8) + 8).expand(1, 1, 6, 8)
    for level, stride in (("c2", 4), ("c3", 8), ("c4", 16)):
        one = resample(last, level)
        middles = stride * (torch.arange(one.shape[-1]) + 0.5)
        inner = slice(16 // stride, -16 // stride)  # at the border there is nothing to interpolate with
        torch.testing.assert_close(one[0, 0, 0, inner], middles[inner])
    assert resample(last, "c5")[0, 0, 0].tolist() == [24, 56, 88, 120]  # the larger of each two


def test_only_levels_in_use_are_made() -> None:
    backbone = build(TINY)
    assert backbone.use_levels(("c3", "c4", "c5")) == {"c3": 192, "c4": 192, "c5": 192}
    assert set(backbone(torch.zeros(1, 3, 32, 32))) == {"c3", "c4", "c5"}


@pytest.mark.parametrize(("frozen_stages", "blocks"), [(-1, ()), (0, ()), (1, range(3)), (4, range(12))])
def test_frozen_stages_have_no_gradients(frozen_stages: int, blocks: Any) -> None:
    backbone = build_backbone(config_of(TINY, frozen_stages=frozen_stages)).train()
    stem = ("cls_token", "pos_embed", "patch_embed.") if frozen_stages >= 0 else ()
    last = ("norm.",) if frozen_stages == 4 else ()
    frozen = tuple(f"body.{name}" for name in (*stem, *last, *(f"blocks.{number}." for number in blocks)))
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name


@pytest.mark.parametrize("family", ["mask-rcnn", "retinanet", "detr"])
def test_losses_reach_every_trainable_parameter(family: str) -> None:
    model = SMALL[family].build(build_backbone(config_of(TINY)), 3)
    targets = [BoxTargets(torch.tensor([[8.0, 8, 40, 50]]), torch.tensor([1]), torch.tensor([i])) for i in range(2)]
    losses = model(ImageBatch(torch.randn(2, 3, 64, 64), ((61, 64), (64, 50))), targets)
    sum(loss for name, loss in losses.items()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_recipe_is_vitdets() -> None:
    recipe = recipe_for(RetinaNetConfig(), config_of(TINY), WeightsTraining("timm", is_supervised=True))
    assert (recipe.name, recipe.freezing) == ("vit", Freezing(-1, norm_eval=False))
    rates = (recipe.pretrain, recipe.finetune, recipe.plain)
    assert [(one.optimizer, one.lr, one.weight_decay) for one in rates] == [
        ("adamw", 1e-4, 0.1),
        ("adamw", 1e-4, 0.04),
        ("adamw", 1e-4, 0.1),
    ]
    assert not any(one.decays_norms for one in rates)


def test_other_patches_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot serve, its patches have 8 pixels, and a plain ViT needs 14 or 16; ta"
    ):
        build_backbone(config_of("vit_base_patch8_224"))
    assert has_windows(f"timm:{TINY}")  # an exported file takes images of one size


def mae(state: dict[str, Tensor]) -> dict[str, Any]:
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 197, 8)}
    return {"model": {**{name: value for name, value in state.items() if not name.startswith("head")}, **decoder}}


# Per publisher: the file, and whether a classifier shows that labels were used.
FILES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], bool]] = {
    "timm": (lambda s: s, True),
    "MAE": (mae, False),
    "DINO's teacher": (
        lambda s: {
            "student": {f"module.backbone.{name}": torch.zeros_like(value) for name, value in s.items()},
            "teacher": {f"backbone.{name}": value for name, value in s.items() if not name.startswith("head")},
        },
        False,
    ),
    "OpenCLIP's SigLIP": (
        lambda s: {
            "logit_scale": torch.zeros(1),
            **{f"visual.trunk.{name}": value for name, value in s.items() if not name.startswith("head")},
        },
        False,
    ),
}


@pytest.mark.parametrize("publisher", FILES)
def test_published_files_fill_every_tensor(publisher: str, tmp_path: Path) -> None:
    wrap, is_supervised = FILES[publisher]
    state = {name: value + 0.5 for name, value in whole(TINY).state_dict().items()}
    file = tmp_path / "vit.pth"
    torch.save(wrap(state), file)
    backbone, found = build(TINY), read_backbone(file, f"timm:{TINY}")
    fill_backbone(backbone, found, file)
    assert found.is_supervised == is_supervised
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_positions_of_another_grid_are_resized(tmp_path: Path) -> None:
    state = whole(TINY).state_dict()
    # 7 x 7 cells whose values are their columns, behind the place of the class token.
    columns = torch.arange(7.0).repeat(7).view(1, 49, 1).expand(1, 49, 192)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 192), 5.0), columns], dim=1)
    torch.save(state, tmp_path / "vit.pth")
    backbone = build(TINY)
    fill_backbone(backbone, read_backbone(tmp_path / "vit.pth", f"timm:{TINY}"), tmp_path / "vit.pth")
    positions = backbone.body.pos_embed.detach()
    assert (positions[0, 0] == 5).all() and positions.shape == (1, 197, 192)
    grid = positions[0, 1:, 0].view(14, 14)
    torch.testing.assert_close(grid, grid[:1].expand(14, 14))  # columns stay columns
    assert (grid[0].diff() > 0).all() and grid[0, 6:8].mean().item() == pytest.approx(3.0)


def test_original_names_of_dinov3_are_converted(tmp_path: Path) -> None:
    state = whole(DINO_V3).state_dict()
    names = (("reg_token", "storage_tokens"), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
    original = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}
    for name, value in state.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        original[name] = value
    torch.save(original, tmp_path / "dinov3.pth")
    backbone, found = build(DINO_V3), read_backbone(tmp_path / "dinov3.pth", f"timm:{DINO_V3}")
    fill_backbone(backbone, found, tmp_path / "dinov3.pth")
    assert not found.is_supervised
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_commands_run(toy: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    aligndet("proposals", toy, "-w", workspace, *CHAIN["proposals"])
    words = ("-w", workspace, "--backbone", f"timm:{TINY}", "--steps", "1", "--batch-size", "2", "-q")
    detector = ("--detector", "retinanet", *NECK, *RESOLUTION)
    aligndet("pretrain-box", *words, *detector, "--backbone-weights", "none")
    ran = aligndet("finetune", *words, *detector, "--json").json()
    assert ran["result"]["init"] == "pretrain" and ran["result"]["matched_share"] == 1
    trained = torch.load(workspace / "finetune" / f"retinanet-timm-{TINY}" / "weights.pt", weights_only=True)
    assert trained["recipe"] == "vit" and trained["state_dict"]["backbone.mean"].tolist() == [0.5, 0.5, 0.5]
    aligndet("evaluate", "-w", workspace, "-q")
