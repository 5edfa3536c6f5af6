"""DETR in plain PyTorch: a transformer that turns one feature map into a set of boxes, without anchors or NMS.

Source: Carion et al., ECCV 2020; facebookresearch/detr and mmdetection's `detr_r50`, which agree to rounding.
AlignDet's configs build on the latter.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import box_convert, clip_boxes_to_image

from aligndet_cli.backbones import Backbone
from aligndet_cli.config import Frozen
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features, weigh_assistant
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.detectors.parts.hungarian import MatchCosts, find_matched, match_queries, to_relative
from aligndet_cli.detectors.parts.matching import all_instance_ids, look_up
from aligndet_cli.detectors.parts.transformer import LayerSize, Transformer, encode_position
from aligndet_cli.training.recipe import Freezing, ProjectorRecipe, Rates, Recipe

_RATES = Rates(
    lr=1e-4,
    weight_decay=1e-4,
    origin="DETR recipe",
    optimizer="adamw",
    schedule="50e",
    warmup="none",
    clip_norm=0.1,
    backbone_lr_scale=0.1,
)

GIOU_EPS = 1e-7  # torchvision's


class DETRConfig(Frozen):
    """DETR; defaults are those of the paper, facebookresearch/detr and mmdetection, which agree."""

    RECIPE: ClassVar[Recipe] = Recipe(
        pretrain=replace(_RATES, lr=2e-4, origin="DETR pre-training recipe", batch_size=64, backbone_lr_scale=1.0),
        finetune=replace(_RATES, origin="DETR recipe after pre-training"),
        plain=_RATES,
        topk=50,  # the authors' selfsup/detr.py, SelectTopKProposals; half of the queries
        needs_clusters=True,
        momentum_follows=("query_embedding.weight",),
        projector=ProjectorRecipe(start="torch"),
        freezing=Freezing(-1, norm_eval=False),  # coco/detr_r50_8x2_150e_coco.py
        policy="detr",
    )

    family: Literal["detr"] = Field("detr", description="Detector family.")
    num_queries: int = Field(100, ge=1, description="Number of queries, each of which may find one object.")
    hidden_dim: int = Field(256, ge=4, description="Width of the transformer.")
    num_heads: int = Field(8, ge=1, description="Number of attention heads.")
    encoder_layers: int = Field(6, ge=1, description="Layers of the encoder.")
    decoder_layers: int = Field(6, ge=1, description="Layers of the decoder.")
    feedforward_dim: int = Field(2048, ge=1, description="Width of the feed-forward layers.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Rate of dropout in the transformer.")
    pre_norm: bool = Field(
        False, description="Norms before attention and perceptron, as in UP-DETR and DETReg, not after."
    )
    class_weight: float = Field(1.0, ge=0, description="Weight of the class in matching and loss.")
    box_weight: float = Field(5.0, ge=0, description="Weight of the L1 distance of boxes in matching and loss.")
    giou_weight: float = Field(2.0, ge=0, description="Weight of the GIoU of boxes in matching and loss.")
    # Not used in pre-training.
    background_weight: float = Field(0.1, gt=0, description="Weight of the class for no object in the loss.")
    score_threshold: float = Field(0.0, ge=0, le=1, description="Least score of a detection; at 0 every query is one.")
    max_detections: int = Field(100, ge=1, description="Best N detections per image.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise ValueError("hidden_dim must be a multiple of num_heads and of 4")
        return self

    def build(self, backbone: Backbone, num_classes: int) -> "DETR":
        """Build a DETR around `backbone`; everything else has fresh weights."""
        return DETR(self, backbone, num_classes)


class DETR(Detector):
    """A fixed number of queries, each of which finds one object or nothing.

    `forward` returns scalars, each summed over the decoder layers:
        loss_cls: cross-entropy over K classes and "no object", weighted mean over the queries of the batch.
        loss_box_reg: L1 distance of relative boxes, per matched query.
        loss_giou: 1 - GIoU, per matched query.

    Each query of the last decoder layer is one detection, of its best class; its score is a softmax probability.
    """

    levels = ("c5",)
    box_branch = ("box_tower", "box_predictor")

    def __init__(self, config: DETRConfig, backbone: Backbone, num_classes: int) -> None:
        dim = config.hidden_dim
        super().__init__(backbone, feature_dim=dim)
        self.config = config
        self.costs = MatchCosts(config.class_weight, config.box_weight, config.giou_weight)
        # The transformer comes before the neck in the draws of initial weights, and after it among the parameters.
        size = LayerSize(dim, config.num_heads, config.feedforward_dim, config.dropout, config.pre_norm)
        transformer = Transformer(size, config.encoder_layers, config.decoder_layers)
        self.neck = nn.Conv2d(backbone.use_levels(self.levels)["c5"], dim, 1)
        self.transformer = transformer
        self.query_embedding = nn.Embedding(config.num_queries, dim)
        self.class_predictor = nn.Linear(dim, num_classes + 1)  # "no object" last
        self.box_tower = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.box_predictor = nn.Linear(dim, 4)
        self.num_classes = num_classes

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        features = self.extract(images, with_assistant=True)
        found = (self.losses_of(self.decode(one), targets, one.sizes_hw)[0] for one in features.one_by_one())
        return weigh_assistant(list(found))

    def losses_of(
        self, hidden: Tensor, targets: Sequence[BoxTargets], sizes_hw: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the scalar losses of (L, B, Q, C) query states by name, and the matches, see `assign`."""
        logits, boxes = self.predict(hidden)
        matched = self.assign(logits, boxes, targets, sizes_hw)
        losses = {"loss_cls": self.class_loss(logits, matched, targets)}
        losses |= self.box_losses(boxes, matched, targets, sizes_hw)
        return {name: loss.sum() for name, loss in losses.items()}, matched

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""
        logits, boxes = self.predict(self.decode(self.extract(images))[-1:])
        return [self.postprocess(logits[0, i], boxes[0, i], size_hw) for i, size_hw in enumerate(images.sizes_hw)]

    @torch.no_grad()
    def find_objects(self, images: ImageBatch) -> list[Detections]:
        """Return one box per query of each image, best first; its score is the probability that there is an object."""
        logits, boxes = self.predict(self.decode(self.extract(images))[-1:])
        scores = 1 - logits[0].softmax(dim=-1)[..., -1]  # (B, Q), "no object" is last
        orders = scores.argsort(dim=1, descending=True, stable=True)
        return [
            Detections(to_corners(of_image[order], size_hw), score[order], torch.zeros_like(order))
            for of_image, score, order, size_hw in zip(boxes[0], scores, orders, images.sizes_hw, strict=True)
        ]

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return all queries of all decoder layers, layer by layer and image by image.

        The proposals' `class_ids` are clusters: they take part in the matching, and train the class predictor. The
        losses are those of `forward`, and the same matching serves them and the contrast.

        Source: the official code matches a second time for the contrast, with instance ids in place of cluster ids,
            which makes the class part of that cost meaningless (docs/differences.md 19).
        """
        hidden = self.decode(features)  # (L, B, Q, C)
        logits, boxes = self.predict(hidden)
        matched = self.assign(logits, boxes, proposals, features.sizes_hw)
        losses = {}
        if with_losses:
            losses["loss_cls"] = self.cluster_loss(logits, matched, proposals)
            losses |= self.box_losses(boxes, matched, proposals, features.sizes_hw)
        return BoxCandidates(
            features=hidden.flatten(0, 2),
            slots=torch.zeros(matched.numel(), dtype=torch.int64, device=matched.device),
            instance_ids=look_up(matched, all_instance_ids(proposals)).flatten(),
            losses={name: loss.sum() for name, loss in losses.items()},
        )

    def decode(self, features: Features, queries: Tensor | None = None, blocked: Tensor | None = None) -> Tensor:
        """Return the state of each query after each decoder layer: (L, B, Q, C).

        Args:
            features: of the images.
            queries: (B, Q, C) of each image by itself; None takes the learned ones for all.
            blocked: (Q, Q) bool, True where two queries must not see each other.
        """
        cells = self.neck(features.maps["c5"])  # (B, C, H, W)
        is_inside = inside_cells(cells, send(features.sizes_hw, cells.device), features.batch_hw)
        return self.attend(cells, is_inside, queries, blocked)

    def attend(
        self, cells: Tensor, is_inside: Tensor, queries: Tensor | None = None, blocked: Tensor | None = None
    ) -> Tensor:
        """Return (L, B, Q, C) as `decode`, from the neck's (B, C, H, W) map and (B, H, W) bool, False on padding."""
        position = encode_position(is_inside, self.feature_dim)  # (B, H, W, C)
        return self.transformer(
            cells.flatten(2).transpose(1, 2),
            position.flatten(1, 2),
            ~is_inside.flatten(1),
            self.query_embedding.weight if queries is None else queries,
            blocked,
        )

    def predict(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes of (L, B, Q, C) query states.

        Returns:
            (L, B, Q, K + 1) logits, "no object" last, and (L, B, Q, 4) centre x, centre y, width, height as shares of
            the image without padding; both float32.
        """
        return self.class_predictor(hidden).float(), self.box_predictor(self.box_tower(hidden)).float().sigmoid()

    def assign(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[BoxTargets], sizes_hw: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Match each query to a box of the batch: (L, B, Q) int64, see `match_queries`."""
        return match_queries(logits, boxes, targets, sizes_hw, self.costs)

    def class_loss(self, logits: Tensor, matched: Tensor, targets: Sequence[BoxTargets]) -> Tensor:
        """Return the weighted mean of the cross-entropy over the queries of the batch: (L,)."""
        losses, is_object = self._cross_entropy(logits, matched, targets)
        weights = torch.where(is_object, 1.0, self.config.background_weight)
        return self.costs.class_weight * (losses * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))

    def cluster_loss(self, logits: Tensor, matched: Tensor, proposals: Sequence[BoxTargets]) -> Tensor:
        """Return (L,): the cross-entropy over clusters and "no object", summed over queries, by the matched queries.

        Source: the official pre-training, where "no object" has weight 1 and is not counted in the divisor
            (docs/differences.md 26).
        """
        losses, is_object = self._cross_entropy(logits, matched, proposals)
        return self.costs.class_weight * losses.sum(dim=(1, 2)) / is_object.sum(dim=(1, 2)).clamp(min=1)

    def _cross_entropy(self, logits: Tensor, matched: Tensor, targets: Sequence[BoxTargets]) -> tuple[Tensor, Tensor]:
        """Return the (L, B, Q) cross-entropy, and (L, B, Q) bool: True for queries that have a box."""
        class_ids = look_up(matched, torch.cat([of_image.class_ids for of_image in targets]))
        is_object = matched >= 0
        class_ids = torch.where(is_object, class_ids, self.num_classes)
        losses = cross_entropy(logits.flatten(0, 2), class_ids.flatten(), reduction="none")
        return losses.view_as(matched), is_object

    def box_losses(
        self, boxes: Tensor, matched: Tensor, targets: Sequence[BoxTargets], sizes_hw: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Return `loss_box_reg` and `loss_giou`, (L,) each, from (L, B, Q, 4) boxes and (L, B, Q) matches."""
        layer, image, query = find_matched(matched, targets)  # (L * P,) each
        relative = torch.cat([to_relative(t.boxes, size_hw) for t, size_hw in zip(targets, sizes_hw, strict=True)])
        predicted, wanted = boxes[layer, image, query], relative[matched[layer, image, query]]  # (L * P, 4)
        scale = send([[width, height, width, height] for height, width in sizes_hw], boxes.device)[image]
        # In pixels: GIoU does not depend on the scale, but torchvision's epsilon acts on the area.
        corners = [box_convert(some * scale, "cxcywh", "xyxy") for some in (predicted, wanted)]
        overlap = giou_loss(corners[0], corners[1])  # (L * P,)
        distance = (predicted - wanted).abs().sum(dim=1)
        by_layer = {"loss_box_reg": distance.view(len(boxes), -1), "loss_giou": overlap.view(len(boxes), -1)}
        weights = {"loss_box_reg": self.costs.box_weight, "loss_giou": self.costs.giou_weight}
        return {name: weights[name] * loss.sum(1) / max(loss.shape[1], 1) for name, loss in by_layer.items()}

    def postprocess(self, logits: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> Detections:
        """Return the detections of one image, from its (Q, K + 1) logits and (Q, 4) relative boxes."""
        scores, class_ids = logits.softmax(dim=-1)[:, :-1].max(dim=-1)
        order = scores.argsort(descending=True, stable=True)[: self.config.max_detections]
        order = order[scores[order] >= self.config.score_threshold]
        return Detections(to_corners(boxes[order], size_hw), scores[order], class_ids[order])


def giou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Return (N,) 1 - GIoU of pairs of boxes, (N, 4) xyxy each.

    Source: torchvision's `generalized_box_iou_loss`, which it equals to the bit. That makes the host wait for a GPU,
    to pick the boxes that overlap.
    """
    x1, y1, x2, y2 = predicted.unbind(dim=1)
    left, top, right, bottom = wanted.unbind(dim=1)
    inner_x1, inner_y1 = torch.max(x1, left), torch.max(y1, top)
    inner_x2, inner_y2 = torch.min(x2, right), torch.min(y2, bottom)
    overlaps = (inner_y2 > inner_y1) & (inner_x2 > inner_x1)
    shared = torch.where(overlaps, (inner_x2 - inner_x1) * (inner_y2 - inner_y1), 0.0)
    union = (x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - shared
    outer_x1, outer_y1 = torch.min(x1, left), torch.min(y1, top)
    outer_x2, outer_y2 = torch.max(x2, right), torch.max(y2, bottom)
    hull = (outer_x2 - outer_x1) * (outer_y2 - outer_y1)
    return 1 - (shared / (union + GIOU_EPS) - (hull - union) / (hull + GIOU_EPS))


def to_corners(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return (N, 4) xyxy boxes in pixels, clipped to the image, from (N, 4) relative centre, width and height."""
    height, width = size_hw
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
    return clip_boxes_to_image(corners, size_hw)


def inside_cells(cells: Tensor, sizes: Tensor, batch_hw: tuple[int, int]) -> Tensor:
    """Return (B, H, W) bool: True where the top left pixel of a cell of a (B, C, H, W) map is not padding.

    Source: nearest interpolation of a mask of pixels, as in the official code.

    Args:
        cells: the map.
        sizes: (B, 2) height and width of each image in pixels, without padding.
        batch_hw: height and width of the padded batch in pixels.
    """
    rows, columns = (
        torch.arange(count, device=cells.device) * side // count
        for count, side in zip(cells.shape[-2:], batch_hw, strict=True)
    )
    return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
