"""Plain vision transformers, whose blocks all work at one stride, as feature extractors.

Source: Li et al., "Exploring Plain Vision Transformer Backbones", ECCV 2022 (ViTDet): the maps of all levels come from
the last one alone. Theirs are made by deconvolutions, which pre-training here would keep as random as they start, since
a backbone stays as it is; ours are resampled, and the neck, which is trained, mixes their channels.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from aligndet_cli.backbones.interface import STRIDES, Backbone, crop_maps, pad_to_strides

PATCHES = (14, 16)  # pixels


class PlainViT(Backbone):
    """Body of a vision transformer of timm, with its last norm; its tensors have the names that they have there.

    Positions are interpolated to the size of the image. Images for patches of 14 pixels are made smaller by 14/16, so
    that the cells of c4 are at stride 16 of the image as it came.
    """

    family = "timm"
    classifier = "classifier"

    def __init__(self, body: Any, name: str) -> None:
        super().__init__(name, dict.fromkeys(STRIDES, body.embed_dim))
        self.body = body
        self._patch = body.patch_embed.patch_size[0]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the levels in use (B, C, H, W); see `Backbone.forward`."""
        padded = self.own_input(pad_to_strides(pixels))
        if self._patch != STRIDES["c4"]:
            height, width = (side // STRIDES["c4"] * self._patch for side in padded.shape[-2:])
            padded = interpolate(padded, (height, width), mode="bilinear")
        (last,) = self.body.forward_intermediates(
            padded, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return crop_maps({level: resample(last, level) for level in self._levels}, pixels)

    def stem(self) -> list[nn.Module]:
        """Return the patch embedding, the positions and further tokens, and all else before the blocks."""
        tokens = nn.ParameterList(parameter for _, parameter in self.body.named_parameters(recurse=False))
        return [tokens, *(part for name, part in self.body.named_children() if name not in ("blocks", "norm"))]

    def stages(self) -> list[list[nn.Module]]:
        """Return the blocks in four equal parts, the last with the norm."""
        blocks = list(self.body.blocks)
        cuts = [len(blocks) * part // 4 for part in range(5)]
        parts: list[list[nn.Module]] = [blocks[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        return [*parts[:3], [*parts[3], self.body.norm]]

    def layers(self) -> list[list[nn.Module]]:
        """Return what is before the blocks, and each block; not the last norm.

        Source: detectron2's `get_vit_lr_decay_rate`; the tokens, which ViTDet has none of, go with the positions, as in
        BEiT.
        """
        return [self.stem(), *([block] for block in self.body.blocks)]


def resample(last: Tensor, level: str) -> Tensor:
    """Return the map of a level (B, C, H', W') from the map at stride 16 (B, C, H, W)."""
    if level == "c5":
        return max_pool2d(last, 2)
    scale = STRIDES["c4"] // STRIDES[level]
    return last if scale == 1 else interpolate(last, scale_factor=float(scale), mode="bilinear")


def nearest_size(by_size: Mapping[int, float], num_blocks: int) -> float:
    """Return the value for the published size, by its number of blocks, that a ViT is nearest to."""
    return by_size[min(by_size, key=lambda known: abs(known - num_blocks))]
