"""DETR's transformer as a composition of PyTorch's own layers."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


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


def compose(
    tensors: Mapping[str, Tensor], cells: Tensor, position: Tensor, is_padding: Tensor, queries: Tensor, *, heads: int
) -> Tensor:
    """The (L, B, Q, C) states after each layer of the decoder.

    Args:
        tensors: weights by the names of facebookresearch/detr, without `transformer.`; norms come first if there is one
            after the encoder.
        cells, position, is_padding, queries: as `Transformer` takes them.
    """

    def own(part: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}

    dim, inner = cells.shape[-1], len(tensors["encoder.layers.0.linear1.weight"])
    last = own("encoder.norm")
    options = {"dim_feedforward": inner, "dropout": 0.0, "batch_first": True, "norm_first": bool(last)}
    number = 0
    while weights := own(f"encoder.layers.{number}"):
        layer = PlacedEncoderLayer(dim, heads, **options)
        layer.load_state_dict(weights)
        layer.position = position
        cells = layer(cells, src_key_padding_mask=is_padding)
        number += 1
    cells = layer_norm(cells, (dim,), last["weight"], last["bias"]) if last else cells
    norm = own("decoder.norm")
    states = torch.zeros(len(cells), *queries.shape)
    outputs: list[Tensor] = []
    while weights := own(f"decoder.layers.{len(outputs)}"):
        layer = PlacedDecoderLayer(dim, heads, **options)
        layer.load_state_dict(weights)
        layer.queries, layer.position = queries, position
        states = layer(states, cells, memory_key_padding_mask=is_padding)
        outputs.append(layer_norm(states, (dim,), norm["weight"], norm["bias"]))
    return torch.stack(outputs)
