"""DETR's transformer: it turns the cells of a feature map and learned queries into one vector per query.

Source: Vaswani et al., NeurIPS 2017, as changed by Carion et al., ECCV 2020, appendix A.3: positions are added to
queries and keys of every attention, and a norm follows each residual. Parameters are named as in the published weights
of facebookresearch/detr.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

POSITION_TEMPERATURE = 10_000.0  # the wavelengths run from 2 pi to 2 pi times this; appendix A.4


@dataclass(frozen=True)
class LayerSize:
    """Width, attention heads, inner width of the perceptron and dropout of every layer of the transformer."""

    dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float


class EncoderLayer(nn.Module):
    """Self-attention of the S cells of a map, then a two-layer perceptron; a norm after each residual."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(size.dim, size.num_heads, size.dropout, batch_first=True)
        self.linear1 = nn.Linear(size.dim, size.feedforward_dim)
        self.linear2 = nn.Linear(size.feedforward_dim, size.dim)
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, cells: Tensor, position: Tensor, is_padding: Tensor) -> Tensor:
        """Encode (B, S, C) cells with their (B, S, C) position encoding; (B, S) bool is True for padding."""
        placed = cells + position
        attended = self.self_attn(placed, placed, cells, key_padding_mask=is_padding, need_weights=False)[0]
        cells = self.norm1(cells + self.dropout(attended))
        inner = self.dropout(self.linear1(cells).relu())
        return self.norm2(cells + self.dropout(self.linear2(inner)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the cells, then a two-layer perceptron."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(size.dim, size.num_heads, size.dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(size.dim, size.num_heads, size.dropout, batch_first=True)
        self.linear1 = nn.Linear(size.dim, size.feedforward_dim)
        self.linear2 = nn.Linear(size.feedforward_dim, size.dim)
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.norm3 = nn.LayerNorm(size.dim)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, found: Tensor, queries: Tensor, cells: Tensor, placed: Tensor, is_padding: Tensor) -> Tensor:
        """Refine the states of the queries once.

        Args:
            found: (B, Q, C) states so far.
            queries: (Q, C) learned embeddings.
            cells: (B, S, C) encoded cells.
            placed: (B, S, C) encoded cells plus their position encoding.
            is_padding: (B, S) bool.
        """
        asking = found + queries
        attended = self.self_attn(asking, asking, found, need_weights=False)[0]
        found = self.norm1(found + self.dropout(attended))
        seen = self.multihead_attn(found + queries, placed, cells, key_padding_mask=is_padding, need_weights=False)[0]
        found = self.norm2(found + self.dropout(seen))
        inner = self.dropout(self.linear1(found).relu())
        return self.norm3(found + self.dropout(self.linear2(inner)))


class Encoder(nn.Module):
    """A stack of encoder layers, without a norm at the end."""

    def __init__(self, size: LayerSize, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(size) for _ in range(num_layers))

    def forward(self, cells: Tensor, position: Tensor, is_padding: Tensor) -> Tensor:
        """Return (B, S, C) encoded cells; arguments as in `EncoderLayer`."""
        for layer in self.layers:
            cells = layer(cells, position, is_padding)
        return cells


class Decoder(nn.Module):
    """A stack of decoder layers; the output of each goes through one common norm."""

    def __init__(self, size: LayerSize, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(size.dim)

    def forward(self, queries: Tensor, cells: Tensor, position: Tensor, is_padding: Tensor) -> Tensor:
        """Return the (L, B, Q, C) states of the (Q, C) queries after each layer, from (B, S, C) encoded cells."""
        placed, found = cells + position, queries.new_zeros(cells.shape[0], *queries.shape)
        outputs = []
        for layer in self.layers:
            found = layer(found, queries, cells, placed, is_padding)
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

    def forward(self, cells: Tensor, position: Tensor, is_padding: Tensor, queries: Tensor) -> Tensor:
        """Return the (L, B, Q, C) states of the (Q, C) queries; other arguments as in `EncoderLayer`."""
        encoded = self.encoder(cells, position, is_padding)
        return self.decoder(queries, encoded, position, is_padding)


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
