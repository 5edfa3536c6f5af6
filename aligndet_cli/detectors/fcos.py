"""FCOS from torchvision's parts with mmdetection's defaults.

Source: Tian et al., ICCV 2019; mmdetection `fcos_r50_caffe_fpn_gn-head`, which AlignDet's configs build on.
torchvision's FCOS has the same towers but other points, ranges, centre sampling, box regression, box loss, input of
the centerness and scores.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from aligndet_cli.backbones import Backbone
from aligndet_cli.config import Frozen
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features, weigh_assistant
from aligndet_cli.detectors.parts.cells import gather_cells, grids_of
from aligndet_cli.detectors.parts.dense_head import initialise_head, select_scores, sum_focal_loss
from aligndet_cli.detectors.parts.fpn import FPN, NeckNorm, NormName, check_group_channels, conv_tower
from aligndet_cli.detectors.parts.matching import class_ids_of, instance_ids_of, matched_boxes
from aligndet_cli.detectors.parts.points import PointGrid, match_by_range, measure_sides
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.sampling import sample_each_image
from aligndet_cli.training.recipe import Rates, Recipe

# P3..P7. The authors' pre-training has 4..64 instead, so that its points cover a quarter of the image
# (docs/differences.md 10).
STRIDES = (8, 16, 32, 64, 128)
RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))  # to the farthest side, pixels
MIN_IOU = 1e-6  # keeps the logarithm finite


class FCOSConfig(Frozen):
    """FCOS; defaults are mmdetection's unless said otherwise."""

    RECIPE: ClassVar[Recipe] = Recipe(
        # Only the authors' coco/fcos_r50_fpn_1x_coco.py treats biases and large gradients specially.
        pretrain=Rates(0.01, 1e-4, "FCOS pre-training recipe"),
        finetune=Rates(
            0.015, 5e-5, "FCOS recipe after pre-training", clip_norm=35.0, bias_lr_scale=2.0, bias_decay_scale=0.0
        ),
        plain=Rates(0.01, 1e-4, "FCOS recipe", clip_norm=35.0, bias_lr_scale=2.0, bias_decay_scale=0.0),
        topk=70,  # about the number of the paper's proposals (D.1) on a COCO image, see docs/differences.md 5
    )

    family: Literal["fcos"] = Field("fcos", description="Detector family.")
    neck_channels: int = Field(256, ge=1, description="Width of the feature pyramid.")
    head_convs: int = Field(4, ge=0, description="Convolutions of each branch of the head.")
    neck_norm: NeckNorm = "auto"
    head_norm: NormName = Field("group", description="Norm after the convolutions of the head.")
    focal_alpha: float = Field(0.25, ge=0, le=1, description="Weight of positives in the focal loss, 0 to 1.")
    focal_gamma: float = Field(2.0, ge=0, description="Exponent of the focal loss.")
    # The authors' selfsup_fcos_r50_fpn.py has 2,048 for the two images of a GPU (docs/differences.md 16).
    pretext_samples: int = Field(1024, ge=1, description="Points per image in the contrast of pre-training.")
    score_threshold: float = Field(0.05, ge=0, le=1, description="Least class score of a detection, before centerness.")
    detections_per_level: int = Field(1000, ge=1, description="Best N detections per level, before NMS.")
    nms_iou: float = Field(0.5, ge=0, le=1, description="IoU above which the worse of two boxes of a class is dropped.")
    max_detections: int = Field(100, ge=1, description="Best N detections per image.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if "group" in (self.neck_norm, self.head_norm):
            check_group_channels(self.neck_channels)
        return self

    def build(self, backbone: Backbone, num_classes: int) -> "FCOS":
        """Build an FCOS around `backbone`; everything else has fresh weights."""
        return FCOS(self, backbone, num_classes)


class LevelScales(nn.Module):
    """A learned factor for each level, so that one convolution serves boxes of all sizes; FCOS paper §3.2."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(num_levels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Multiply the (B, C, H, W) map of each level by the level's factor, in float32."""
        return [level.float() * factor for level, factor in zip(maps, self.factors, strict=True)]


class FCOSHead(nn.Module):
    """Two towers of 3x3 convolutions, shared by all levels, and a scale for each level; see `conv_tower`."""

    def __init__(self, channels: int, num_convs: int, norm: NormName) -> None:
        super().__init__()
        self.class_tower = conv_tower(channels, num_convs, norm)
        self.box_tower = conv_tower(channels, num_convs, norm)
        self.scales = LevelScales(len(STRIDES))


class FCOS(Detector):
    """Class scores, a box and its centerness for each point of a grid, ordered as in `PointGrid`.

    `forward` returns scalars:
        loss_cls: focal loss of all classes in all points, per positive point.
        loss_box_reg: -ln(IoU) over the positive points, weighted by centerness; 0 if there are none.
        loss_centerness: cross-entropy of the centerness, per positive point; 0 if there are none.

    Scores of detections are class score times centerness; the threshold is on the class score alone.
    """

    levels = ("c3", "c4", "c5")  # the neck makes P3..P7 of them
    box_branch = ("head.box_tower", "head.scales", "box_predictor")  # the class tower serves the centerness, too

    def __init__(self, config: FCOSConfig, backbone: Backbone, num_classes: int) -> None:
        channels = config.neck_channels
        super().__init__(backbone, feature_dim=channels)
        self.config = config
        self.neck = FPN(backbone.use_levels(self.levels), channels, config.neck_norm, extra_levels="from_p5")
        self.head = FCOSHead(channels, config.head_convs, config.head_norm)
        self.points = PointGrid(STRIDES, RANGES)
        self.class_predictor = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_predictor = nn.ModuleDict(
            {
                "sides": nn.Conv2d(channels, 4, 3, padding=1),  # left, top, right, bottom
                "centerness": nn.Conv2d(channels, 1, 3, padding=1),
            }
        )
        initialise_head([self.head, self.class_predictor, self.box_predictor], self.class_predictor)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        features = self.extract(images, with_assistant=True)
        return weigh_assistant([self._losses(one, targets) for one in features.one_by_one()])

    def _losses(self, features: Features, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        pyramid = self.neck(features.maps)
        class_maps = [self.head.class_tower(level) for level in pyramid]
        matched = self.assign(pyramid, targets)
        logits = [self.class_predictor(level) for level in class_maps]
        return {
            "loss_cls": self.class_loss(logits, matched, targets),
            **self.box_losses(pyramid, class_maps, matched, targets, (matched.flatten() >= 0).nonzero()[:, 0]),
        }

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""
        pyramid = self.neck(self.extract(images).maps)
        class_maps = [self.head.class_tower(level) for level in pyramid]
        logits = [self.class_predictor(level) for level in class_maps]
        centerness = self.predict_centerness(class_maps)
        log_sides = self.predict_log_sides(pyramid)
        points = self.points(grids_of(pyramid))
        detections = []
        for i, size_hw in enumerate(images.sizes_hw):
            of_image = [[level[i] for level in maps] for maps in (logits, centerness, log_sides)]
            detections.append(self.postprocess(of_image[0], of_image[1], of_image[2], points, size_hw))
        return detections

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return points sampled from all images together, positives before background.

        There are B * `pretext_samples` of them. The losses are `loss_box_reg` and `loss_centerness`.
        """
        pyramid = self.neck(features.maps)
        class_maps = [self.head.class_tower(level) for level in pyramid]
        matched = self.assign(pyramid, proposals)
        samples = sample_each_image(matched.flatten()[None], self.config.pretext_samples * len(matched))
        (sample,) = samples.places
        instance_ids = instance_ids_of(proposals, matched)
        num_points = matched.shape[1]
        losses = {}
        if with_losses:
            losses = self.box_losses(pyramid, class_maps, matched, proposals, *samples.positives)
            if self.trains_objectness:
                logits = [self.class_predictor(level) for level in class_maps]
                losses["loss_objectness"] = self.class_loss(logits, matched, proposals)
        return BoxCandidates(
            features=gather_cells(class_maps, sample // num_points, sample % num_points),
            slots=torch.zeros_like(sample),
            instance_ids=instance_ids.flatten()[sample],
            losses=losses,
        )

    def predict_centerness(self, class_maps: list[Tensor]) -> list[Tensor]:
        """Return centerness logits, (B, 1, H, W) per level, from the class tower's (B, C, H, W) maps."""
        return [self.box_predictor["centerness"](level) for level in class_maps]

    def predict_log_sides(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return log distances in pixels to left, top, right and bottom of the box: (B, 4, H, W) per level."""
        return self.head.scales([self.box_predictor["sides"](self.head.box_tower(level)) for level in pyramid])

    @torch.no_grad()
    def assign(self, pyramid: list[Tensor], targets: Sequence[BoxTargets]) -> Tensor:
        """Match each point of the P3..P7 maps (B, C, H, W) to a box of its image.

        Points in the padding are background like all others outside of boxes, as in mmdetection.

        Returns:
            (B, P) int64: index of the box or `BACKGROUND`.
        """
        grids_hw = grids_of(pyramid)
        points, ranges = self.points(grids_hw), self.points.ranges_of(grids_hw)
        return match_by_range(points, ranges, [of_image.boxes for of_image in targets])

    def class_loss(self, logits: list[Tensor], matched: Tensor, targets: Sequence[BoxTargets]) -> Tensor:
        """Return the scalar `loss_cls`, from (B, K, H, W) logits per level and (B, P) matches."""
        class_ids = class_ids_of(targets, matched)
        alpha, gamma = self.config.focal_alpha, self.config.focal_gamma
        total = sum_focal_loss(logits, class_ids, self.num_slots, alpha=alpha, gamma=gamma)
        return total / (matched >= 0).sum().clamp(min=1)

    def box_losses(
        self,
        pyramid: list[Tensor],
        class_maps: list[Tensor],
        matched: Tensor,
        targets: Sequence[BoxTargets],
        positives: Tensor,
    ) -> dict[str, Tensor]:
        """Return the scalars `loss_box_reg` and `loss_centerness`.

        Args:
            pyramid: P3..P7, (B, C, H, W) each.
            class_maps: the class tower's outputs on them, (B, C, H, W) each.
            matched: (B, P) as from `assign`.
            targets: boxes of each image.
            positives: (S,) int64 places of the positive points in all B * P.
        """
        num_points = matched.shape[1]
        image_index, point_index = positives // num_points, positives % num_points
        boxes = matched_boxes(targets, matched, image_index, point_index)
        true_sides = measure_sides(self.points(grids_of(pyramid))[point_index], boxes)  # (S, 4)
        sides = gather_cells(self.predict_log_sides(pyramid), image_index, point_index).exp()
        logits = gather_cells(self.predict_centerness(class_maps), image_index, point_index).squeeze(1).float()
        centerness = compute_centerness(true_sides)
        iou = compute_iou_of_sides(sides, true_sides).clamp(min=MIN_IOU)
        return {
            "loss_box_reg": -(iou.log() * centerness).sum() / centerness.sum().clamp(min=MIN_IOU),
            "loss_centerness": binary_cross_entropy_with_logits(logits, centerness, reduction="sum")
            / max(len(centerness), 1),
        }

    def postprocess(
        self,
        logits: list[Tensor],
        centerness: list[Tensor],
        log_sides: list[Tensor],
        points: Tensor,
        size_hw: tuple[int, int],
    ) -> Detections:
        """Return the detections of one image.

        Args:
            logits: (K, H, W) per level.
            centerness: (1, H, W) logits per level.
            log_sides: (4, H, W) per level.
            points: (P, 2) of all levels.
            size_hw: height and width of the image in pixels, without padding.
        """
        boxes, scores, class_ids = [], [], []
        height, width = size_hw
        limits = points.new_tensor([width, height, width, height])
        of_level = points.split([level.shape[-2] * level.shape[-1] for level in logits])
        levels = zip(logits, centerness, log_sides, of_level, strict=True)
        for level_logits, level_centerness, level_sides, level_points in levels:
            score, place, class_id = select_scores(
                level_logits,
                self.num_slots,
                score_threshold=self.config.score_threshold,
                max_scores=self.config.detections_per_level,
            )
            x, y = level_points[place].unbind(dim=1)
            left, top, right, bottom = level_sides.flatten(1)[:, place].exp()
            corners = torch.stack([x - left, y - top, x + right, y + bottom], dim=1)  # (S, 4)
            boxes.append(torch.minimum(corners.clamp(min=0), limits))
            scores.append(score * level_centerness.flatten()[place].float().sigmoid())
            class_ids.append(class_id)
        return select_detections(
            torch.cat(boxes),
            torch.cat(scores),
            torch.cat(class_ids),
            nms_iou=self.config.nms_iou,
            max_detections=self.config.max_detections,
        )


def compute_centerness(sides: Tensor) -> Tensor:
    """Return (S,) centerness, 1 in the middle of a box and 0 on its border, from (S, 4) distances to its sides.

    Source: FCOS paper, eq. 3.
    """
    horizontal, vertical = sides[:, 0::2], sides[:, 1::2]  # (S, 2) left and right, top and bottom
    shares = (horizontal.amin(dim=1) / horizontal.amax(dim=1)) * (vertical.amin(dim=1) / vertical.amax(dim=1))
    return shares.sqrt()


def compute_iou_of_sides(sides: Tensor, true_sides: Tensor) -> Tensor:
    """Return the (S,) IoU of two boxes around each point, both given by (S, 4) positive distances to their sides."""
    intersection = _area(torch.minimum(sides, true_sides))
    return intersection / (_area(sides) + _area(true_sides) - intersection)


def _area(sides: Tensor) -> Tensor:
    return (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])
