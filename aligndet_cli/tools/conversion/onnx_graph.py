"""Detectors as graphs that can be exported: from pixels to detections, for any number of images of any size.

They compute what `Detector.detect` does, in tensors of one shape for all images where that has lists.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.detr import DETR, inside_cells
from aligndet_cli.detectors.fcos import FCOS
from aligndet_cli.detectors.parts.box_coder import decode_boxes
from aligndet_cli.detectors.parts.cells import grids_of
from aligndet_cli.detectors.parts.mask_head import MaskBranch, MaskedRCNN, predict_masks
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.roi_head import POOLED_STRIDES, Pyramid, level_of, pool_semantic
from aligndet_cli.detectors.parts.two_stage import RCNN, heads_of
from aligndet_cli.detectors.retinanet import RetinaNet
from aligndet_cli.tools.conversion.onnx_nms import by_group, not_suppressed, softened

WithNMS = RetinaNet | FCOS | RCNN


class Found(NamedTuple):
    """N boxes of each image of a batch; rows of score 0 hold nothing.

    Attributes:
        boxes: (B, N, 4) xyxy in pixels of the batch.
        scores: (B, N) in 0..1.
        class_ids: (B, N) int64.
    """

    boxes: Tensor
    scores: Tensor
    class_ids: Tensor

    def best(self, count: int) -> "Found":
        """Return the best of each image, best first: `count` rows."""
        scores, place = _top(self.scores, count)
        return Found(_pick(self.boxes, place), scores, self.class_ids.gather(1, place))


class Graph(nn.Module):
    """A detector's `detect`, from tensors to tensors.

    Args:
        num_classes: K.
        with_nms: suppress overlapping boxes and keep the best; without, leave that to whoever runs the graph.
    """

    def __init__(self, model: Detector, num_classes: int, *, with_nms: bool) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.with_nms = with_nms

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Return the detections of each image, best first; without NMS, in any order.

        Args:
            pixels: (B, 3, H, W) ImageNet-normalised RGB, padded with zeros at the bottom and right.
            sizes: (B, 2) int64 height and width of each image in pixels, without padding.

        Returns:
            Boxes, scores and class ids as in `Found`, and the (B, N, M, M) masks of the families with masks, see
            `Detections`.
        """
        model = self.model
        maps = model.extract(ImageBatch(pixels, ())).maps
        if isinstance(model, DETR):
            return _run_detr(model, maps, sizes, (pixels.shape[-2], pixels.shape[-1]))
        if isinstance(model, RetinaNet):
            boxes, scores, class_ids = self._finish(_run_retinanet(model, maps, sizes), model)
            return _clip(boxes, sizes) if self.with_nms else boxes, scores, class_ids
        if isinstance(model, FCOS):
            return self._finish(_run_fcos(model, maps, sizes), model)
        assert isinstance(model, RCNN)
        pyramid = model.pyramid(maps)
        found = self._finish(_run_two_stage(model, pyramid, sizes, self.num_classes), model)
        if isinstance(model, MaskedRCNN):
            return *found, _run_masks(model.mask_branches(), pyramid, found)
        return found

    def _finish(self, found: Found, model: WithNMS) -> Found:
        """Suppress boxes and keep the best; without NMS, leave everything as it is."""
        if not self.with_nms:
            return found
        config = model.config
        if isinstance(config, RCNNConfig) and config.nms_type == "soft_nms":
            scores, place = softened(*found, config.nms_iou, config.max_detections)
            return Found(_pick(found.boxes, place), scores, found.class_ids.gather(1, place))
        if isinstance(config, RCNNConfig):
            boxes = found.boxes.unflatten(1, (self.num_classes, -1)).flatten(0, 1)  # (B*K, P, 4)
            scores = found.scores.unflatten(1, (self.num_classes, -1)).flatten(0, 1)
            kept = not_suppressed(boxes, scores[:, None], config.nms_iou).view_as(found.scores)
        else:
            scores = by_group(found.scores, found.class_ids, self.num_classes)  # (B, K, N)
            kept = not_suppressed(found.boxes, scores, config.nms_iou).any(dim=1)
        return found._replace(scores=torch.where(kept, found.scores, 0.0)).best(config.max_detections)


def _run_detr(model: DETR, maps: dict[str, Tensor], sizes: Tensor, batch_hw: tuple[int, int]) -> Found:
    cells = model.neck(maps["c5"])
    logits, boxes = model.predict(model.attend(cells, inside_cells(cells, sizes, batch_hw))[-1:])
    scores, class_ids = logits[0].softmax(dim=-1)[..., :-1].max(dim=-1)  # (B, Q)
    scores = torch.where(scores >= model.config.score_threshold, scores, 0.0)
    corners = _clip(box_convert(boxes[0], "cxcywh", "xyxy") * _limits(sizes), sizes)
    return Found(corners, scores, class_ids).best(model.config.max_detections)


