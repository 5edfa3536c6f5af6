"""The gradient of RoIAlign on a CPU equals torchvision's to the bit."""

import pytest
import torch
import torchvision.ops
from torch import Tensor

from aligndet_cli.detectors.parts.roi_gradient import roi_align

# B, C, H, W, stride
SHAPES = [(3, 16, 12, 17, 4), (2, 5, 7, 5, 32), (1, 3, 1, 1, 16), (2, 64, 24, 32, 8)]


def drawn_rois(num: int, num_images: int, height: int, width: int) -> Tensor:
    """RoIs within, across and outside of images; some without area or turned over."""
    corner = (torch.rand(num, 2) * 1.5 - 0.25) * torch.tensor([width, height])
    sides = torch.rand(num, 2) * torch.tensor([width, height])
    sides[: num // 8] = 0
    sides[num // 8 : num // 6] = -3
    return torch.cat([torch.randint(0, num_images, (num, 1)).float(), corner, corner + sides], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("size", "sampling_ratio", "aligned"), [(7, 0, True), (14, 0, True), (7, 2, False), (3, 0, False)]
)
def test_gradient(shape: tuple[int, ...], size: int, sampling_ratio: int, aligned: bool) -> None:
    torch.manual_seed(size)
    num_images, channels, height, width, stride = shape
    rois = drawn_rois(60, num_images, height * stride, width * stride)
    maps = torch.randn(num_images, channels, height, width).to(memory_format=torch.channels_last)
    upstream = torch.randn(60, channels, size, size)
    results = []
    for function in (roi_align, torchvision.ops.roi_align):
        leaf = maps.clone().requires_grad_()
        pooled = function(leaf, rois, size, 1 / stride, sampling_ratio, aligned)
        pooled.backward(upstream)
        results.append((pooled, leaf.grad))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert type(ours.grad_fn).__name__ == "_RoiAlignBackward" != type(theirs.grad_fn).__name__
    assert torch.equal(ours, theirs) and torch.equal(our_gradient, their_gradient)
    assert our_gradient.abs().sum() > 0


def test_no_rois_have_a_gradient_of_zeros() -> None:
    maps = torch.randn(2, 3, 4, 5, requires_grad=True)
    pooled = roi_align(maps, torch.zeros(0, 5), 7, 0.25, 0, True)
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 7, 7) and torch.equal(maps.grad, torch.zeros(2, 3, 4, 5))


def test_without_a_gradient_and_in_a_trace_it_is_torchvisions() -> None:
    maps, rois = torch.randn(1, 3, 4, 5), torch.tensor([[0.0, 1, 2, 9, 12]])
    assert roi_align(maps, rois, 7, 0.25, 0, True).grad_fn is None
    with torch.no_grad():
        assert roi_align(maps.requires_grad_(), rois, 7, 0.25, 0, True).grad_fn is None
    compiled = torch.compile(lambda maps: roi_align(maps, rois, 7, 0.25, 0, True), backend="eager", fullgraph=True)
    assert torch.equal(compiled(maps), roi_align(maps, rois, 7, 0.25, 0, True))
