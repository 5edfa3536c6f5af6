"""Detections and the limits that drop them: score threshold, number per level, suppression, number per image.

The reference numbers cannot tell: no score of theirs is near a limit. Outputs are made by hand here, so that every
score and IoU at a limit is exact: the sigmoid of 0 and a softmax of two equal logits are 0.5, corners are eighths.

Source: mmdetection 2.x, `filter_scores_and_topk` (scores *above* `score_thr`, then the best `nms_pre` of a level) and
`multiclass_nms` (suppressed *above* `iou_threshold`, then the best `max_per_img`). Of equal scores the earlier one is
kept, in the order of levels, rows, columns, slots and classes.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.detectors.detr import DETR, DETRConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOS, FCOSConfig
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig

SIZE_HW = (400, 600)
LOW = -30.0  # a logit whose score, 1e-13, no threshold lets through
HALF = 0.0  # a logit whose score is 0.5
# A box, and what it overlaps the first one by.
WHOLE, EXACTLY_HALF, MORE = [0, 0, 20, 20], [0, 0, 20, 10], [0, 0, 20, 11]  # 1, 200 / 400 = 0.5, 220 / 400 = 0.55


def build(config: DetectorConfig, num_classes: int) -> Any:
    return config.build(build_backbone(BackboneConfig(name="resnet18")), num_classes).eval()


def apart(count: int) -> list[list[float]]:
    """Boxes that do not touch each other: rows of 60 of 8 x 8 px in a grid of 10 px."""
    return [[10 * (n % 60), 10 * (n // 60), 10 * (n % 60) + 8, 10 * (n // 60) + 8] for n in range(count)]


def survivors(found: Detections) -> list[tuple[list[float], int]]:
    """Box and class of each detection, best first."""
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    return list(zip(found.boxes.tolist(), found.class_ids.tolist(), strict=True))


def falling(count: int) -> list[float]:
    """Logits from 4 down to 1, all different and with different sigmoids."""
    return torch.linspace(4, 1, count).tolist()


# ---- RetinaNet ----

# (box, logits of the classes) of each anchor, level by level
Anchors = list[tuple[list[float], list[float]]]


def retinanet(levels: list[Anchors], **settings: Any) -> list[tuple[list[float], int]]:
    """Let RetinaNet detect with these boxes as unmoved anchors, one row of cells to a level."""
    num_classes = len(levels[0][0][1])
    config = RetinaNetConfig.model_validate({"neck_channels": 32, "head_convs": 1, **settings})
    model: RetinaNet = build(config, num_classes)
    logits, deltas, anchors = [], [], []
    for level in levels:
        cells = math.ceil(len(level) / model.num_slots)
        spare = cells * model.num_slots - len(level)  # slots of the last cell that score nothing
        of_anchor = torch.tensor([scores for _, scores in level] + spare * [[LOW] * num_classes])
        # (cells * A, K) -> (A * K, 1, cells)
        logits.append(of_anchor.view(cells, model.num_slots * num_classes).T[:, None])
        deltas.append(torch.zeros(model.num_slots * 4, 1, cells))
        anchors.append(torch.tensor([box for box, _ in level] + spare * [WHOLE], dtype=torch.float32))
    return survivors(model.postprocess(logits, deltas, torch.cat(anchors), SIZE_HW))


def test_retinanet_keeps_scores_above_the_threshold_only() -> None:
    boxes = apart(4)
    above, below = 0.001, -0.001  # sigmoid(x) = 0.5 + x / 4
    level = [(boxes[0], [above, LOW]), (boxes[1], [HALF, HALF]), (boxes[2], [below, 1.0]), (boxes[3], [2.0, 3.0])]
    # The second box scores 0.5 in both classes, which is not above 0.5; of the last one both classes survive.
    assert retinanet([level], score_threshold=0.5) == [(boxes[3], 1), (boxes[3], 0), (boxes[2], 1), (boxes[0], 0)]
    # By default 0.05: logit -2.94444 is 0.05 to six digits, -2.93 is 0.0507, -2.96 is 0.0493.
    level = [(boxes[0], [-2.96, -2.93]), (boxes[1], [-2.93, -2.96])]
    assert retinanet([level]) == [(boxes[0], 1), (boxes[1], 0)]


def test_retinanet_takes_the_best_of_each_level_and_of_equals_the_first() -> None:
    boxes = apart(9)
    first = [(boxes[0], [1.0, 3.0]), (boxes[1], [2.0, 2.0]), (boxes[2], [LOW, 2.0])]
    second = [(boxes[3], [LOW, 0.5]), (boxes[4], [0.25, LOW])]
    # The first level has 3, 2, 2, 2, 1: its best three are 3 and the first two 2s, both of the second box.
    expected = [(boxes[0], 1), (boxes[1], 0), (boxes[1], 1), (boxes[3], 1), (boxes[4], 0)]
    assert retinanet([first, second], detections_per_level=3) == expected
    assert retinanet([first, second], detections_per_level=1) == [expected[0], expected[3]]


def test_retinanet_takes_a_thousand_of_a_level_by_default() -> None:
    boxes = apart(1320)
    # The boxes of the second level are worse than the 300 that the first level leaves out.
    first, second = (
        [(box, [logit - below]) for box, logit in zip(some, falling(len(some)), strict=True)]
        for some, below in ((boxes[:1300], 0.0), (boxes[1300:], 3.5))
    )
    found = retinanet([first, second], max_detections=2000)
    assert found == [(box, 0) for box in boxes[:1000] + boxes[1300:]]


def test_retinanet_suppresses_above_the_iou_within_a_class_only() -> None:
    level = [(WHOLE, [3.0, LOW]), (EXACTLY_HALF, [2.0, LOW]), (MORE, [1.0, 0.5])]
    # MORE overlaps both boxes of class 0 by more than half (the second one by 200 / 220); in class 1 it is alone.
    assert retinanet([level]) == [(WHOLE, 0), (EXACTLY_HALF, 0), (MORE, 1)]
    # 0.55 is not above 0.56, but 200 / 220 = 0.91 is. Across levels it is the same.
    assert retinanet([level[:2], level[2:]], nms_iou=0.56) == [(WHOLE, 0), (EXACTLY_HALF, 0), (MORE, 1)]
    assert retinanet([level[:1], level[2:]], nms_iou=0.56) == [(WHOLE, 0), (MORE, 0), (MORE, 1)]
    assert retinanet([level], nms_iou=0.95) == [(WHOLE, 0), (EXACTLY_HALF, 0), (MORE, 0), (MORE, 1)]


def test_retinanet_finds_a_hundred_at_most() -> None:
    boxes = apart(150)
    level = [(box, [logit]) for box, logit in zip(boxes, falling(150), strict=True)]
    assert retinanet([level]) == [(box, 0) for box in boxes[:100]]
    assert retinanet([level[75:], level[:75]], max_detections=7) == [(box, 0) for box in boxes[:7]]


# ---- FCOS ----

# (x, y, logits of the classes, logit of the centerness) of each point, level by level. All sides are 1 = exp(0), so a
# box is the 2 x 2 px around its point, less where the image ends.
Points = list[tuple[float, float, list[float], float]]
SURE = 30.0  # a centerness of 1 in float32


def fcos(levels: list[Points], **settings: Any) -> list[tuple[list[float], int]]:
    """Let FCOS detect in these points, one row of cells to a level."""
    config = FCOSConfig.model_validate({"neck_channels": 64, "head_convs": 1, **settings})
    model: FCOS = build(config, len(levels[0][0][2]))
    logits = [torch.tensor([point[2] for point in level]).T[:, None] for level in levels]  # (K, 1, cells)
    centerness = [torch.tensor([[[point[3] for point in level]]]) for level in levels]
    log_sides = [torch.zeros(4, 1, len(level)) for level in levels]
    points = torch.tensor([point[:2] for level in levels for point in level])
    return survivors(model.postprocess(logits, centerness, log_sides, points, SIZE_HW))


def around(x: float, y: float) -> list[float]:
    return [max(x - 1, 0), max(y - 1, 0), x + 1, y + 1]


def test_fcos_keeps_class_scores_above_the_threshold_whatever_the_centerness() -> None:
    level: Points = [
        (5.0, 5.0, [HALF, 2.0], SURE),  # 0.5 is not above 0.5
        (15.0, 5.0, [0.001, LOW], -3.0),  # 0.50025 is, although the score is 0.50025 * 0.047 in the end
        (25.0, 5.0, [-0.001, LOW], SURE),  # 0.49975 is not
    ]
    assert fcos([level], score_threshold=0.5) == [(around(5, 5), 1), (around(15, 5), 0)]


def test_fcos_takes_the_best_class_scores_of_each_level() -> None:
    first: Points = [
        (5.0, 5.0, [2.0, 1.0], SURE),
        (15.0, 5.0, [3.0, LOW], -2.0),
        (25.0, 5.0, [2.0, 2.0], 1.0),
    ]
    second: Points = [(35.0, 5.0, [0.5, LOW], SURE)]
    # Logits of the first level: 3, 2 (first point), 2, 2 (third), 1. The best three, of equals the first ones, are
    # those of the second, the first and the third point in class 0. By score: sigmoid(2) = 0.88;
    # 0.88 * sigmoid(1) = 0.64; sigmoid(0.5) = 0.62; sigmoid(3) * sigmoid(-2) = 0.11.
    expected = [(around(5, 5), 0), (around(25, 5), 0), (around(35, 5), 0), (around(15, 5), 0)]
    assert fcos([first, second], detections_per_level=3) == expected
    # The best class score alone, although it is the worst score in the end
    assert fcos([first, second], detections_per_level=1) == [expected[2], expected[3]]


def test_fcos_takes_a_thousand_of_a_level_by_default() -> None:
    corners = apart(1320)
    first, second = (
        [
            (box[0] + 1.0, box[1] + 1.0, [logit - below], SURE)
            for box, logit in zip(some, falling(len(some)), strict=True)
        ]
        for some, below in ((corners[:1300], 0.0), (corners[1300:], 3.5))
    )
    found = fcos([first, second], max_detections=2000)
    assert found == [(around(point[0], point[1]), 0) for point in first[:1000] + second]


def test_fcos_suppresses_above_the_iou_by_the_score_with_centerness() -> None:
    # [0, 0, 2, 2], then [0, 0, 1, 2], 2 / 4 = 0.5 of it, and [0, 0, 1.125, 2], 2.25 / 4 = 0.56 of the first
    level: Points = [(1.0, 1.0, [1.0], SURE), (0.0, 1.0, [0.5], SURE), (0.125, 1.0, [0.25], SURE)]
    assert fcos([level]) == [(around(1, 1), 0), (around(0, 1), 0)]
    # The third's 0.56 is above the first's 0.73 * sigmoid(-1) = 0.20 and the second's 0.17 now, and it suppresses both:
    # its overlaps are 2.25 / 4 and 2 / 2.25 = 0.89.
    level = [(x, y, logits, -1.0 if x != 0.125 else SURE) for x, y, logits, _ in level]
    assert fcos([level]) == [(around(0.125, 1), 0)]
    assert fcos([level], nms_iou=0.7) == [(around(0.125, 1), 0), (around(1, 1), 0)]


def test_fcos_finds_a_hundred_at_most() -> None:
    level: Points = [
        (box[0] + 1.0, box[1] + 1.0, [logit], SURE) for box, logit in zip(apart(150), falling(150), strict=True)
    ]
    assert fcos([level]) == [(around(point[0], point[1]), 0) for point in level[:100]]
    assert fcos([level[75:], level[:75]], max_detections=7) == [(around(p[0], p[1]), 0) for p in level[:7]]


# ---- Faster and Mask R-CNN ----


class Fixed(nn.Module):
    """Stands for a predictor: gives out what it was made with, row by row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, features: Tensor) -> Tensor:
        assert len(features) == len(self.rows)
        return self.rows


