"""FCOS against numbers computed with mmdetection and the authors' code; see golden/README.md.

The official pre-training embeds a point's 3x3 neighbourhood of class features (conv3x3, ReLU, conv1x1), ours the point
alone. Here the official projector is applied to our class maps, so that embeddings and losses can be compared; the
features that the detector itself hands over are compared with those maps.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aligndet_cli.detectors.fcos import FCOS, FCOSConfig, compute_centerness
from aligndet_cli.detectors.parts.cells import gather_cells, grids_of
from aligndet_cli.detectors.parts.points import measure_sides
from aligndet_cli.tools.conversion import mmdet
from aligndet_cli.tools.conversion.rules import translate
from helpers.golden import (
    GOLDEN,
    assert_gradients_equal,
    assert_losses_equal,
    assert_maps_equal,
    build,
    check_supervised,
    contrastive_loss,
    draw_pretext_images,
    draw_pretext_weights,
    draw_weights,
    import_drawn,
    matched_ids,
    read_pretext_boxes,
    split_projector,
)

ALL_POINTS = 100_000
PROJECTOR = "bbox_head.conv_cls."
SCALES = "bbox_head.scales."


def our_name(name: str) -> str:
    """With the number of the level where each has a scale of its own there, and ours are one vector."""
    if name.startswith(SCALES):
        return f"head.scales.factors:{name.split('.')[2]}"
    return translate(name, mmdet.RULES["fcos"], to_ours=True)


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((GOLDEN / "fcos.json").read_text())


@pytest.fixture(scope="module")
def pretext_weights() -> dict[str, dict[str, np.ndarray]]:
    return draw_pretext_weights(partial(draw_weights, "g2_fcos_weights.json"))


class View:
    """One network on one view, with the official projector applied to its class maps."""

    def __init__(self, case: str, net: str, stored: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
        self.projector, body = split_projector(weights, PROJECTOR)
        self.model = build(FCOSConfig(neck_norm="none", pretext_samples=ALL_POINTS), "resnet18", body)
        self.model.backbone.requires_grad_(False)
        view = "view1" if net == "online" else "view2"
        self.images = draw_pretext_images("fcos", case, view, stored)
        self.targets = read_pretext_boxes(case, view, stored)
        features = self.model.extract(self.images)
        self.pyramid = self.model.neck(features.maps)
        self.class_maps = [self.model.head.class_tower(level) for level in self.pyramid]
        self.matched = self.model.assign(self.pyramid, self.targets)
        self.candidates = self.model.box_candidates(features, self.targets, with_losses=net == "online")

    def sampled(self) -> tuple[Tensor, Tensor]:
        """Image and point of the candidates: all positives, then all others."""
        flat = torch.cat([(self.matched.flatten() >= 0).nonzero(), (self.matched.flatten() < 0).nonzero()]).squeeze(1)
        return flat // self.matched.shape[1], flat % self.matched.shape[1]

    def embedding_maps(self) -> list[Tensor]:
        """(B, 256, H, W) per level, before normalisation."""
        p = self.projector
        hidden = [functional.conv2d(m, p["0.weight"], p["0.bias"], padding=1).relu() for m in self.class_maps]
        return [functional.conv2d(m, p["2.weight"], p["2.bias"]) for m in hidden]


@pytest.fixture(scope="module", params=["b1_strides8", "b2_strides8", "ragged_strides8"])
def views(request: pytest.FixtureRequest, pretext_weights: dict) -> tuple[str, dict, dict[str, View]]:
    case = request.param
    stored = dict(np.load(GOLDEN / "g2_fcos.npz"))
    return case, stored, {net: View(case, net, stored, pretext_weights[net]) for net in ("online", "target")}


def test_pretext_maps(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        assert_maps_equal(view.pyramid, stored, f"{case}/{net}/fpn")
        assert_maps_equal(view.embedding_maps(), stored, f"{case}/{net}/emb")
    online = by_net["online"]
    sides = [level.exp() for level in online.model.predict_log_sides(online.pyramid)]
    assert_maps_equal(sides, stored, f"{case}/online/reg")
    assert_maps_equal(online.model.predict_centerness(online.class_maps), stored, f"{case}/online/ctr")


def test_pretext_assignment_is_identical(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        ids = matched_ids(view.matched, [of_image.instance_ids for of_image in view.targets])
        assert np.array_equal(ids, stored[f"{case}/{net}/instance_ids"])


def test_pretext_box_targets(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        boxes = torch.cat([t.boxes[m[m >= 0]] for m, t in zip(view.matched, view.targets, strict=True)])
        points = view.model.points(grids_of(view.pyramid))[(view.matched >= 0).nonzero()[:, 1]]
        sides = measure_sides(points, boxes)
        assert np.array_equal(sides, stored[f"{case}/{net}/pos_sides"])
        np.testing.assert_allclose(compute_centerness(sides), stored[f"{case}/{net}/pos_centerness"], rtol=1e-5)


def test_pretext_candidates(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        image_index, point_index = view.sampled()
        expected_ids = stored[f"{case}/{net}/instance_ids"][image_index, point_index]
        assert np.array_equal(view.candidates.instance_ids, expected_ids)
        assert not view.candidates.slots.any()
        features = gather_cells(view.class_maps, image_index, point_index)
        assert torch.equal(view.candidates.features, features)
        norms = gather_cells(view.embedding_maps(), image_index, point_index)[expected_ids >= 0].norm(dim=1)
        np.testing.assert_allclose(norms.detach(), stored[f"{case}/{net}/pos_emb_norm"], rtol=1e-4)


def test_pretext_losses_and_gradients(views: tuple, numbers: dict) -> None:
    case, _, by_net = views
    online, target = by_net["online"], by_net["target"]
    losses, expected = online.candidates.losses, numbers[case]["losses"]
    assert set(losses) == {"loss_box_reg", "loss_centerness"}
    assert_losses_equal(losses, expected)
    query, key = (gather_cells(view.embedding_maps(), *view.sampled()) for view in (online, target))
    contrast = contrastive_loss(query, online.candidates.instance_ids, key, target.candidates.instance_ids)
    assert contrast.item() == pytest.approx(expected["loss_cls"], rel=1e-5)
    total = contrast + sum(losses.values())
    assert total.item() == pytest.approx(numbers[case]["total"], rel=1e-5)
    total.backward()
    projector = {PROJECTOR + name: weight for name, weight in online.projector.items()}
    assert_gradients_equal(online.model, numbers[case]["grad_norms"], our_name, projector)


@pytest.fixture(scope="module")
def supervised() -> FCOS:
    model = import_drawn(draw_weights("g3_fcos_weights.json", 303))
    model.backbone.freeze(1, norm_eval=True)
    return model.eval()


@pytest.mark.parametrize("case", ["eq", "ragged"])
def test_supervised_losses_detections_and_gradients(case: str, supervised: FCOS) -> None:
    def head_maps(pyramid: list[Tensor]) -> dict[str, list[Tensor]]:
        class_maps = [supervised.head.class_tower(level) for level in pyramid]
        return {
            "cls": [supervised.class_predictor(level) for level in class_maps],
            "ctr": supervised.predict_centerness(class_maps),
            "reg": [level.exp() for level in supervised.predict_log_sides(pyramid)],
        }

    assign = lambda pyramid, images, targets: supervised.assign(pyramid, targets)  # noqa: E731
    check_supervised(supervised, "fcos", case, assign=assign, our_name=our_name, head_maps=head_maps)
