"""Plain ViTs in the layouts in which they are published, made from shapes that are written down here, at small sizes.

The networks are timm's with fewer and narrower blocks, so names and layouts are those of the real ones.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, scaled_dot_product_attention

from aligndet_cli.backbones import BackboneConfig, build_backbone, from_timm
from aligndet_cli.backbones.layouts import FoundBackbone
from aligndet_cli.backbones.vit import PlainViT
from aligndet_cli.backbones.weights import fill_backbone, read_backbone
from aligndet_cli.errors import WeightsError
from helpers.renaming import Tensors, renamed

timm = pytest.importorskip("timm")

C, HEADS, BLOCKS, GRID = 16, 2, 4, 4
SMALL = {"depth": BLOCKS, "embed_dim": C, "num_heads": HEADS}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let timm make small networks under the names of the large ones."""
    create = timm.create_model

    def create_small(name: str, **options: Any) -> nn.Module:
        return create(name, **SMALL, **({"img_size": 14 * GRID} if "patch14" in name else {}), **options)

    caches = (from_timm.facts_of, from_timm.create_whole)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(timm, "create_model", create_small)
    yield
    for cache in caches:
        cache.cache_clear()


def build(name: str) -> PlainViT:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig.model_validate({"name": f"timm:{name}"})).eval()
    assert isinstance(backbone, PlainViT) and len(backbone.body.blocks) == BLOCKS
    return backbone


