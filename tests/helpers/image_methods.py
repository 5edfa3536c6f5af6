"""Inputs of the methods of `pretrain-image`, and the check that all of them have to pass."""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone, BackboneConfig, build_backbone
from aligndet_cli.pretrain_image.method import ImageMethod, View

BATCH, SIDE = 6, 32


def views(seed: int = 0, *, batch: int = BATCH, side: int = SIDE, dtype: torch.dtype = torch.float32) -> list[View]:
    """Two views of random pixels, whose crops overlap; every other one is flipped."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        pixels = torch.randn(batch, 3, side, side, generator=generator)
        top_left = torch.randint(0, 12, (batch, 2), generator=generator)
        corners = torch.cat([top_left, top_left + torch.randint(30, 40, (batch, 2), generator=generator)], dim=1)
        corners[::2] = corners[::2][:, [2, 1, 0, 3]]
        made.append(View(pixels.to(dtype), corners.to(dtype)))
    return made


def small_backbone(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    backbone = build_backbone(BackboneConfig(name="resnet18"))
    backbone.use_levels(("c5",))
    return backbone


def disturb_copies(method: ImageMethod) -> None:
    """Give the momentum copies weights of their own, so that a mix-up of the two sides is seen."""
    with torch.no_grad():
        for _, copied in method.copies():
            for parameter in copied.parameters():
                parameter.mul_(1 + 0.1 * torch.randn(1))


def assert_same_as_plain(
    method: ImageMethod, made: Sequence[View], loss_name: str, plain: Callable[[Sequence[View]], Tensor]
) -> None:
    """Compare the loss and all gradients, in double precision, with those of a plain implementation."""
    expected = plain(made)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    to_float = Tensor.float  # which keeps losses out of half precision, elsewhere
    with patch.object(Tensor, "float", lambda value: value if value.is_floating_point() else to_float(value)):
        losses, _ = method(made, None, with_health=False)
    assert losses.keys() == {loss_name}
    torch.testing.assert_close(losses[loss_name], expected, rtol=1e-6, atol=1e-8)
    losses[loss_name].backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-6, atol=1e-9, msg=name)


def perceptron(module: nn.Sequential, rows: Tensor) -> Tensor:
    """Linear layer, batch norm of the (N, C) rows, ReLU and linear layer, in single steps."""
    first, norm, _, last = module
    hidden = rows @ first.weight.T + first.bias
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + norm.eps).sqrt()
    hidden = (hidden * norm.weight + norm.bias).clamp(min=0)
    return hidden @ last.weight.T + last.bias
