"""DETR's transformer equals a composition of PyTorch's own layers, with norms after the residuals and before them."""

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.detectors.parts.transformer import LayerSize, Transformer, encode_position

DIM, HEADS, INNER = 16, 4, 24


class PlacedEncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's layer, with the position of the cells in queries and keys."""

    position: Tensor

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        placed = x + self.position
        return self.self_attn(placed, placed, x, key_padding_mask=key_padding_mask, need_weights=False)[0]


class PlacedDecoderLayer(nn.TransformerDecoderLayer):
    """PyTorch's layer, with the queries' embeddings and the position of the cells."""

    queries: Tensor
    position: Tensor

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        asking = x + self.queries
        return self.self_attn(asking, asking, x, need_weights=False)[0]

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        mask = {"key_padding_mask": key_padding_mask}
        return self.multihead_attn(x + self.queries, mem + self.position, mem, **mask, need_weights=False)[0]


def composed(ours: Transformer, cells: Tensor, position: Tensor, is_padding: Tensor, queries: Tensor) -> Tensor:
    """The states after each layer of PyTorch's layers that have the weights of `ours`."""
    sizes = {"d_model": DIM, "nhead": HEADS, "dim_feedforward": INNER, "batch_first": True}
    sizes |= {"dropout": 0.0, "norm_first": ours.encoder.layers[0].pre_norm}
    for layer in ours.encoder.layers:
        own = PlacedEncoderLayer(**sizes)
        own.load_state_dict(layer.state_dict())
        own.position = position
        cells = own(cells, src_key_padding_mask=is_padding)
    if sizes["norm_first"]:
        weights = ours.encoder.norm.state_dict().values()
        cells = nn.functional.layer_norm(cells, (DIM,), *weights)
    states = torch.zeros(len(cells), *queries.shape, dtype=queries.dtype)
    outputs = []
    for layer in ours.decoder.layers:
        own = PlacedDecoderLayer(**sizes)
        own.load_state_dict(layer.state_dict())
        own.queries, own.position = queries, position
        states = own(states, cells, memory_key_padding_mask=is_padding)
        outputs.append(nn.functional.layer_norm(states, (DIM,), *ours.decoder.norm.state_dict().values()))
    return torch.stack(outputs)


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
    expected = composed(ours, cells, position, is_padding, queries)
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