def random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def block(at: str, *, scales: bool = True, gated: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of a block as DINOv2, DINOv3 and MAE name them."""
    shapes: dict[str, tuple[int, ...]] = {f"{at}.norm{i}.{kind}": (C,) for i in (1, 2) for kind in ("weight", "bias")}
    layers, hidden = {"attn.qkv": (3 * C, C), "attn.proj": (C, C)}, 4 * C
    layers |= (
        {"mlp.w1": (hidden, C), "mlp.w2": (hidden, C), "mlp.w3": (C, hidden)}
        if gated
        else {"mlp.fc1": (hidden, C), "mlp.fc2": (C, hidden)}
    )
    for name, shape in layers.items():
        shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    return shapes | ({f"{at}.ls{i}.gamma": (C,) for i in (1, 2)} if scales else {})


def rest(patch: int, num_positions: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of what is beside the blocks."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, C)}
    shapes |= {"patch_embed.proj.weight": (C, 3, patch, patch), "patch_embed.proj.bias": (C,)}
    shapes |= {"pos_embed": (1, num_positions, C)} if num_positions else {}
    return shapes | {"norm.weight": (C,), "norm.bias": (C,)}


def dinov2(*, registers: bool = False, chunks: int = 0) -> Tensors:
    """`dinov2_vits14_pretrain.pth` and `dinov2_vits14_reg4_pretrain.pth`; with chunks, as training writes it."""
    shapes = rest(14, GRID * GRID + 1) | {"mask_token": (1, C)}
    shapes |= {"register_tokens": (1, 4, C)} if registers else {}
    for number in range(BLOCKS):
        shapes |= block(f"blocks.{number // chunks}.{number}" if chunks else f"blocks.{number}")
    return random(shapes)


def dinov3(*, gated: bool = False, with_bias: bool = True) -> Tensors:
    """`dinov3_vits16_pretrain_lvd1689m.pth`; gated as `dinov3_vits16plus`: the keys' biases are masked."""
    shapes = rest(16, None) | {"mask_token": (1, C), "storage_tokens": (1, 4, C), "rope_embed.periods": (C // 8,)}
    for number in range(BLOCKS):
        shapes |= block(f"blocks.{number}", gated=gated)
        shapes[f"blocks.{number}.attn.qkv.bias_mask"] = (3 * C,)
    weights = random(shapes)
    for name in weights:
        if name.endswith("bias_mask"):
            weights[name] = torch.cat([torch.ones(C), torch.zeros(C), torch.ones(C)])
        if name.endswith("qkv.bias"):
            weights[name][C : 2 * C] = 0
            weights[name] *= with_bias
    return weights


def mae(*, decoder: bool = False) -> Tensors:
    """`mae_pretrain_vit_base.pth`; with its decoder, `mae_visualize_vit_base.pth`."""
    shapes = rest(16, 14 * 14 + 1)
    for number in range(BLOCKS):
        shapes |= block(f"blocks.{number}", scales=False)
    if decoder:
        shapes |= {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 197, 8), "decoder_embed.weight": (8, C)}
        shapes |= {f"decoder_{name}": shape for name, shape in block("blocks.0", scales=False).items()}
    return random(shapes)


def siglip() -> Tensors:
    """The tower of a SigLIP in timm's names, as OpenCLIP has it behind `visual.trunk.`."""
    weights = {name: value for name, value in mae().items() if name != "cls_token"}
    return weights | {"pos_embed": weights["pos_embed"][:, 1:]}


# ---- as transformers names them ----


def split_qkv(weights: Tensors, attention: str, names: tuple[str, str, str]) -> Tensors:
    found = {}
    for name, value in weights.items():
        if ".attn.qkv." in name:
            for one, part in zip(names, value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"{attention}.{one}")] = part.clone()
        else:
            found[name] = value
    return found


STEM = tuple((name, f"embeddings.{name}") for name in ("cls_token", "mask_token", "register_tokens"))


def dinov2_of_transformers(*, registers: bool = False) -> Tensors:
    words = (*STEM, ("pos_embed", "embeddings.position_embeddings"), ("blocks.", "encoder.layer."))
    words = (*words, ("patch_embed.proj", "embeddings.patch_embeddings.projection"), (".gamma", ".lambda1"))
    words = (*words, (".ls", ".layer_scale"), ("attn.proj", "attention.output.dense"))
    split = split_qkv(dinov2(registers=registers), "attention.attention", ("query", "key", "value"))
    found = renamed(split, *words)
    return {f"layernorm.{name[5:]}" if name.startswith("norm.") else name: value for name, value in found.items()}


def dinov3_of_transformers(*, gated: bool = False) -> Tensors:
    weights = renamed(dinov3(gated=gated), ("storage_tokens", "register_tokens"))
    split = split_qkv(weights, "attention", ("q_proj", "k_proj", "v_proj"))
    mlp = ("w1", "gate_proj"), ("w2", "up_proj"), ("w3", "down_proj"), ("fc1", "up_proj"), ("fc2", "down_proj")
    words = (*STEM, ("patch_embed.proj", "embeddings.patch_embeddings"), ("blocks.", "layer."), (".ls", ".layer_scale"))
    words = (*words, ("gamma", "lambda1"), ("attn.proj", "attention.o_proj"), *mlp)
    found = renamed(split, *words)
    unsaved = ("k_proj.bias", "bias_mask", "periods")
    return {name: value for name, value in found.items() if not name.endswith(unsaved)}


def mae_of_transformers() -> Tensors:
    body = split_qkv(mae(), "attention.attention", ("query", "key", "value"))
    words = (("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"))
    words = (*words, ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("blocks.", "encoder.layer."))
    words = (*words, ("attn.proj", "attention.output.dense"), ("norm1", "layernorm_before"))
    words = (*words, ("norm2", "layernorm_after"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"))
    found = {f"layernorm.{n[5:]}" if n.startswith("norm.") else n: v for n, v in renamed(body, *words).items()}
    return {f"vit.{name}": value for name, value in found.items()} | {"decoder.mask_token": torch.zeros(1, 1, 8)}


def siglip_of_transformers() -> Tensors:
    body = split_qkv(siglip(), "self_attn", ("q_proj", "k_proj", "v_proj"))
    body["pos_embed"] = body["pos_embed"][0]
    words = (("pos_embed", "embeddings.position_embedding.weight"), ("patch_embed.proj", "embeddings.patch_embedding"))
    words = (*words, ("blocks.", "encoder.layers."), ("attn.proj", "attn.out_proj"), ("norm1", "layer_norm1"))
    words = (*words, ("norm2", "layer_norm2"))
    found = {f"post_layernorm.{n[5:]}" if n.startswith("norm.") else n: v for n, v in renamed(body, *words).items()}
    found = {n.replace(".attn.out_proj", ".self_attn.out_proj"): v for n, v in found.items()}
    beside = {"text_model.embeddings.token_embedding.weight": torch.zeros(5, C), "logit_scale": torch.zeros(1)}
    return (
        {f"vision_model.{n}": v for n, v in found.items()} | {"vision_model.head.probe": torch.zeros(1, 1, C)} | beside
    )


# ---- the published network, by its own names ----


def reference(weights: Tensors, pixels: Tensor, eps: float = 1e-6) -> Tensor:
    """Last map (C, H, W) of DINOv2 or MAE for one image (3, H, W) of the size that its positions are for."""
    stride = pixels.shape[1] // side(weights)
    x = conv2d(pixels[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=stride)
    first, registers = (weights.get(name, torch.zeros(1, 0, C)) for name in ("cls_token", "register_tokens"))
    x = torch.cat([first, x.flatten(2).transpose(1, 2)], dim=1) + weights["pos_embed"]
    num_first = first.shape[1]
    x = torch.cat([x[:, :num_first], registers, x[:, num_first:]], dim=1)

    def norm(x: Tensor, at: str) -> Tensor:
        return layer_norm(x, (C,), weights[f"{at}.weight"], weights[f"{at}.bias"], eps)

    def dense(x: Tensor, at: str) -> Tensor:
        return linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])

    for number in range(BLOCKS):
        at = f"blocks.{number}"
        ones = torch.ones(C)
        q, k, v = dense(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + weights.get(f"{at}.ls1.gamma", ones) * dense(mixed, f"{at}.attn.proj")
        hidden = gelu(dense(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
        x = x + weights.get(f"{at}.ls2.gamma", ones) * dense(hidden, f"{at}.mlp.fc2")
    x = norm(x, "norm")[0, num_first + registers.shape[1] :]
    return x.T.unflatten(1, (side(weights), side(weights)))


def side(weights: Tensors) -> int:
    """Cells in a row of the positions."""
    return math.isqrt(weights["pos_embed"].shape[1])


DINO_V2, WITH_REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
VIT, SIGLIP = "vit_base_patch16_224", "vit_base_patch16_siglip_224"
TOWER_LESS = ("text_model.embeddings.token_embedding.weight", "logit_scale")


@dataclass(frozen=True)
class File:
    """A file: the network, what it holds, the same under the names of `reference`, and what is left out."""

    name: str
    content: Callable[[], dict[str, Any]]
    weights: Callable[[], Tensors]
    others: tuple[str, ...] = ()


with_registers = partial(dinov2, registers=True)
FILES = {
    "DINOv2": File(DINO_V2, dinov2, dinov2, ("mask_token",)),
    "DINOv2 with registers": File(WITH_REGISTERS, with_registers, with_registers, ("mask_token",)),
    "DINOv2, chunked": File(
        DINO_V2,
        lambda: {"teacher": {f"backbone.{name}": value for name, value in dinov2(chunks=2).items()}},
        dinov2,
        ("backbone.mask_token",),
    ),
    "DINOv2 of transformers": File(DINO_V2, dinov2_of_transformers, dinov2, ("embeddings.mask_token",)),
    "DINOv2 with registers of transformers": File(
        WITH_REGISTERS, partial(dinov2_of_transformers, registers=True), with_registers, ("embeddings.mask_token",)
    ),
    "MAE": File(VIT, lambda: {"model": mae()}, mae),
    "MAE with decoder": File(
        VIT,
        lambda: {"model": mae(decoder=True)},
        partial(mae, decoder=True),
        tuple(name for name in mae(decoder=True) if name.startswith(("mask_token", "decoder_"))),
    ),
    "MAE of transformers": File(VIT, mae_of_transformers, mae, ("decoder.mask_token",)),
    "SigLIP of OpenCLIP": File(
        SIGLIP,
        lambda: {f"visual.trunk.{name}": value for name, value in siglip().items()} | {"logit_scale": torch.zeros(1)},
        siglip,
        ("logit_scale",),
    ),
    "SigLIP of transformers": File(SIGLIP, siglip_of_transformers, siglip, ("vision_model.head.probe", *TOWER_LESS)),
}


@pytest.mark.parametrize("file", FILES)
def test_features_are_those_of_the_published_network(file: str, tmp_path: Path) -> None:
    name, weights = FILES[file].name, FILES[file].weights()
    torch.save(FILES[file].content(), tmp_path / "vit.pth")
    backbone, found = filled(name, tmp_path / "vit.pth")
    assert found.others == FILES[file].others and not found.is_supervised
    cells = side(weights)
    pixels = torch.randn(1, 3, 16 * cells, 16 * cells, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        given = backbone.own_input(pixels)
        patch = weights["patch_embed.proj.weight"].shape[-1]
        if patch != 16:
            given = interpolate(given, (patch * cells, patch * cells), mode="bilinear")
        torch.testing.assert_close(backbone(pixels)["c4"][0], reference(weights, given[0]), rtol=1e-4, atol=1e-5)


def filled(name: str, file: Path) -> tuple[PlainViT, FoundBackbone]:
    backbone, found = build(name), read_backbone(file, f"timm:{name}")
    fill_backbone(backbone, found, file)
    return backbone, found


# ---- DINOv3: its positions are rotary, so its tensors are compared one by one ----


DINO_V3, GATED = "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"
OF_DINO_V3 = ("mask_token", "rope_embed.periods", *(f"blocks.{n}.attn.qkv.bias_mask" for n in range(BLOCKS)))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("make", "others"), [(dinov3, OF_DINO_V3), (dinov3_of_transformers, ("embeddings.mask_token",))]
)
def test_every_tensor_of_dinov3_has_its_place(
    gated: bool, make: Callable[..., Tensors], others: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save(make(gated=gated), tmp_path / "vit.pth")
    backbone, found = filled(f"{GATED if gated else DINO_V3}_qkvb", tmp_path / "vit.pth")
    assert sorted(found.others) == sorted(others)
    weights, state = dinov3(gated=gated), dict(backbone.body.named_parameters())
    pairs = [("reg_token", "storage_tokens")]
    pairs += [(name, name) for name in rest(16, None)]
    for at in (f"blocks.{number}" for number in range(BLOCKS)):
        mlp = (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")) if gated else (("fc1", "fc1"), ("fc2", "fc2"))
        layers = [("norm1", "norm1"), ("norm2", "norm2"), ("attn.proj", "attn.proj")]
        layers += [(f"mlp.{ours}", f"mlp.{theirs}") for ours, theirs in mlp]
        pairs += [(f"{at}.{a}.{kind}", f"{at}.{b}.{kind}") for a, b in layers for kind in ("weight", "bias")]
        pairs += [(f"{at}.gamma_{i}", f"{at}.ls{i}.gamma") for i in (1, 2)]
        pairs.append((f"{at}.attn.qkv.weight", f"{at}.attn.qkv.weight"))
    for ours, theirs in pairs:
        assert torch.equal(state.pop(ours), weights[theirs]), ours
    for number in range(BLOCKS):
        bias = weights[f"blocks.{number}.attn.qkv.bias"]
        for ours, part in (("q_bias", bias[:C]), ("v_bias", bias[2 * C :])):
            assert torch.equal(state.pop(f"blocks.{number}.attn.{ours}"), part) and part.any()
    assert not state


@pytest.mark.parametrize("make", [dinov3, dinov3_of_transformers])
def test_biases_of_dinov3_are_not_lost(
    make: Callable[..., Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(make(), tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=rf"biases of queries .*, which timm:{DINO_V3} lacks; use --backbone timm:"):
        filled(DINO_V3, tmp_path / "vit.pth")
    assert capsys.readouterr().out == ""  # stdout is for results, and timm prints there
    # In the larger ones all are zero, and nothing is lost.
    torch.save(dinov3(with_bias=False), tmp_path / "vit.pth")
    backbone, found = filled(DINO_V3, tmp_path / "vit.pth")
    assert torch.equal(backbone.body.blocks[3].gamma_2, dinov3()["blocks.3.ls2.gamma"])
    assert {f"blocks.{number}.attn.qkv.bias" for number in range(BLOCKS)} <= set(found.others)


def test_tensors_that_the_network_has_no_place_for_are_refused(tmp_path: Path) -> None:
    weights = dinov2()
    for name in ("patch_embed.proj.weight",):  # as if its patches had 16 pixels
        weights[name] = torch.zeros(C, 3, 16, 16)
    torch.save(weights, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"8 of \d+ tensors too many: body.blocks.0.ls1.gamma, body.blocks.0.ls2"):
        filled(VIT, tmp_path / "vit.pth")
    torch.save(mae(), tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"8 of \d+ tensors missing: body.blocks.0.ls1.gamma"):
        filled(DINO_V2, tmp_path / "vit.pth")


def test_the_first_tensors_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(mae(decoder=True), tmp_path / "vit.pth")
    with caplog.at_level("INFO", logger="aligndet"):
        filled(VIT, tmp_path / "vit.pth")
    assert "found, 15 others left out: mask_token, decoder_pos_embed, decoder_embed.weight, ..." in caplog.text