def _run_retinanet(model: RetinaNet, maps: dict[str, Tensor], sizes: Tensor) -> Found:
    """Return the best boxes of each level, not clipped if suppression comes before that."""
    config, pyramid = model.config, model.neck(maps)
    anchors = model.anchors(grids_of(pyramid))
    levels, start = [], 0
    for logits, deltas in zip(model.predict_logits(pyramid), model.predict_deltas(pyramid), strict=True):
        all_scores = _rows(logits, model.num_slots).sigmoid()  # (B, H*W*A, K)
        scores, place, class_ids = _above(all_scores, config.score_threshold, config.detections_per_level)
        picked = _pick(_rows(deltas, model.num_slots), place)
        levels.append(Found(_decode(picked, anchors[start + place]), scores, class_ids))
        start += all_scores.shape[1]
    found = _join(levels)
    return found._replace(boxes=_clip(found.boxes, sizes)) if config.clip_before_nms else found


def _run_fcos(model: FCOS, maps: dict[str, Tensor], sizes: Tensor) -> Found:
    """Return the best boxes of each level."""
    config, pyramid = model.config, model.neck(maps)
    class_maps = [model.head.class_tower(level) for level in pyramid]
    points = model.points(grids_of(pyramid))
    outputs = zip(class_maps, model.predict_centerness(class_maps), model.predict_log_sides(pyramid), strict=True)
    levels, start = [], 0
    for class_map, centerness, log_sides in outputs:
        all_scores = _rows(model.class_predictor(class_map), 1).sigmoid()  # (B, H*W, K)
        scores, place, class_ids = _above(all_scores, config.score_threshold, config.detections_per_level)
        sides = _pick(_rows(log_sides, 1), place).exp()
        at = points[start + place]  # (B, S, 2)
        corners = torch.cat([at - sides[..., :2], at + sides[..., 2:]], dim=2)
        weights = centerness.flatten(1).gather(1, place).sigmoid()
        levels.append(Found(_clip(corners, sizes), scores * weights, class_ids))
        start += all_scores.shape[1]
    return _join(levels)


def _run_two_stage(model: RCNN, pyramid: Pyramid, sizes: Tensor, num_classes: int) -> Found:
    """Return the boxes of each class, K * P in all: those of P proposals for the first class, then for the next."""
    config, refined = model.config, _propose(model, pyramid.levels, sizes)
    all_logits: list[Tensor] = []
    for head in heads_of(model):
        pooled, place = _pool(pyramid, refined, config.pool_size, config)
        features = head.layers(pooled)  # (S, C)
        all_logits.append(_put(head.class_predictor(features), place, refined))  # (B, P, K + 1)
        offsets = head.offsets(features)  # (S, K or 1, 4)
        rois = refined.boxes.flatten(0, 1)[place]  # (S, 4)
        decoded = _decode(offsets, rois[:, None].expand_as(offsets))
        placed = _put(decoded.flatten(1), place, refined).unflatten(2, (-1, 4))  # (B, P, K or 1, 4)
        if placed.shape[2] == 1:  # for all classes, and for the next head
            refined = refined._replace(boxes=_clip(placed.squeeze(2), sizes))
    by_class = (0, 2, 1)  # (B, P, K) to (B, K, P)
    boxes = _clip(placed.expand(-1, -1, num_classes, -1).permute(*by_class, 3).flatten(1, 2), sizes)
    scores = torch.stack(all_logits).mean(dim=0).softmax(dim=2)[..., :-1] * (refined.scores > 0)[..., None]
    scores = scores.permute(by_class).flatten(1)
    is_kept = (scores > config.score_threshold) & (boxes[..., 2:] - boxes[..., :2] >= config.min_box_side).all(dim=2)
    class_ids = torch.arange(num_classes, device=scores.device)[:, None].expand(-1, refined.scores.shape[1])
    return Found(boxes, torch.where(is_kept, scores, 0.0), class_ids.flatten().expand_as(scores))


