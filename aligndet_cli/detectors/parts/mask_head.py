"""Masks: the head that draws them in a small grid, what it is trained on, and the way back to pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample
from torchvision.ops import Conv2dNormActivation, roi_align

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.fpn import NormName, norm_layer
from aligndet_cli.detectors.parts.roi_head import RoiSamples, kaiming_convs

THRESHOLD = 0.5


class MaskHead(nn.Module):
    """Convolutions on a pooled RoI, and a transposed one that doubles its resolution.

    Source: He et al., ICCV 2017; mmdetection `FCNMaskHead`, its initial weights included.

    Args:
        channels: width of the pyramid and of all convolutions.
        num_convs: how many, before the transposed one.
        norm: norm after each of these, in place of its bias.
        pool_size: rows and columns of a pooled RoI; masks have twice as many.
    """

    def __init__(self, channels: int, num_convs: int, norm: NormName, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        convs = [Conv2dNormActivation(channels, channels, norm_layer=norm_layer(norm)) for _ in range(num_convs)]
        self.convs = nn.Sequential(*convs)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        kaiming_convs(self)

    def forward(self, pooled: Tensor) -> Tensor:
        """(S, C, size, size) pooled RoIs -> (S, C, 2 size, 2 size)."""
        return self.upsample(self.convs(pooled)).relu()


def predict_masks(predictor: nn.Conv2d, features: Tensor, class_ids: Tensor) -> Tensor:
    """(S, M, M) float32 logits of the mask of one class per RoI; the K - 1 others are not computed.

    Args:
        predictor: 1x1 convolution to K masks.
        features: (S, C, M, M) of `MaskHead`.
        class_ids: (S,) int64.
    """
    assert predictor.bias is not None
    weights = predictor.weight.flatten(1)[class_ids]  # (S, C)
    logits = torch.bmm(weights[:, None], features.flatten(2)).float() + predictor.bias[class_ids, None, None]
    return logits.view(len(features), *features.shape[2:])


def mask_loss(logits: Tensor, true_masks: Tensor, is_known: Tensor) -> Tensor:
    """Mean cross-entropy of (S, M, M) logits over the RoIs whose box has a mask; 0 if there are none.

    Args:
        logits: of positive RoIs.
        true_masks, is_known: see `draw_targets`.
    """
    loss = binary_cross_entropy_with_logits(logits, true_masks.float(), reduction="none").flatten(1).mean(dim=1)
    return (loss * is_known).sum() / is_known.sum().clamp(min=1)


@torch.no_grad()
def draw_targets(positives: RoiSamples, targets: Sequence[BoxTargets], size: int) -> tuple[Tensor, Tensor]:
    """What the masks of positive RoIs should look like.

    Source: mmdetection `mask_target` and `BitmapMasks.crop_and_resize`.

    Args:
        positives: RoIs with a matched box.
        targets: their masks are all False for boxes without one, and None in images without any.
        size: M, rows and columns of the result.

    Returns:
        (S, M, M) bool, and (S,) bool: whether the box has a mask. One without any pixel is taken for missing.
    """
    drawn, known = [], []
    for boxes, matched, of_image in zip(positives.boxes, positives.matched, targets, strict=True):
        masks = of_image.masks
        if masks is None or not len(boxes):
            drawn.append(boxes.new_zeros(len(boxes), size, size, dtype=torch.bool))
            known.append(boxes.new_zeros(len(boxes), dtype=torch.bool))
            continue
        rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)  # "image" of a RoI: its box's mask
        drawn.append(roi_align(masks[:, None].float(), rois, size, sampling_ratio=0, aligned=True)[:, 0] >= THRESHOLD)
        known.append(masks.flatten(1).any(dim=1)[matched])
    return torch.cat(drawn), torch.cat(known)


def paste_mask(probabilities: Tensor, box: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The mask of one box in the pixels of an image.

    Source: mmdetection `_do_paste_mask` with `skip_empty`.

    Args:
        probabilities: (M, M) in 0..1, spread evenly over the box.
        box: (4,) xyxy.
        size_hw: of the image.

    Returns:
        (h, w) bool around the box, everything outside of it being False, and its top left corner (y, x).
    """
    x1, y1, x2, y2 = box.tolist()
    left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
    right, bottom = min(-int(-x2 // 1) + 1, size_hw[1]), min(-int(-y2 // 1) + 1, size_hw[0])
    if not (x2 > x1 and y2 > y1):
        return probabilities.new_zeros(0, 0, dtype=torch.bool), (top, left)
    y = (torch.arange(top, bottom, device=box.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    x = (torch.arange(left, right, device=box.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)  # (h, w, 2)
    pasted = grid_sample(probabilities[None, None], grid[None].to(probabilities.dtype), align_corners=False)[0, 0]
    return pasted >= THRESHOLD, (top, left)
