"""DETR's transformer equals a composition of PyTorch's own layers, with norms after the residuals and before them."""

import pytest
import torch

from aligndet_cli.detectors.parts.transformer import LayerSize, Transformer, encode_position
from helpers.plain_transformer import compose

DIM, HEADS, INNER = 16, 4, 24


@pytest.mark.parametrize("pre_norm", [False, True])
def test_it_equals_pytorchs_layers(pre_norm: bool) -> None:
    torch.manual_seed(3)
    ours = Transformer(LayerSize(DIM, HEADS, INNER, dropout=0.0, pre_norm=pre_norm), 2, 3)
    with torch.no_grad():
        for parameter in ours.parameters():  # norms and biases that differ from layer to layer
            parameter.add_(torch.randn_like(parameter) * 0.1)
    is_inside = torch.ones(2, 3, 5, dtype=torch.bool)
    is_inside[1, 2:] = is_inside[1, :, 3:] = False
    position, is_padding = encode_position(is_inside, DIM).flatten(1, 2), ~is_inside.flatten(1)
    cells = torch.randn(2, 15, DIM, requires_grad=True)
    queries = torch.randn(7, DIM)
    found = ours(cells, position, is_padding, queries)
    expected = compose(ours.state_dict(), cells, position, is_padding, queries, heads=HEADS)
    assert found.shape == (3, 2, 7, DIM)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = torch.randn_like(found)
    ours_back, expected_back = (torch.autograd.grad((one * weights).sum(), cells)[0] for one in (found, expected))
    torch.testing.assert_close(ours_back, expected_back, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[2])


def test_only_pre_norm_has_a_norm_after_the_encoder() -> None:
    names = {
        pre_norm: Transformer(LayerSize(DIM, HEADS, INNER, 0.1, pre_norm), 1, 1).state_dict().keys()
        for pre_norm in (False, True)
    }
    assert names[True] - names[False] == {"encoder.norm.weight", "encoder.norm.bias"}
    assert names[False] <= names[True]