def _propose(model: RCNN, pyramid: list[Tensor], sizes: Tensor) -> Found:
    """Return the proposals of each image, best first."""
    config, rpn = model.config, model.rpn
    scores, deltas, anchors, levels = rpn.best(rpn(pyramid), config.test_proposals_per_level)
    boxes = _clip(_decode(deltas, anchors), sizes)
    scores = torch.where((boxes[..., 2:] > boxes[..., :2]).all(dim=2), scores, 0.0)
    kept = not_suppressed(boxes, by_group(scores, levels, len(pyramid)), config.rpn_nms_iou).any(dim=1)
    return Found(boxes, torch.where(kept, scores, 0.0), torch.zeros_like(scores).long()).best(config.max_proposals)


def _pool(pyramid: Pyramid, found: Found, size: int, config: RCNNConfig) -> tuple[Tensor, Tensor]:
    """Pool the features of boxes that are there, each from the level that fits its size; see `pool_rois`.

    Returns:
        (S, C, size, size) features, and (S,) int64: their places among the B * N boxes.
    """
    images = torch.arange(found.boxes.shape[0], device=found.boxes.device)[:, None, None]
    rois = torch.cat([images.expand_as(found.boxes)[..., :1].to(found.boxes.dtype), found.boxes], dim=2).flatten(0, 1)
    level = torch.where(found.scores.flatten() > 0, level_of(rois), -1)
    places = [(level == index).nonzero().squeeze(1) for index in range(len(POOLED_STRIDES))]
    pooled = [
        roi_align(maps, rois[place], size, 1 / stride, config.roi_sampling_ratio, config.roi_aligned)
        for maps, place, stride in zip(pyramid.levels, places, POOLED_STRIDES, strict=False)
    ]
    features, places_of_all = torch.cat(pooled), torch.cat(places)
    if pyramid.semantic is not None:
        features = features + pool_semantic(pyramid.semantic, rois[places_of_all], size, config)
    return features, places_of_all


def _run_masks(branches: list[MaskBranch], pyramid: Pyramid, found: Found) -> Tensor:
    """Return (B, N, M, M) masks in 0..1, the mean of the branches'; 0 where no box is."""
    masks = []
    for branch in branches:
        pooled, place = _pool(pyramid, found, branch.pool_size, branch.config)
        logits = predict_masks(branch.predictor, branch.features(pooled), found.class_ids.flatten()[place])
        masks.append(_put(logits.sigmoid().flatten(1), place, found))
    side = 2 * branches[0].pool_size
    return torch.stack(masks).mean(dim=0).unflatten(2, (side, side))


def _above(scores: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scores of a level, 0 if not above the threshold, with their places and class ids, (B, S) each.

    Args:
        scores: (B, N, K) in 0..1.
        threshold: the limit.
        count: S.
    """
    num_classes = scores.shape[2]
    best, place = _top(scores.flatten(1), count)
    return torch.where(best > threshold, best, 0.0), place // num_classes, place % num_classes


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best scores and their places, (B, S) each, of (B, N) scores; S = `count`, and if N is less, 0 follow.

    A fixed number of rows lets graphs be traced in half the time.
    """
    best, place = torch.cat([scores, scores.new_zeros(scores.shape[0], count)], dim=1).topk(count)
    return best, torch.where(best > 0, place, 0)


def _decode(deltas: Tensor, references: Tensor) -> Tensor:
    """Return boxes at offsets from references, all of one shape (..., 4), not clipped."""
    return decode_boxes(deltas.reshape(-1, 4), references.reshape(-1, 4), None).view_as(deltas)


def _limits(sizes: Tensor) -> Tensor:
    """Return (B, 1, 4) float32 width, height, width, height, from (B, 2) height and width."""
    return sizes.float().flip(1).repeat(1, 2)[:, None]


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip (B, N, 4) xyxy boxes to images of (B, 2) height and width."""
    return torch.minimum(boxes.clamp(min=0), _limits(sizes))


def _join(levels: list[Found]) -> Found:
    """Return the boxes of all levels, one level after the other."""
    return Found(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)))


def _rows(level: Tensor, num_slots: int) -> Tensor:
    """Rearrange (B, A*V, H, W) to (B, H*W*A, V), in the order of rows, columns and slots."""
    return level.unflatten(1, (num_slots, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _pick(values: Tensor, place: Tensor) -> Tensor:
    """Return rows of (B, N, V) values, at places (B, S) of their image: (B, S, V)."""
    return values.gather(1, place[..., None].expand(-1, -1, values.shape[2]))


def _put(values: Tensor, place: Tensor, found: Found) -> Tensor:
    """Return (B, N, V), 0 but for the (S, V) values at their places (S,) among the B * N boxes."""
    empty = values.new_zeros(found.scores.numel(), values.shape[1])
    return empty.index_put((place,), values).view(*found.scores.shape, -1)
