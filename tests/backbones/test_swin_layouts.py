"""Published Swin weights against a second implementation of each library's network, made from its names and orders."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, unfold
from torchvision.models.swin_transformer import SwinTransformer

from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.backbones.swin import Swin
from aligndet_cli.backbones.weights import fill_backbone, read_backbone
from aligndet_cli.errors import WeightsError
from helpers.renaming import Tensors, renamed

WIDTH, DEPTHS, HEADS, WINDOW = 16, (2, 2, 2, 2), (1, 2, 4, 8), 7


def make(width: int = WIDTH) -> Swin:
    torch.manual_seed(3)
    return Swin(SwinTransformer([4, 4], width, list(DEPTHS), list(HEADS), [7, 7]), "swin_tiny").eval()


def official_shapes(window: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as in the official repository, written down, not derived from torchvision's."""
    yield from (("patch_embed.proj.weight", (WIDTH, 3, 4, 4)), ("patch_embed.proj.bias", (WIDTH,)))
    yield from (("patch_embed.norm.weight", (WIDTH,)), ("patch_embed.norm.bias", (WIDTH,)))
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        dim = WIDTH * 2**stage
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}."
            for norm in ("norm1", "norm2"):
                yield from ((f"{at}{norm}.weight", (dim,)), (f"{at}{norm}.bias", (dim,)))
            yield f"{at}attn.relative_position_bias_table", ((2 * window - 1) ** 2, heads)
            yield f"{at}attn.relative_position_index", (window**2, window**2)
            for layer, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
                yield from ((f"{at}{layer}.weight", (out * dim, into * dim)), (f"{at}{layer}.bias", (out * dim,)))
            if block % 2:
                yield f"{at}attn_mask", (4, window**2, window**2)
        if stage < 3:
            at = f"layers.{stage}.downsample."
            yield from ((f"{at}norm.weight", (4 * dim,)), (f"{at}norm.bias", (4 * dim,)))
            yield f"{at}reduction.weight", (2 * dim, 4 * dim)
    yield from (("norm.weight", (8 * WIDTH,)), ("norm.bias", (8 * WIDTH,)))
    yield from (("head.weight", (10, 8 * WIDTH)), ("head.bias", (10,)))


def official_weights(window: int = WINDOW) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in official_shapes(window)}


def norm(x: Tensor, weights: Tensors, at: str) -> Tensor:
    return layer_norm(x, x.shape[-1:], weights[f"{at}.weight"], weights[f"{at}.bias"])


def dense(x: Tensor, weights: Tensors, at: str) -> Tensor:
    return linear(x, weights[f"{at}.weight"], weights.get(f"{at}.bias"))


