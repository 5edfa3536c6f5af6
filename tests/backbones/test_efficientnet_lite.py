"""EfficientNet-Lite against a second implementation of the published network, made from the names of its tensors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, pad, relu6

from aligndet_cli.backbones import Backbone, BackboneConfig, build_backbone
from aligndet_cli.backbones.efficientnet_lite import SameConv2d
from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.backbones.weights import fill_backbone
from aligndet_cli.data.transforms import normalise
from aligndet_cli.detectors.checkpoint import DetectorFile, read_detector, write_detector
from helpers.small_detectors import NARROW

Tensors = dict[str, Tensor]
# Of Lite0, by block: width, kernel, stride. The first has no expansion, the others six channels for one.
BLOCKS = (
    *((16, 3, 1), (24, 3, 2), (24, 3, 1), (40, 5, 2), (40, 5, 1), (80, 3, 2), (80, 3, 1), (80, 3, 1)),
    *((112, 5, 1), (112, 5, 1), (112, 5, 1), (192, 5, 2), (192, 5, 1), (192, 5, 1), (192, 5, 1), (320, 3, 1)),
)
LAST_OF_LEVEL = {"c2": 2, "c3": 4, "c4": 10}


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig.model_validate({"name": name})).eval()


@pytest.fixture(scope="module")
def weights() -> Tensors:
    """Tensors by their names in the original files, whose shapes are written down and not derived from ours."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}

    def add(conv: str, norm: str, shape: tuple[int, ...]) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        tensors[f"{conv}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        for kind, start, spread in (
            ("weight", 1, 0.1),
            ("bias", 0, 0.1),
            ("running_mean", 0, 0.1),
            ("running_var", 1, 0),
        ):
            tensors[f"{norm}.{kind}"] = start + spread * torch.randn(shape[0], generator=generator)
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("_conv_stem", "_bn0", (32, 3, 3, 3))
    before = 32
    for number, (width, kernel, _) in enumerate(BLOCKS):
        at, inner = f"_blocks.{number}", before * (6 if number else 1)
        if number:
            add(f"{at}._expand_conv", f"{at}._bn0", (inner, before, 1, 1))
        add(f"{at}._depthwise_conv", f"{at}._bn1", (inner, 1, kernel, kernel))
        add(f"{at}._project_conv", f"{at}._bn2", (width, inner, 1, 1))
        before = width
    add("_conv_head", "_bn1", (1280, 320, 1, 1))
    return tensors | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def same(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's `SAME`: zeros before and after a side."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def convolve(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    kernel = weight.shape[-1]
    zeros = (*same(x.shape[-1], kernel, stride), *same(x.shape[-2], kernel, stride))
    return conv2d(pad(x, zeros), weight, stride=stride, groups=groups)


def norm(x: Tensor, tensors: Tensors, at: str) -> Tensor:
    of = (tensors[f"{at}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
    return batch_norm(x, *of, eps=1e-3)


def reference(tensors: Tensors, image: Tensor) -> Tensors:
    """Maps of an image (3, H, W) uint8, whose input is (value - 127) / 128."""
    x = relu6(norm(convolve((image[None].float() - 127) / 128, tensors["_conv_stem.weight"], 2), tensors, "_bn0"))
    maps = {}
    for number, (width, _, stride) in enumerate(BLOCKS):
        at, start = f"_blocks.{number}", x
        if number:
            x = relu6(norm(convolve(x, tensors[f"{at}._expand_conv.weight"], 1), tensors, f"{at}._bn0"))
        x = convolve(x, tensors[f"{at}._depthwise_conv.weight"], stride, groups=x.shape[1])
        x = convolve(relu6(norm(x, tensors, f"{at}._bn1")), tensors[f"{at}._project_conv.weight"], 1)
        x = norm(x, tensors, f"{at}._bn2")
        x = x + start if stride == 1 and start.shape[1] == width else x
        maps |= {level: x for level, last in LAST_OF_LEVEL.items() if last == number}
    return maps | {"c5": relu6(norm(convolve(x, tensors["_conv_head.weight"], 1), tensors, "_bn1"))}


@pytest.mark.parametrize("size_hw", [(64, 96), (61, 83), (33, 50), (96, 47), (31, 32)])
def test_features_are_those_of_the_published_network(weights: Tensors, size_hw: tuple[int, int]) -> None:
    found = recognise(weights)
    assert found is not None and (found.layout, found.num_others) == ("original EfficientNet-Lite", 2)
    assert found.is_supervised
    backbone = build("efficientnet_lite0")
    fill_backbone(backbone, found, Path("file"))
    image = torch.randint(256, (3, *size_hw), generator=torch.Generator().manual_seed(1)).byte()
    with torch.inference_mode():
        maps, expected = backbone(normalise(image)[None]), reference(weights, image)
    assert maps.keys() == expected.keys()
    for level, one in maps.items():
        torch.testing.assert_close(one, expected[level], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "kernel", "zeros"), [(8, 3, (0, 1)), (7, 3, (1, 1)), (8, 5, (1, 2)), (7, 5, (2, 2)), (1, 3, (1, 1))]
)
def test_padding_is_tensorflows(side: int, kernel: int, zeros: tuple[int, int]) -> None:
    conv = SameConv2d(1, 1, kernel, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    counts = conv(torch.ones(1, 1, side, side))[0, 0, 0]  # the cells of the image that each window covers
    rows = kernel - zeros[0]  # of the first window
    starts = [2 * place - zeros[0] for place in range(-(-side // 2))]
    assert starts[-1] + kernel == side + zeros[1]
    covered = [min(start + kernel, side) - max(start, 0) for start in starts]
    assert counts.tolist() == [min(rows, side) * one for one in covered]


def test_the_input_of_the_network_is_in_every_file(weights: Tensors, tmp_path: Path) -> None:
    config = BackboneConfig(name="efficientnet_lite0", weights="none")
    model = NARROW["retinanet"].build(build_backbone(config), 3)
    content = DetectorFile("finetune", NARROW["retinanet"], config, (), (64, 64), model.state_dict())
    write_detector(tmp_path / "weights.pt", content)
    state = read_detector(tmp_path / "weights.pt").state_dict
    torch.testing.assert_close(state["backbone.mean"], torch.full((3,), 127 / 255))
    torch.testing.assert_close(state["backbone.std"], torch.full((3,), 128 / 255))
    assert not {"mean", "std"} & set(build("mobilenet_v2").state_dict())  # ImageNet's


def test_an_efficientnet_with_the_same_names_is_none_of_these(weights: Tensors) -> None:
    assert recognise(weights | {"_blocks.0._se_reduce.weight": torch.zeros(8, 32, 1, 1)}) is None


@pytest.mark.parametrize("name", ["efficientnet_lite2", "efficientnet_b0", "efficientnet_v2_s"])
def test_own_files_are_told_apart(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig.model_validate({"name": name}))
    found = recognise(backbone.torchvision_state())
    assert found is not None and found.family == backbone.family
    assert found.tensors.keys() == backbone.torchvision_state().keys()
    assert not {"mean", "std"} & found.tensors.keys()
