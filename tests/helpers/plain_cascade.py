"""A second, plain implementation of Cascade R-CNN and HTC: box by box, in Python's floats, as the papers write it down.

Layers are those of the detector under test; what happens between them is written anew. How much two boxes overlap is
torchvision's number, because equal overlaps decide which box an anchor gets.

Source: Cai and Vasconcelos, "Cascade R-CNN" (TPAMI 2019), sections 4 and 5; Ren et al., "Faster R-CNN", section 3; He
et al., "Mask R-CNN", section 3; Chen et al., "Hybrid Task Cascade" (CVPR 2019), section 3; numbers that these leave
open are those of mmdetection's `cascade_mask_rcnn_r50_fpn`, `htc_without_semantic_r50_fpn` and `htc_r50_fpn`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.parts.cells import grids_of

Box = list[float]
STDS = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
IOUS = (0.5, 0.6, 0.7)
WEIGHTS = (1.0, 0.5, 0.25)


def encode(box: Box, reference: Box) -> list[float]:
    """dx, dy, dw, dh from a reference to a box."""
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box, reference
    width, height = a2 - a1, b2 - b1
    return [
        ((x1 + x2) - (a1 + a2)) / 2 / width,
        ((y1 + y2) - (b1 + b2)) / 2 / height,
        math.log((x2 - x1) / width),
        math.log((y2 - y1) / height),
    ]


def decode(offsets: Sequence[float], reference: Box, size_hw: tuple[int, int]) -> Box:
    """The box at these offsets, clipped to the image."""
    a1, b1, a2, b2 = reference
    width, height = a2 - a1, b2 - b1
    limit = math.log(1000 / 16)
    dx, dy, dw, dh = offsets[0], offsets[1], *(min(max(d, -limit), limit) for d in offsets[2:])
    x, y = (a1 + a2) / 2 + dx * width, (b1 + b2) / 2 + dy * height
    w, h = width * math.exp(dw), height * math.exp(dh)
    corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    return [min(max(c, 0.0), float(size_hw[1 - i % 2])) for i, c in enumerate(corners)]


def overlaps(boxes: list[Box], others: list[Box]) -> list[list[float]]:
    if not boxes or not others:
        return [[0.0] * len(others) for _ in boxes]
    return box_iou(torch.tensor(boxes), torch.tensor(others)).tolist()


def smooth(distance: float, beta: float) -> float:
    distance = abs(distance)
    return distance**2 / 2 / beta if distance < beta else distance - beta / 2


def suppress(boxes: list[Box], scores: list[float], limit: float) -> list[int]:
    """Non-maximum suppression: the places of what is kept, best first."""
    kept: list[int] = []
    for place in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlaps([boxes[place]], [boxes[other]])[0][0] <= limit for other in kept):
            kept.append(place)
    return kept


def soften(boxes: list[Box], scores: list[float], limit: float) -> list[tuple[float, int]]:
    """Soft NMS (Bodla et al., ICCV 2017, figure 2) with the linear rule: (score, place) of what is kept, best first."""
    left, found = dict(enumerate(scores)), []
    while left:
        best = max(left, key=left.__getitem__)
        found.append((left.pop(best), best))
        for place in list(left):
            iou = overlaps([boxes[best]], [boxes[place]])[0][0]
            left[place] *= 1 - iou if iou > limit else 1
            if left[place] < 0.001:
                del left[place]
    return found


def stretch(maps: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) maps in another size: corners stay corners, and between cells the value changes evenly."""
    for axis, new in ((2, height), (3, width)):
        old, rows = maps.shape[axis], []
        for place in range(new):
            at = place * (old - 1) / (new - 1)
            below = min(int(at), old - 1)
            above = min(below + 1, old - 1)
            rows.append(maps.select(axis, below) * (below + 1 - at) + maps.select(axis, above) * (at - below))
        maps = torch.stack(rows, dim=axis)
    return maps


