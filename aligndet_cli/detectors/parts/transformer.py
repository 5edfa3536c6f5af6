"""DETR's transformer: it turns the cells of a feature map and learned queries into one vector per query.

Source: Vaswani et al., NeurIPS 2017, as changed by Carion et al., ECCV 2020, appendix A.3: positions are added to
queries and keys of every attention. A norm follows each residual, or with `pre_norm` comes before each branch, as in
UP-DETR and DETReg. Parameters are named as in the published weights of facebookresearch/detr.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

POSITION_TEMPERATURE = 10_000.0  # the wavelengths run from 2 pi to 2 pi times this; appendix A.4


@dataclass(frozen=True)
class LayerSize:
    """Shape of every layer of the transformer.

    Attributes:
        dim: width.
        feedforward_dim: inner width of the perceptron.
        dropout: rate.
        pre_norm: norms come before attention and perceptron, not after the sum with their input.
    """

    dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    pre_norm: bool = False


class Layer(nn.Module):
    """Base of the layers: each adds its attention, perceptron (`linear1`, `linear2`) and norms."""

    linear1: nn.Linear
    linear2: nn.Linear

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.pre_norm = size.pre_norm
        self.dropout = nn.Dropout(size.dropout)

    def add(self, states: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.LayerNorm) -> Tensor:
        """Return (B, S, C) states plus what a branch makes of them."""
        if self.pre_norm:
            return states + self.dropout(branch(norm(states)))
        summed: Tensor = norm(states + self.dropout(branch(states)))
        return summed

    def perceptron(self, states: Tensor) -> Tensor:
        """Transform (B, S, C) states one by one."""
        transformed: Tensor = self.linear2(self.dropout(self.linear1(states).relu()))
        return transformed


class EncoderLayer(Layer):
    """Self-attention of the S cells of a map, then a two-layer perceptron."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__(size)
        self.self_attn = nn.MultiheadAttention(size.dim, size.num_heads, size.dropout, batch_first=True)
        self.linear1 = nn.Linear(size.dim, size.feedforward_dim)
        self.linear2 = nn.Linear(size.feedforward_dim, size.dim)
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)

    def forward(self, cells: Tensor, position: Tensor, is_padding: Tensor) -> Tensor:
        """Encode (B, S, C) cells with their (B, S, C) position encoding; (B, S) bool is True for padding."""

        def attend(x: Tensor) -> Tensor:
            placed = x + position
            return self.self_attn(placed, placed, x, key_padding_mask=is_padding, need_weights=False)[0]

        return self.add(self.add(cells, attend, self.norm1), self.perceptron, self.norm2)


class DecoderLayer(Layer):
    """Self-attention of the queries, attention to the cells, then a two-layer perceptron."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__(size)
        self.self_attn = nn.MultiheadAttention(size.dim, size.num_heads, size.dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(size.dim, size.num_heads, size.dropout, batch_first=True)
        self.linear1 = nn.Linear(size.dim, size.feedforward_dim)
        self.linear2 = nn.Linear(size.feedforward_dim, size.dim)
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.norm3 = nn.LayerNorm(size.dim)

    def forward(
        self,
        found: Tensor,
        queries: Tensor,
        cells: Tensor,
        placed: Tensor,
        is_padding: Tensor,
        blocked: Tensor | None = None,
    ) -> Tensor:
        """Refine the states of the queries once.

        Args:
            found: (B, Q, C) states so far.
            queries: (Q, C) learned embeddings, or (B, Q, C) of each image by itself.
            cells: (B, S, C) encoded cells.
            placed: (B, S, C) encoded cells plus their position encoding.
            is_padding: (B, S) bool.
            blocked: (Q, Q) bool, True where two queries must not see each other.
        """

        def ask(x: Tensor) -> Tensor:
            asking = x + queries
            return self.self_attn(asking, asking, x, attn_mask=blocked, need_weights=False)[0]

        def look(x: Tensor) -> Tensor:
            return self.multihead_attn(x + queries, placed, cells, key_padding_mask=is_padding, need_weights=False)[0]

        found = self.add(self.add(found, ask, self.norm1), look, self.norm2)
        return self.add(found, self.perceptron, self.norm3)


class Encoder(nn.Module):
    """A stack of encoder layers, with a norm at the end if theirs come first."""

    def __init__(self, size: LayerSize, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(size.dim) if size.pre_norm else nn.Identity()

    def forward(self, cells: Tensor, position: Tensor, is_padding: Tensor) -> Tensor:
        """Return (B, S, C) encoded cells; arguments as in `EncoderLayer`."""
        for layer in self.layers:
            cells = layer(cells, position, is_padding)
        encoded: Tensor = self.norm(cells)
        return encoded


class Decoder(nn.Module):
    """A stack of decoder layers; the output of each goes through one common norm."""

    def __init__(self, size: LayerSize, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(size.dim)

    def forward(
        self, queries: Tensor, cells: Tensor, position: Tensor, is_padding: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        """Return the (L, B, Q, C) states of the queries after each layer, from (B, S, C) encoded cells.

        `queries` and `blocked` are as in `DecoderLayer`.
        """
        placed, found = cells + position, queries.new_zeros(cells.shape[0], *queries.shape[-2:])
        outputs = []
        for layer in self.layers:
            found = layer(found, queries, cells, placed, is_padding, blocked)
            outputs.append(self.norm(found))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Encoder and decoder."""

    def __init__(self, size: LayerSize, encoder_layers: int, decoder_layers: int) -> None:
        super().__init__()
        self.encoder = Encoder(size, encoder_layers)
        self.decoder = Decoder(size, decoder_layers)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, cells: Tensor, position: Tensor, is_padding: Tensor, queries: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        """Return the (L, B, Q, C) states of the queries; arguments as in `EncoderLayer` and `DecoderLayer`."""
        encoded = self.encoder(cells, position, is_padding)
        return self.decoder(queries, encoded, position, is_padding, blocked)


def encode_position(is_inside: Tensor, dim: int) -> Tensor:
    """Return (B, H, W, dim) sines and cosines of the position of each cell; images count as 2 pi high and wide.

    Args:
        is_inside: (B, H, W) bool, False on padding.
        dim: number of channels; the first half is for y.

    Source: facebookresearch/detr `PositionEmbeddingSine(normalize=True)`.
    """
    half = dim // 2
    step = torch.arange(half, device=is_inside.device)
    wavelength = POSITION_TEMPERATURE ** (2 * (step // 2) / half)  # (dim / 2,)
    parts = []
    for axis in (1, 2):
        place = is_inside.cumsum(axis, dtype=torch.float32)
        place = place / (place.narrow(axis, place.shape[axis] - 1, 1) + 1e-6) * (2 * math.pi)
        angle = place[..., None] / wavelength
        parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2))
    return torch.cat(parts, dim=-1)
