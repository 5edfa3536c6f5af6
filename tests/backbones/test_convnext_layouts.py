"""Published ConvNeXt weights against a second implementation of the authors' network, made from its names."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from torchvision.models import ConvNeXt as TorchvisionConvNeXt
from torchvision.models.convnext import CNBlockConfig

from aligndet_cli.backbones.convnext import ConvNeXt
from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.backbones.weights import fill_backbone
from aligndet_cli.errors import WeightsError
from helpers.renaming import Tensors, renamed

WIDTHS, DEPTHS = (8, 16, 24, 40), (2, 1, 3, 1)


def make() -> ConvNeXt:
    torch.manual_seed(3)
    sizes = [CNBlockConfig(*one) for one in zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)]
    return ConvNeXt(TorchvisionConvNeXt(sizes), "convnext_small").eval()


def official_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as in the official repository, written down, not derived from torchvision's."""
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        # The stem's norm is behind its convolution, that of the other steps before it.
        at, before = f"downsample_layers.{stage}", WIDTHS[stage - 1]
        conv, norm = ("0", "1") if stage == 0 else ("1", "0")
        yield f"{at}.{conv}.weight", (width, 3, 4, 4) if stage == 0 else (width, before, 2, 2)
        yield f"{at}.{conv}.bias", (width,)
        yield from ((f"{at}.{norm}.{kind}", (before if stage else width,)) for kind in ("weight", "bias"))
        for block in range(depth):
            at = f"stages.{stage}.{block}"
            yield from ((f"{at}.gamma", (width,)), (f"{at}.dwconv.weight", (width, 1, 7, 7)))
            yield from ((f"{at}.{name}.bias", (width,)) for name in ("dwconv", "norm", "pwconv2"))
            yield from ((f"{at}.norm.weight", (width,)), (f"{at}.pwconv1.weight", (4 * width, width)))
            yield from ((f"{at}.pwconv1.bias", (4 * width,)), (f"{at}.pwconv2.weight", (width, 4 * width)))
    yield from (("norm.weight", (WIDTHS[3],)), ("norm.bias", (WIDTHS[3],)))
    yield from (("head.weight", (1000, WIDTHS[3])), ("head.bias", (1000,)))


def official_weights() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in official_shapes()}


def norm(x: Tensor, weights: Tensors, at: str) -> Tensor:
    return layer_norm(x, x.shape[-1:], weights[f"{at}.weight"], weights[f"{at}.bias"], eps=1e-6)


def conv(x: Tensor, weights: Tensors, at: str, **options: int) -> Tensor:
    """Convolve a map (H, W, C)."""
    convolved = conv2d(x.permute(2, 0, 1)[None], weights[f"{at}.weight"], weights[f"{at}.bias"], **options)
    return convolved[0].permute(1, 2, 0)


def reference(weights: Tensors, pixels: Tensor) -> list[Tensor]:
    """Outputs of the four stages (C, H, W) of one image (3, H, W), by the official network's own names."""
    x, maps = pixels.permute(1, 2, 0), []
    for stage, depth in enumerate(DEPTHS):
        at = f"downsample_layers.{stage}"
        if stage == 0:
            x = norm(conv(x, weights, f"{at}.0", stride=4), weights, f"{at}.1")
        else:
            x = conv(norm(x, weights, f"{at}.0"), weights, f"{at}.1", stride=2)
        for block in range(depth):
            at = f"stages.{stage}.{block}"
            mixed = norm(conv(x, weights, f"{at}.dwconv", padding=3, groups=x.shape[2]), weights, f"{at}.norm")
            hidden = gelu(linear(mixed, weights[f"{at}.pwconv1.weight"], weights[f"{at}.pwconv1.bias"]))
            out = linear(hidden, weights[f"{at}.pwconv2.weight"], weights[f"{at}.pwconv2.bias"])
            x = x + weights[f"{at}.gamma"] * out
        maps.append(layer_norm(x, x.shape[-1:], eps=1e-6).permute(2, 0, 1))
    return maps


def as_timm(weights: Tensors) -> Tensors:
    steps = [
        ("downsample_layers.0.", "stem."),
        *((f"downsample_layers.{i}.", f"steps.{i}.downsample.") for i in (1, 2, 3)),
    ]
    blocks = [(f"stages.{i}.", f"stages.{i}.blocks.") for i in range(4)]
    layers = [("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2"), ("steps.", "stages.")]
    new = renamed(weights, *steps, *blocks, *layers, ("head.", "head.fc."))
    return {f"head.{name}" if name.startswith("norm.") else name: value for name, value in new.items()}


def as_mmdetection(weights: Tensors) -> Tensors:
    """Return a detector's file, whose norms of the levels are trained: 2 in all places."""
    names = (("dwconv", "depthwise_conv"), ("pwconv1", "pointwise_conv1"), ("pwconv2", "pointwise_conv2"))
    body = {name: value for name, value in weights.items() if not name.startswith(("norm", "head"))}
    body |= {f"norm{i}.{kind}": torch.full((WIDTHS[i],), 2.0) for i in range(4) for kind in ("weight", "bias")}
    return {f"backbone.{name}": value for name, value in renamed(body, *names).items()} | {"neck.x": torch.zeros(1)}


# Per layout: how its files are made, and whether an ImageNet classifier is in them.
LAYOUTS: dict[str, tuple[Callable[[Tensors], dict], bool]] = {
    "official ConvNeXt": (lambda w: {"model": w}, True),
    "timm": (as_timm, True),
    "mmdetection": (lambda w: {"meta": {"epoch": 36}, "state_dict": as_mmdetection(w)}, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_published_network(layout: str) -> None:
    wrap, is_supervised = LAYOUTS[layout]
    weights = official_weights()
    found = recognise(wrap(weights))
    assert found is not None and (found.layout, found.family) == (layout, "convnext")
    assert found.is_supervised == is_supervised
    backbone = make()
    fill_backbone(backbone, found, Path("file"))
    pixels = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        maps = backbone(pixels[None])
        for one, expected in zip(maps.values(), reference(weights, pixels), strict=True):
            # Norms of the levels are in detectors' files only.
            torch.testing.assert_close(
                one[0], 2 * expected + 2 if layout == "mmdetection" else expected, rtol=1e-4, atol=1e-5
            )


def test_torchvisions_own_names_are_taken_as_they_are() -> None:
    source, backbone = make(), make()
    with torch.no_grad():
        for value in source.parameters():
            value.add_(1)
    found = recognise({**source.torchvision_state(), "classifier.2.weight": torch.zeros(1000, 40)})
    assert found is not None and (found.layout, found.is_supervised, found.num_others) == ("torchvision", True, 1)
    fill_backbone(backbone, found, Path("file"))
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in source.torchvision_state().items())
    assert all(bool((one.weight == 1).all()) for one in (backbone.norm0, backbone.norm3))  # fresh


def test_version_2_is_refused_with_what_is_missing() -> None:
    weights = {name.replace(".gamma", ".grn.gamma"): value for name, value in official_weights().items()}
    found = recognise({"model": weights})
    assert found is not None
    with pytest.raises(WeightsError, match="7 of .* tensors missing: features.1.0.layer_scale, "):
        fill_backbone(make(), found, Path("file"))