def shrink(pooled: Tensor, size: int) -> Tensor:
    """(1, C, n, n) in size x size parts, each the mean of the cells that it touches."""
    number = pooled.shape[2]
    parts = [(part * number // size, -(-(part + 1) * number // size)) for part in range(size)]
    rows = [torch.stack([pooled[:, :, a:b, c:d].mean(dim=(2, 3)) for c, d in parts], dim=2) for a, b in parts]
    return torch.stack(rows, dim=2)


@dataclass
class Sample:
    """RoIs of an image that a head is trained on: (box, number of its true box or None for background)."""

    rois: list[tuple[Box, int | None]]
    num_true: int  # so many of the first RoIs are the true boxes themselves


class PlainCascade:
    """Runs a `CascadeRCNN`, `CascadeMaskRCNN` or `HTC`, loop by loop."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        self.has_masks, self.is_htc = hasattr(model, "mask_head"), hasattr(model, "mask_flow")

    # ---- layers of the detector ----

    @torch.no_grad()
    def look(self, images: ImageBatch, *, of_assistant: bool = False) -> None:
        """Compute the pyramid, which may be that of a composite's assistant, and what the RPN says."""
        self.sizes_hw = images.sizes_hw
        features = self.model.extract(images, with_assistant=of_assistant)
        self.pyramid = self.model.neck(features.of_assistant if of_assistant else features.maps)
        self.has_semantic = self.is_htc and self.model.semantic_head is not None
        if self.has_semantic:
            self.fuse()
        self.rpn_logits, self.rpn_deltas = self.model.rpn(self.pyramid)
        self.grids = grids_of(self.rpn_logits)
        self.anchors = self.model.rpn.anchors(self.grids).tolist()

    def rpn_rows(self, image: int) -> tuple[list[float], list[list[float]], list[int]]:
        """Logit, offsets and level of each anchor of an image, in the order of the anchors."""
        logits, deltas, levels = [], [], []
        for level, (of_level, offsets) in enumerate(zip(self.rpn_logits, self.rpn_deltas, strict=True)):
            num = of_level.shape[1]
            for y in range(of_level.shape[2]):
                for x in range(of_level.shape[3]):
                    for a in range(num):
                        logits.append(float(of_level[image, a, y, x]))
                        deltas.append(offsets[image, 4 * a : 4 * a + 4, y, x].tolist())
                        levels.append(level)
        return logits, deltas, levels

    def fuse(self) -> None:
        """The semantic branch: all levels in a map of a cell for 8 x 8 pixels, and logits and features of it."""
        branch, (height, width) = self.model.semantic_head, self.pyramid[1].shape[2:]
        fused = 0
        for number, level in enumerate(self.pyramid):
            fused = fused + branch.lateral_convs[number](stretch(level, height, width))
        for conv in branch.convs:
            fused = conv(fused)
        self.pixel_logits, self.embedded = branch.logits(fused), branch.embedding(fused)

    def pool(self, image: int, box: Box, size: int) -> Tensor:
        """(1, C, size, size) features of a box, from the level 4 for a side of 224 pixels, and so on."""
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(4 + math.log2(side / 224 + 1e-9)), 2), 5)
        maps, boxes = self.pyramid[level - 2][image : image + 1], [torch.tensor([box])]
        pooled = roi_align(maps, boxes, size, 0.5**level, 0, True)
        if self.has_semantic:
            pooled = pooled + shrink(roi_align(self.embedded[image : image + 1], boxes, 14, 1 / 8, 0, True), size)
        return pooled

    @torch.no_grad()
    def classify(self, stage: int, image: int, box: Box) -> tuple[list[float], list[float]]:
        """Logits of the classes, background last, and offsets of a box in pixels' worth of its sides."""
        features = self.model.head[stage](self.pool(image, box, self.config.pool_size))
        offsets = self.model.box_predictor[stage](features)[0].tolist()
        logits = self.model.class_predictor[stage](features)[0].tolist()
        return logits, [offset * std for offset, std in zip(offsets, STDS[stage], strict=True)]

    # ---- training ----

    def rpn_losses(self, targets: list[BoxTargets]) -> tuple[float, float]:
        """Classification and box loss, with all anchors inside the image as samples."""
        class_sum, box_sum, number = 0.0, 0.0, 0
        for image, target in enumerate(targets):
            height, width = self.sizes_hw[image]
            boxes = target.boxes.tolist()
            inside = [
                n
                for n, (x1, y1, x2, y2) in enumerate(self.anchors)
                if x1 >= 0 and y1 >= 0 and x2 < width and y2 < height
            ]
            assert inside
            iou = overlaps([self.anchors[n] for n in inside], boxes)
            labels: list[int | None] = []  # number of the box, -1 for background, None for neither
            for row in iou:
                best = max(row, default=0.0)
                labels.append(row.index(best) if best >= 0.7 else -1 if best < 0.3 else None)
            for box in range(len(boxes)):
                best = max(row[box] for row in iou)
                for place, row in enumerate(iou):
                    if row[box] == best >= 0.3:
                        labels[place] = box
            logits, deltas, _ = self.rpn_rows(image)
            for place, label in zip(inside, labels, strict=True):
                if label is None:
                    continue
                sign = -1 if label >= 0 else 1
                class_sum += math.log1p(math.exp(sign * logits[place]))
                if label >= 0:
                    wanted = encode(boxes[label], self.anchors[place])
                    box_sum += sum(smooth(d - w, 1 / 9) for d, w in zip(deltas[place], wanted, strict=True))
            num_positive = sum(label is not None and label >= 0 for label in labels)
            num_negative = sum(label == -1 for label in labels)
            number += max(num_positive, 1) + max(num_negative, 1)
        return class_sum / number, box_sum / number

    def propose(self, per_level: int, count: int) -> list[list[Box]]:
        """Proposals of each image, best first."""
        found = []
        for image, size_hw in enumerate(self.sizes_hw):
            logits, deltas, levels = self.rpn_rows(image)
            kept: list[tuple[float, Box]] = []
            for level in sorted(set(levels)):
                places = [n for n in range(len(logits)) if levels[n] == level]
                places = sorted(places, key=lambda n: -logits[n])[:per_level]
                boxes = [decode(deltas[n], self.anchors[n], size_hw) for n in places]
                pairs = [(n, box) for n, box in zip(places, boxes, strict=True) if box[2] > box[0] and box[3] > box[1]]
                chosen = suppress([box for _, box in pairs], [logits[n] for n, _ in pairs], 0.7)
                kept += [(logits[pairs[i][0]], pairs[i][1]) for i in chosen]
            found.append([box for _, box in sorted(kept, key=lambda pair: -pair[0])[:count]])
        return found

    def sample(self, stage: int, proposals: list[Box], target: BoxTargets) -> Sample:
        """True boxes, then proposals that overlap one enough, then background; the first ones, if they are too many."""
        true, limit = target.boxes.tolist(), IOUS[stage]
        iou = overlaps(proposals, true)
        labels = [row.index(max(row)) if max(row, default=0.0) >= limit else None for row in iou]
        if self.is_htc:  # a true box gets its best proposal, even if that overlaps another one more
            for box in range(len(true)):
                best = max((row[box] for row in iou), default=0.0)
                for place, row in enumerate(iou):
                    if row[box] == best >= limit:
                        labels[place] = box
        positives: list[tuple[Box, int | None]] = [(box, number) for number, box in enumerate(true)]
        positives += [(box, label) for box, label in zip(proposals, labels, strict=True) if label is not None]
        negatives = [(box, label) for box, label in zip(proposals, labels, strict=True) if label is None]
        positives = positives[: int(self.config.roi_samples * self.config.roi_positive_fraction)]
        rois = [*positives, *negatives[: self.config.roi_samples - len(positives)]]
        return Sample(rois, min(len(true), len(positives)))

    def head_losses(self, stage: int, samples: list[Sample], targets: list[BoxTargets]) -> tuple[float, float]:
        """Class and box loss of a head, without its weight."""
        class_sum = box_sum = 0.0
        for image, (sample, target) in enumerate(zip(samples, targets, strict=True)):
            for box, number in sample.rois:
                logits, offsets = self.classify(stage, image, box)
                label = len(logits) - 1 if number is None else int(target.class_ids[number])
                highest = max(logits)
                class_sum += highest + math.log(sum(math.exp(v - highest) for v in logits)) - logits[label]
                if number is not None:
                    wanted = encode(target.boxes[number].tolist(), box)
                    box_sum += sum(
                        smooth((o - w) / std, 1.0) for o, w, std in zip(offsets, wanted, STDS[stage], strict=True)
                    )
        total = max(sum(len(sample.rois) for sample in samples), 1)
        return class_sum / total, box_sum / total

    def mask_loss(self, stage: int, samples: list[Sample], targets: list[BoxTargets]) -> float:
        """Mask loss of a head, without its weight."""
        losses = []
        for image, (sample, target) in enumerate(zip(samples, targets, strict=True)):
            for box, number in sample.rois:
                if number is None or target.masks is None or not target.masks[number].any():
                    continue
                logits = self.mask_logits(stage, image, box)[int(target.class_ids[number])]
                mask = target.masks[number][None, None].float()
                drawn = roi_align(mask, [torch.tensor([box])], len(logits), 1.0, 0, True)[0, 0] >= 0.5
                pixels = [
                    math.log1p(math.exp(-v if inside else v))
                    for row, line in zip(logits.tolist(), drawn.tolist(), strict=True)
                    for v, inside in zip(row, line, strict=True)
                ]
                losses.append(sum(pixels) / len(pixels))
        return sum(losses) / max(len(losses), 1)

    def semantic_loss(self, targets: list[BoxTargets]) -> float:
        """Loss of the semantic branch, without its weight."""
        losses = []
        for image, target in enumerate(targets):
            for y in range(self.pixel_logits.shape[2]):
                for x in range(self.pixel_logits.shape[3]):
                    label = int(target.pixel_classes[8 * y, 8 * x])
                    logits = self.pixel_logits[image, :, y, x].tolist()
                    if label != 255:
                        losses.append(math.log(sum(math.exp(v) for v in logits)) - logits[label])
        return sum(losses) / max(len(losses), 1)

    @torch.no_grad()
    def mask_logits(self, stage: int, image: int, box: Box) -> Tensor:
        """(K, M, M) logits of a box."""
        pooled = self.pool(image, box, self.config.mask_pool_size)
        if not self.is_htc:
            return self.model.mask_predictor[stage](self.model.mask_head[stage](pooled))[0]
        hidden = self.model.mask_head[0].convs(pooled)
        for number in range(1, stage + 1):
            hidden = self.model.mask_head[number].convs(pooled + self.model.mask_flow[number](hidden))
        return self.model.mask_predictor[stage](self.model.mask_head[stage].upsample(hidden).relu())[0]

    def refine(self, stage: int, samples: list[Sample]) -> list[list[Box]]:
        """What a head makes of its RoIs, without the true boxes."""
        return [
            [decode(self.classify(stage, image, box)[1], box, size_hw) for box, _ in sample.rois[sample.num_true :]]
            for image, (sample, size_hw) in enumerate(zip(samples, self.sizes_hw, strict=True))
        ]

    def train(self, images: ImageBatch, targets: list[BoxTargets]) -> tuple[dict[str, float], list[list[Sample]]]:
        """Losses by name, and the samples of each head."""
        self.look(images)
        objectness, rpn_boxes = self.rpn_losses(targets)
        proposals = self.propose(self.config.train_proposals_per_level, self.config.train_max_proposals)
        losses, samples = self.train_heads(proposals, targets)
        return {"loss_objectness": objectness, "loss_rpn_box_reg": rpn_boxes, **losses}, samples

    def train_both(self, images: ImageBatch, targets: list[BoxTargets]) -> dict[str, float]:
        """Losses by name with an assistant: half of its own, on the lead's proposals, and those of the lead.

        Source: Liang et al., CBNet, section 3.4, and its code for the proposals.
        """
        losses, _ = self.train(images, targets)
        proposals = self.propose(self.config.train_proposals_per_level, self.config.train_max_proposals)
        self.look(images, of_assistant=True)
        objectness, rpn_boxes = self.rpn_losses(targets)
        others, _ = self.train_heads(proposals, targets)
        others |= {"loss_objectness": objectness, "loss_rpn_box_reg": rpn_boxes}
        return {name: loss + others[name] / 2 for name, loss in losses.items()}

    def train_heads(
        self, proposals: list[list[Box]], targets: list[BoxTargets]
    ) -> tuple[dict[str, float], list[list[Sample]]]:
        """Losses of the heads by name, and the samples of each."""
        losses = {"loss_cls": 0.0, "loss_box_reg": 0.0} | ({"loss_mask": 0.0} if self.has_masks else {})
        if self.has_semantic:
            losses["loss_semantic"] = 0.2 * self.semantic_loss(targets)
        all_samples = []
        for stage, weight in enumerate(WEIGHTS):
            samples = [self.sample(stage, p, t) for p, t in zip(proposals, targets, strict=True)]
            of_classes, of_boxes = self.head_losses(stage, samples, targets)
            losses["loss_cls"] += weight * of_classes
            losses["loss_box_reg"] += weight * of_boxes
            all_samples.append(samples)
            proposals = self.refine(stage, samples)
            if self.has_masks:
                chosen = samples
                if self.is_htc:  # its masks learn from what the box head has refined, sampled by the same rules
                    chosen = [self.sample(stage, p, t) for p, t in zip(proposals, targets, strict=True)]
                losses["loss_mask"] += weight * self.mask_loss(stage, chosen, targets)
        return losses, all_samples

    # ---- detection ----

    def detect(self, images: ImageBatch) -> list[list[tuple[float, int, Box, Tensor | None]]]:
        """(score, class, box, mask) of each detection, best first."""
        self.look(images)
        proposals = self.propose(self.config.test_proposals_per_level, self.config.max_proposals)
        return [self._detect(image, boxes) for image, boxes in enumerate(proposals)]

    def _detect(self, image: int, boxes: list[Box]) -> list[tuple[float, int, Box, Tensor | None]]:
        candidates: list[tuple[float, int, Box]] = []
        for box in boxes:
            by_stage = []
            for stage in range(3):
                logits, offsets = self.classify(stage, image, box)
                by_stage.append(logits)
                box = decode(offsets, box, self.sizes_hw[image])
            mean = [sum(column) / 3 for column in zip(*by_stage, strict=True)]
            powers = [math.exp(v) for v in mean]
            for class_id, power in enumerate(powers[:-1]):
                if power / sum(powers) > self.config.score_threshold:
                    candidates.append((power / sum(powers), class_id, box))
        found: list[tuple[float, int, Box]] = []
        for class_id in {c for _, c, _ in candidates}:
            of_class = [one for one in candidates if one[1] == class_id]
            boxes, scores = [box for _, _, box in of_class], [score for score, _, _ in of_class]
            if self.config.nms_type == "soft_nms":
                found += [
                    (score, class_id, boxes[place]) for score, place in soften(boxes, scores, self.config.nms_iou)
                ]
            else:
                found += [of_class[place] for place in suppress(boxes, scores, self.config.nms_iou)]
        found = sorted(found, key=lambda one: -one[0])[: self.config.max_detections]
        return [(score, class_id, box, self._mask(image, box, class_id)) for score, class_id, box in found]

    def _mask(self, image: int, box: Box, class_id: int) -> Tensor | None:
        if not self.has_masks:
            return None
        return sum(self.mask_logits(stage, image, box)[class_id].sigmoid() for stage in range(3)) / 3
