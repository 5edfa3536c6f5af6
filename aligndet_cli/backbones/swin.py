"""Swin transformers as feature extractors, from torchvision's parts.

Source: Liu et al., ICCV 2021; the wrapping follows mmdetection's Swin: the image is padded to whole patches at the
bottom and the right, each map has its own layer norm, and a patch merging is frozen with the stage before it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from aligndet_cli.backbones.interface import StagedBackbone

PATCH = 4
WINDOW = 7


class Size(NamedTuple):
    """Width after the patch embedding, and blocks and attention heads per stage."""

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


SIZES = {
    "swin_t": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),  # not among torchvision's
}


class Swin(StagedBackbone):
    """Body of a Swin transformer; its state dict has torchvision's keys without `head`, and `norm0` to `norm2`.

    The norm of c5 is the norm before torchvision's classifier, with its trained weights if a file has them;
    mmdetection starts all four norms anew.
    """

    family = "swin"
    classifier = "head"
    additions = ("norm0.", "norm1.", "norm2.")

    def __init__(self, body: TorchvisionSwin, name: str, *, recompute: bool = False) -> None:
        width = body.norm.normalized_shape[0]
        super().__init__(name, {"c2": width // 8, "c3": width // 4, "c4": width // 2, "c5": width})
        self.features = body.features
        self.norm0 = nn.LayerNorm(width // 8)
        self.norm1 = nn.LayerNorm(width // 4)
        self.norm2 = nn.LayerNorm(width // 2)
        self.norm = body.norm
        self.recompute = recompute

    def begin(self, pixels: Tensor) -> Tensor:
        """Return the embedded patches (B, C, H/4, W/4)."""
        height, width = pixels.shape[-2:]
        patches: Tensor = self.features[0](pad(pixels, (0, -width % PATCH, 0, -height % PATCH)))  # (B, H/4, W/4, C)
        return patches.permute(0, 3, 1, 2)

    def run_stage(self, place: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of the blocks (B, C, H, W) under its norm, and merged for the next; channels last both."""
        tokens = hidden.permute(0, 2, 3, 1)
        for block in self.features[2 * place + 1]:
            tokens = self._run(block, tokens)
        one = self._norms()[place](tokens).permute(0, 3, 1, 2)
        if place < len(self.channels) - 1:
            tokens = self.features[2 * place + 2](tokens)  # patch merging; it pads odd sizes
        return one, tokens.permute(0, 3, 1, 2)

    def input_width(self, place: int) -> int:
        """Return the width of the stage itself: a patch merging belongs to the stage before."""
        return list(self.channels.values())[place]

    def stem(self) -> list[nn.Module]:
        """Return the patch embedding."""
        return [self.features[0]]

    def stages(self) -> list[list[nn.Module]]:
        """Return the blocks and norm of each level, with the patch merging that follows."""
        norms = self._norms()
        return [[norms[place], *self.features[2 * place + 1 : 2 * place + 3]] for place in range(len(norms))]

    def only_for(self, level: str) -> list[nn.Module]:
        """Return the norm of c2, c3 or c4, which no other level sees."""
        return [] if level == "c5" else [dict(zip(self.channels, self._norms(), strict=True))[level]]

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run a block on (B, H, W, C) tokens; with `recompute` the backward pass runs it again, and keeps no more."""
        if self.recompute and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, tokens, use_reentrant=False)
            return again
        result: Tensor = block(tokens)
        return result

    def _norms(self) -> list[nn.LayerNorm]:
        return [self.norm0, self.norm1, self.norm2, self.norm]


def build_swin(name: str, *, drop_path: float, recompute: bool = False) -> Swin:
    """Build a Swin transformer with torchvision's initial weights (truncated normal of 0.02).

    `drop_path` is the probability that the last block is left out for an image in training; it grows linearly from 0.
    `recompute` keeps only what lies between blocks for the backward pass.
    """
    size = SIZES[name]
    body = TorchvisionSwin(
        patch_size=[PATCH, PATCH],
        embed_dim=size.width,
        depths=list(size.depths),
        num_heads=list(size.num_heads),
        window_size=[WINDOW, WINDOW],
        stochastic_depth_prob=drop_path,
    )
    return Swin(body, name, recompute=recompute)
