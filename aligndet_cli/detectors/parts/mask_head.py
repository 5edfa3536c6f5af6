"""Mask heads of R-CNNs: predict masks in a small grid, make their targets, and paste masks into images."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample
from torchvision.ops import roi_align

from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import Detections, weigh_assistant
from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.fpn import conv_tower
from aligndet_cli.detectors.parts.rcnn_config import MaskSettings, RCNNConfig
from aligndet_cli.detectors.parts.roi_head import Pyramid, RoiSamples, kaiming_convs, to_rois
from aligndet_cli.detectors.parts.two_stage import RCNN, Trained, detect_boxes, total, train_boxes

THRESHOLD = 0.5


class MaskHead(nn.Module):
    """Convolutions on a pooled RoI, then a transposed convolution that doubles its resolution.

    Source: He et al., ICCV 2017; mmdetection `FCNMaskHead`, including its initial weights.
    """

    def __init__(self, config: MaskSettings) -> None:
        super().__init__()
        channels = config.neck_channels
        self.pool_size = config.mask_pool_size
        self.convs = conv_tower(channels, config.mask_convs, config.mask_norm or config.head_norm)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        kaiming_convs(self)

    def forward(self, pooled: Tensor) -> Tensor:
        """Turn (S, C, size, size) pooled RoIs into (S, C, 2 * size, 2 * size)."""
        return self.upsample(self.convs(pooled)).relu()


@dataclass(frozen=True)
class MaskBranch:
    """A mask head and its predictor.

    Attributes:
        features: (S, C, size, size) pooled RoIs to (S, C, 2 * size, 2 * size) features.
        predictor: 1x1 convolution from these to K masks.
        config: for pooling RoIs.
        pool_size: rows and columns of a pooled RoI.
    """

    features: Callable[[Tensor], Tensor]
    predictor: nn.Conv2d
    config: RCNNConfig
    pool_size: int

    def logits(self, pyramid: Pyramid, rois: Tensor, class_ids: Tensor) -> Tensor:
        """Return (S, M, M) logits of the mask of the class (S,) of each RoI (S, 5)."""
        pooled, row = pyramid.pool(rois, self.pool_size, self.config)
        by_level = torch.empty_like(class_ids).index_put((row,), class_ids)
        return predict_masks(self.predictor, self.features(pooled), by_level)[row]


class MaskedRCNN(RCNN):
    """Base of the R-CNN families with masks. Each adds the mask heads, and `mask_branches`."""

    fresh_modules: tuple[str, ...] = ("mask_head", "mask_predictor")

    @abstractmethod
    def mask_branches(self) -> list[MaskBranch]:
        """Return the mask heads with their predictors, first one first, one for each box head."""

    def mask_samples(self, boxes: Trained, _sizes_hw: Sequence[SizeHW], _targets: Sequence[BoxTargets]) -> RoiSamples:
        """Return the RoIs that the mask head beside a box head learns from: those of the box head."""
        return boxes.samples

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch with masks; images without boxes are negatives."""
        pyramids, sizes_hw = self.pyramids(images), images.sizes_hw
        trained = train_boxes(self, pyramids, sizes_hw, targets)
        return weigh_assistant(
            [
                {**losses, **self.mask_losses(pyramid, heads, sizes_hw, targets)}
                for pyramid, (losses, heads) in zip(pyramids, trained, strict=True)
            ]
        )

    def mask_losses(
        self,
        pyramid: Pyramid,
        heads: Sequence[Trained],
        sizes_hw: Sequence[SizeHW],
        targets: Sequence[BoxTargets],
    ) -> dict[str, Tensor]:
        """Return the scalar `loss_mask`, summed over the mask heads with their weights.

        Args:
            heads: the box heads beside them.
        """
        masks = []
        for branch, boxes in zip(self.mask_branches(), heads, strict=True):
            positives = self.mask_samples(boxes, sizes_hw, targets).positives()
            masks.append(boxes.head.rules.weight * train_masks(branch, pyramid, positives, targets))
        return {"loss_mask": total(masks)}

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, with masks, best first."""
        pyramid = self.pyramid(self.extract(images).maps)
        return add_masks(self.mask_branches(), pyramid, detect_boxes(self, pyramid, images.sizes_hw))


def build_mask_predictor(channels: int, num_classes: int) -> nn.Conv2d:
    """Build the predictor of a `MaskBranch` with fresh weights."""
    predictor = nn.Conv2d(channels, num_classes, 1)
    kaiming_convs(predictor)
    return predictor


def train_masks(branch: MaskBranch, pyramid: Pyramid, positives: RoiSamples, targets: Sequence[BoxTargets]) -> Tensor:
    """Return the scalar `loss_mask` of the positive RoIs."""
    pairs = zip(positives.matched, targets, strict=True)
    class_ids = torch.cat([of_image.class_ids[matched] for matched, of_image in pairs])
    logits = branch.logits(pyramid, positives.rois(), class_ids)
    return mask_loss(logits, *draw_targets(positives, targets, logits.shape[-1]))


def add_masks(branches: Sequence[MaskBranch], pyramid: Pyramid, found: Sequence[Detections]) -> list[Detections]:
    """Return detections with (N, M, M) masks, the mean of those of all branches."""
    rois = to_rois([of_image.boxes for of_image in found])
    class_ids = torch.cat([of_image.class_ids for of_image in found])
    by_branch = [branch.logits(pyramid, rois, class_ids).sigmoid() for branch in branches]
    masks = torch.stack(by_branch).mean(dim=0).split([len(of_image.boxes) for of_image in found])
    return [replace(of_image, masks=of_masks) for of_image, of_masks in zip(found, masks, strict=True)]


def predict_masks(predictor: nn.Conv2d, features: Tensor, class_ids: Tensor) -> Tensor:
    """Return (S, M, M) float32 logits of the mask of one class per RoI; the other classes are not computed.

    Args:
        predictor: 1x1 convolution to K masks.
        features: (S, C, M, M) of `MaskHead`.
        class_ids: (S,) int64.
    """
    assert predictor.bias is not None
    weights = predictor.weight.flatten(1)[class_ids]  # (S, C)
    logits = torch.bmm(weights[:, None], features.flatten(2)).float() + predictor.bias[class_ids, None, None]
    return logits.view(features.shape[0], *features.shape[2:])


def mask_loss(logits: Tensor, true_masks: Tensor, is_known: Tensor) -> Tensor:
    """Return the scalar mean cross-entropy over the RoIs whose box has a mask; 0 if there are none.

    Args:
        logits: (S, M, M) of positive RoIs.
        true_masks, is_known: (S, M, M) and (S,) as from `draw_targets`.
    """
    loss = binary_cross_entropy_with_logits(logits, true_masks.float(), reduction="none").flatten(1).mean(dim=1)
    return (loss * is_known).sum() / is_known.sum().clamp(min=1)


@torch.no_grad()
def draw_targets(positives: RoiSamples, targets: Sequence[BoxTargets], size: int) -> tuple[Tensor, Tensor]:
    """Crop the true masks of positive RoIs.

    Source: mmdetection `mask_target` and `BitmapMasks.crop_and_resize`.

    Args:
        positives: RoIs with a matched box.
        targets: boxes and masks of each image; masks are None if no box of the image has one.
        size: M, rows and columns of the result.

    Returns:
        (S, M, M) bool masks, and (S,) bool: True if the box has a mask. An empty mask counts as missing.
    """
    drawn, known = [], []
    for boxes, matched, of_image in zip(positives.boxes, positives.matched, targets, strict=True):
        masks = of_image.masks
        if masks is None or not len(boxes):
            drawn.append(boxes.new_zeros(len(boxes), size, size, dtype=torch.bool))
            known.append(boxes.new_zeros(len(boxes), dtype=torch.bool))
            continue
        rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)  # `roi_align` crops masks
        drawn.append(roi_align(masks[:, None].float(), rois, size, sampling_ratio=0, aligned=True)[:, 0] >= THRESHOLD)
        known.append(masks.flatten(1).any(dim=1)[matched])
    return torch.cat(drawn), torch.cat(known)


def paste_mask(probabilities: Tensor, box: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Resample the mask of one box to the pixels of an image; arguments as in `paste_probabilities`.

    Returns:
        (H, W) bool for a part of the image around the box, and that part's top left corner (y, x). The mask is False
        everywhere else.
    """
    pasted, corner = paste_probabilities(probabilities, box, size_hw)
    return pasted >= THRESHOLD, corner


def paste_probabilities(probabilities: Tensor, box: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Resample the mask of one box to the pixels of an image, as probabilities.

    Source: mmdetection `_do_paste_mask` with `skip_empty`.

    Args:
        probabilities: (M, M) in 0..1, spread evenly over the box.
        box: (4,) xyxy in pixels.
        size_hw: height and width of the image in pixels.

    Returns:
        (H, W) for a part of the image around the box, and that part's top left corner (y, x). They are 0 elsewhere.
    """
    x1, y1, x2, y2 = box.tolist()
    left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
    right, bottom = min(-int(-x2 // 1) + 1, size_hw[1]), min(-int(-y2 // 1) + 1, size_hw[0])
    if not (x2 > x1 and y2 > y1):
        return probabilities.new_zeros(0, 0), (top, left)
    y = (torch.arange(top, bottom, device=box.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    x = (torch.arange(left, right, device=box.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)  # (h, w, 2)
    pasted = grid_sample(probabilities[None, None], grid[None].to(probabilities.dtype), align_corners=False)[0, 0]
    return pasted, (top, left)