@pytest.fixture(params=[FasterRCNNConfig, MaskRCNNConfig])
def rcnn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let an R-CNN detect with these boxes as unmoved proposals and these logits, background last."""

    def run(rois: list[tuple[list[float], list[float]]], **settings: Any) -> list[tuple[list[float], int]]:
        num_classes = len(rois[0][1]) - 1
        small = {"neck_channels": 32, "head_convs": 1, "head_features": 32, "pool_size": 2}
        model = build(request.param.model_validate({**small, **settings}), num_classes)
        boxes = torch.tensor([box for box, _ in rois], dtype=torch.float32)
        monkeypatch.setattr(model.rpn, "propose", lambda output, sizes_hw, per_level, count: [boxes])
        model.class_predictor = Fixed(torch.tensor([logits for _, logits in rois]))
        model.box_predictor = Fixed(torch.zeros(len(rois), 4 * num_classes))
        (found,) = model.detect(ImageBatch(torch.zeros(1, 3, 416, 608), (SIZE_HW,)))
        assert (found.masks is None) == (request.param is FasterRCNNConfig)
        assert found.masks is None or len(found.masks) == len(found.boxes)
        return survivors(found)

    return run


def test_rcnn_keeps_scores_above_the_threshold_only(rcnn: Any) -> None:
    boxes = apart(3)
    # softmax(0, 0, -30) = 0.5, 0.5, 1e-13: not above 0.5. With 0.001 more 0.50025 is, with 0.002 less the other one.
    rois = [(boxes[0], [0.0, 0.0, LOW]), (boxes[1], [0.001, 0.0, LOW]), (boxes[2], [-0.002, 0.0, LOW])]
    assert rcnn(rois, score_threshold=0.5) == [(boxes[2], 1), (boxes[1], 0)]
    # Background counts in the sum and is never found: softmax(0, -30, 4) = 0.018, 1e-15, 0.982.
    assert rcnn([(boxes[0], [0.0, LOW, 4.0])]) == []
    # By default 0.05: softmax(0, 2.93) = 0.0507 and softmax(0, 2.96) = 0.0493, of two classes both pass.
    rois = [(boxes[0], [0.0, LOW, 2.93]), (boxes[1], [0.0, LOW, 2.96]), (boxes[2], [2.0, 1.0, 0.0])]
    assert rcnn(rois) == [(boxes[2], 0), (boxes[2], 1), (boxes[0], 0)]


def test_rcnn_suppresses_above_the_iou_within_a_class_only(rcnn: Any) -> None:
    # Scores of class 0: 0.953, 0.881, 0.665; of class 1 in the last: 0.245
    rois = [(WHOLE, [3.0, LOW, 0.0]), (EXACTLY_HALF, [2.0, LOW, 0.0]), (MORE, [2.0, 1.0, 0.0])]
    assert rcnn(rois) == [(WHOLE, 0), (EXACTLY_HALF, 0), (MORE, 1)]
    # 220 / 400 is not above 0.56, 200 / 220 is
    assert rcnn([rois[0], rois[2]], nms_iou=0.56) == [(WHOLE, 0), (MORE, 0), (MORE, 1)]
    assert rcnn(rois, nms_iou=0.56) == [(WHOLE, 0), (EXACTLY_HALF, 0), (MORE, 1)]


def test_rcnn_finds_a_hundred_at_most_and_of_equals_the_first(rcnn: Any) -> None:
    boxes = apart(150)
    rois = [(box, [logit, LOW, 0.0]) for box, logit in zip(boxes, falling(150), strict=True)]
    assert rcnn(rois) == [(box, 0) for box in boxes[:100]]
    # Both classes of a box score alike, 0.49: box by box, class 0 before class 1
    rois = [(box, [3.0, 3.0, 0.0]) for box in boxes[:5]]
    assert rcnn(rois, max_detections=3) == [(boxes[0], 0), (boxes[0], 1), (boxes[1], 0)]


# ---- DETR ----


def detr(queries: list[tuple[list[float], list[float]]], **settings: Any) -> list[tuple[list[float], int]]:
    """Let DETR detect with queries that predict these boxes and logits, "no object" last."""
    small = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 32}
    config = DETRConfig.model_validate({**small, "num_queries": len(queries), **settings})
    model: DETR = build(config, len(queries[0][1]) - 1)
    side = 1024.0  # a power of two: relative and back without rounding
    x1, y1, x2, y2 = (torch.tensor([box for box, _ in queries], dtype=torch.float32) / side).unbind(1)
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1)
    return survivors(model.postprocess(torch.tensor([logits for _, logits in queries]), boxes, (1024, 1024)))


def test_detr_suppresses_nothing_and_a_query_has_its_best_class_only() -> None:
    queries = [(WHOLE, [2.0, 1.0, 0.0]), (WHOLE, [1.0, 3.0, 0.0]), (MORE, [LOW, LOW, 0.0])]
    # Class 1 of the second query 0.84, class 0 of the first 0.67; "no object" is certain in the third, and it counts.
    assert detr(queries) == [(WHOLE, 1), (WHOLE, 0), (MORE, 0)]


def test_detr_keeps_scores_from_the_threshold_on() -> None:
    """The threshold is ours, mmdetection has none: at it a score is kept, so that 0, the default, keeps all."""
    boxes = apart(3)
    # softmax(0, 0) = 0.5, a little more and a little less; softmax(-200, 0) is 0 in float32
    queries = [(boxes[0], [0.0, 0.0]), (boxes[1], [0.001, 0.0]), (boxes[2], [-0.001, 0.0])]
    assert detr(queries, score_threshold=0.5) == [(boxes[1], 0), (boxes[0], 0)]
    assert detr([(boxes[0], [-200.0, 0.0])]) == [(boxes[0], 0)]


def test_detr_finds_a_hundred_at_most_and_of_equals_the_first() -> None:
    boxes = apart(150)
    queries = [(box, [logit, 0.0]) for box, logit in zip(boxes, falling(150), strict=True)]
    assert detr(queries) == [(box, 0) for box in boxes[:100]]
    queries = [(boxes[0], [0.0, 0.0])] + [(box, [1.0, 0.0]) for box in boxes[1:6]]
    assert detr(queries, max_detections=3) == [(box, 0) for box in boxes[1:4]]