def attention(x: Tensor, weights: Tensors, at: str, heads: int, shift: int) -> Tensor:
    """Windows one after the other. x: (H, W, C), multiples of the window."""
    height, width, dim = x.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, rows, columns = (tensor.roll((-shift, -shift), (0, 1)) for tensor in (x, rows, columns))
    cells = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))  # (49, 2)
    offsets = cells[:, None] - cells[None] + WINDOW - 1  # query minus key, from 0
    table = weights[f"{at}.relative_position_bias_table"]
    bias = table[offsets[..., 0] * (2 * WINDOW - 1) + offsets[..., 1]].permute(2, 0, 1)  # (heads, 49, 49)
    out = torch.empty_like(x)
    for top in range(0, height, WINDOW):
        for left in range(0, width, WINDOW):
            here = (slice(top, top + WINDOW), slice(left, left + WINDOW))
            tokens = x[here].reshape(-1, dim)
            query, key, value = dense(tokens, weights, f"{at}.qkv").view(-1, 3, heads, dim // heads).permute(1, 2, 0, 3)
            logits = query @ key.transpose(1, 2) / (dim // heads) ** 0.5 + bias
            # Cells rolled in from the other side of the image are no neighbours of the rest of the window.
            place = torch.stack([rows[here].flatten() < shift, columns[here].flatten() < shift], dim=1)
            apart = (place[:, None] != place[None]).any(dim=2)
            apart &= torch.tensor(top + WINDOW == height or left + WINDOW == width)
            weights_of_keys = (logits - 100.0 * apart).softmax(dim=-1)
            mixed = (weights_of_keys @ value).transpose(0, 1).reshape(-1, dim)
            out[here] = dense(mixed, weights, f"{at}.proj").view(WINDOW, WINDOW, dim)
    return out.roll((shift, shift), (0, 1))


def concatenated(x: Tensor) -> Tensor:
    """Official order: of each 2 x 2 cells the upper left, lower left, upper right and lower right one."""
    return torch.stack(
        [
            torch.stack(
                [torch.cat([x[i, j], x[i + 1, j], x[i, j + 1], x[i + 1, j + 1]]) for j in range(0, x.shape[1], 2)]
            )
            for i in range(0, x.shape[0], 2)
        ]
    )


def unfolded(x: Tensor) -> Tensor:
    """Merge patches in the order of `nn.Unfold`, as mmdetection does."""
    columns = unfold(x.permute(2, 0, 1)[None], 2, stride=2)[0]  # (4C, H/2 * W/2)
    return columns.T.view(x.shape[0] // 2, x.shape[1] // 2, -1)


def reference(weights: Tensors, pixels: Tensor, merge=concatenated) -> Tensor:
    """c5 of one image (3, H, W) by the official network's own names."""
    x = conv2d(pixels[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)[0]
    x = norm(x.permute(1, 2, 0), weights, "patch_embed.norm")
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}"
            shift = WINDOW // 2 if block % 2 and x.shape[0] > WINDOW else 0
            x = x + attention(norm(x, weights, f"{at}.norm1"), weights, f"{at}.attn", heads, shift)
            hidden = gelu(dense(norm(x, weights, f"{at}.norm2"), weights, f"{at}.mlp.fc1"))
            x = x + dense(hidden, weights, f"{at}.mlp.fc2")
        if stage < 3:
            at = f"layers.{stage}.downsample"
            x = dense(norm(merge(x), weights, f"{at}.norm"), weights, f"{at}.reduction")
    return norm(x, weights, "norm").permute(2, 0, 1)


def as_timm(weights: Tensors) -> Tensors:
    """timm >= 0.9: a patch merging begins the next stage, and the classifier is `head.fc`."""
    mergings = [(f"layers.{stage}.downsample", f"layers.{stage + 1}.downsample") for stage in (2, 1, 0)]
    return renamed(weights, *mergings, ("head.", "head.fc."))


def as_mmdetection(weights: Tensors) -> Tensors:
    words = {
        "patch_embed.proj": "patch_embed.projection",
        "layers.": "stages.",
        ".attn.": ".attn.w_msa.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
    }
    own = renamed({name: value for name, value in weights.items() if not name.startswith("head")}, *words.items())
    backbone = {"backbone." + ("norm3" + name[4:] if name.startswith("norm.") else name): own[name] for name in own}
    neck = {"neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    fresh = {
        f"backbone.norm{i}.{kind}": torch.full((WIDTH * 2**i,), 2.0) for i in range(3) for kind in ("weight", "bias")
    }
    return neck | backbone | fresh


LAYOUTS = {
    "official Swin": (lambda w: {"model": w}, concatenated),
    "timm": (as_timm, concatenated),
    "mmdetection": (lambda w: {"meta": {"epoch": 12}, "state_dict": as_mmdetection(w)}, unfolded),
    "SimMIM": (
        lambda w: {
            "model": {"encoder.mask_token": torch.zeros(1), "decoder.0.weight": torch.zeros(1)}
            | {f"encoder.{name}": value for name, value in w.items() if not name.startswith("head")}
        },
        concatenated,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_published_network(layout: str) -> None:
    wrap, merge = LAYOUTS[layout]
    weights = official_weights()
    found = recognise(wrap(weights))
    assert found is not None and found.layout == layout and found.family == "swin"
    backbone = make()
    fill_backbone(backbone, found, "file")
    # 224 px, for which the weights are published: 56, 28, 14 and 7 cells, the last without a shift
    pixels = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(
            backbone(pixels[None])["c5"][0], reference(weights, pixels, merge), rtol=1e-5, atol=1e-5
        )
    # The norms of the other levels are only in detectors' files; elsewhere they start fresh.
    assert (backbone.norm1.bias == (2 if layout == "mmdetection" else 0)).all()


def test_the_two_orders_of_patch_merging_differ() -> None:
    cells = torch.arange(8.0).view(2, 2, 2)  # (row, column, channel): upper left 0 1, upper right 2 3, lower left 4 5
    assert concatenated(cells).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert unfolded(cells).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_position_biases_of_another_window_are_resized(caplog: pytest.LogCaptureFixture) -> None:
    weights = official_weights(window=6)  # SimMIM's
    rows = torch.arange(11.0)[:, None].expand(11, 11)
    for name in weights:
        if name.endswith("table"):
            heads = weights[name].shape[1]
            weights[name] = torch.stack([rows * (head + 1) for head in range(heads)], dim=2).view(121, heads)
    found = recognise({"model": weights})
    backbone = make()
    with caplog.at_level("INFO", logger="aligndet"):
        fill_backbone(backbone, found, "file")
    table = backbone.features[3][0].attn.relative_position_bias_table.detach().view(13, 13, 2)
    torch.testing.assert_close(table, table[:, :1].expand_as(table))  # rows stay rows
    torch.testing.assert_close(table[..., 1], 2 * table[..., 0])  # heads stay heads
    # The middle of 11 rows is the middle of 13: (6 + 0.5) * 11 / 13 - 0.5 = 5
    assert table[6, 0, 0].item() == pytest.approx(5.0) and (table[:, 0, 0].diff() > 0).all()
    assert "8 tables of relative positions resized" in caplog.text


def test_another_size_is_refused() -> None:
    found = recognise({"model": official_weights()})
    with pytest.raises(WeightsError, match=r"do not fit swin_tiny \(official Swin layout\): .* of another shape"):
        fill_backbone(make(width=24), found, "file")
    deeper = official_weights() | {"layers.2.blocks.2.norm1.weight": torch.zeros(4 * WIDTH)}
    with pytest.raises(WeightsError, match="1 of 119 tensors too many: features.5.2.norm1.weight"):
        fill_backbone(make(), recognise(deeper), "file")


def test_settings_of_yacs_beside_the_weights_are_read_as_plain_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimMIM saves a `CfgNode`, whose class is not installed here."""
    module = ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "yacs", ModuleType("yacs"))
        context.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": official_weights(), "config": node(MODEL=node(TYPE="swin"))}, tmp_path / "simmim.pth")
    assert read_backbone(tmp_path / "simmim.pth").layout == "official Swin"
