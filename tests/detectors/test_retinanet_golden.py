"""RetinaNet against numbers computed with mmdetection and the authors' code; see golden/README.md."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aligndet_cli.detectors.interface import BoxCandidates
from aligndet_cli.detectors.parts.box_coder import encode_boxes
from aligndet_cli.detectors.parts.cells import grids_of
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig
from aligndet_cli.tools.conversion import mmdet
from aligndet_cli.tools.conversion.rules import translate
from helpers.golden import (
    GOLDEN,
    assert_gradients_equal,
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

ALL_ANCHORS = 100_000

PROJECTOR = "bbox_head.retina_cls."

our_name = partial(translate, rules=mmdet.RULES["retinanet"], to_ours=True)


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((GOLDEN / "retinanet.json").read_text())


@pytest.fixture(scope="module")
def pretext_weights() -> dict[str, dict[str, np.ndarray]]:
    return draw_pretext_weights(partial(draw_weights, "g2_weights.json"))


class View:
    """One network on one view, with the projector applied to its candidates."""

    def __init__(self, case: str, net: str, stored: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
        self.projector, body = split_projector(weights, PROJECTOR)
        self.model = build(RetinaNetConfig(neck_norm="none", pretext_samples=ALL_ANCHORS), "resnet18", body)
        self.model.backbone.requires_grad_(False)
        view = "view1" if net == "online" else "view2"
        self.images = draw_pretext_images("retinanet", case, view, stored)
        self.targets = read_pretext_boxes(case, view, stored)
        self.features = self.model.extract(self.images)
        self.pyramid = self.model.neck(self.features.maps)
        self.anchors, self.matched = self.model.assign(grids_of(self.pyramid), self.images.sizes_hw, self.targets)
        self.candidates = self.model.box_candidates(self.features, self.targets, with_losses=net == "online")

    def embeddings(self, candidates: BoxCandidates) -> Tensor:
        """(S, 256), before normalisation; row `slot * 256 + d` of the last convolution belongs to that anchor."""
        p = self.projector  # 1x1 convolutions
        hidden = functional.linear(candidates.features, p["0.weight"].flatten(1), p["0.bias"]).relu()
        weight, bias = p["2.weight"].view(9, 256, 256), p["2.bias"].view(9, 256)
        out = hidden.new_zeros(len(hidden), 256)
        for slot in range(9):
            rows = (candidates.slots == slot).nonzero().squeeze(1)
            out = out.index_put((rows,), functional.linear(hidden[rows], weight[slot], bias[slot]))
        return out


@pytest.fixture(scope="module", params=["b1", "b2_fixed", "ragged_fixed"])
def views(request: pytest.FixtureRequest, pretext_weights: dict) -> tuple[str, dict, dict[str, View]]:
    case = request.param
    stored = dict(np.load(GOLDEN / "g2_retinanet.npz"))
    return case, stored, {net: View(case, net, stored, pretext_weights[net]) for net in ("online", "target")}


def test_pretext_pyramid(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        assert_maps_equal(view.pyramid, stored, f"{case}/{net}/fpn")


def test_pretext_assignment_is_identical(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        ids = matched_ids(view.matched, [of_image.instance_ids for of_image in view.targets])
        assert np.array_equal(ids, stored[f"{case}/{net}/instance_ids"])


def test_pretext_box_targets(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        boxes = torch.cat([t.boxes[m[m >= 0]] for m, t in zip(view.matched, view.targets, strict=True)])
        anchors = view.anchors[(view.matched >= 0).nonzero()[:, 1]]
        np.testing.assert_allclose(encode_boxes(boxes, anchors), stored[f"{case}/{net}/pos_bbox_targets"], atol=1e-6)


def test_pretext_embeddings(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        assert len(view.candidates.slots) == (stored[f"{case}/{net}/instance_ids"] >= -1).sum()
        embeddings = view.embeddings(view.candidates)[view.candidates.instance_ids >= 0].detach()
        norms = stored[f"{case}/{net}/pos_emb_norm"]
        np.testing.assert_allclose(embeddings.norm(dim=1), norms, rtol=1e-4)
        unit = functional.normalize(embeddings)[:, :8]
        expected = stored[f"{case}/{net}/pos_emb8"]
        # stored as they come out of the network
        np.testing.assert_allclose(unit, expected / norms[:, None], rtol=1e-4, atol=1e-5)


def test_pretext_losses_and_gradients(views: tuple, numbers: dict) -> None:
    case, _, by_net = views
    online, target = by_net["online"], by_net["target"]
    box_loss = online.candidates.losses["loss_box_reg"]
    assert box_loss.item() == pytest.approx(sum(numbers[case]["losses"]["losses_bboxes"]), rel=1e-5)
    query, key = (view.embeddings(view.candidates) for view in (online, target))
    contrast = contrastive_loss(query, online.candidates.instance_ids, key, target.candidates.instance_ids)
    assert contrast.item() == pytest.approx(numbers[case]["losses"]["loss_cls"], rel=1e-5)
    total = contrast + box_loss
    assert total.item() == pytest.approx(numbers[case]["total"], rel=1e-5)
    total.backward()
    projector = {PROJECTOR + name: weight for name, weight in online.projector.items()}
    assert_gradients_equal(online.model, numbers[case]["grad_norms"], our_name, projector, tolerance=1e-5)


@pytest.fixture(scope="module")
def supervised() -> RetinaNet:
    model = import_drawn(draw_weights("g3_weights.json", 303))
    model.backbone.freeze(1, norm_eval=True)
    return model.eval()


@pytest.mark.parametrize("case", ["eq", "ragged"])
def test_supervised_losses_detections_and_gradients(case: str, supervised: RetinaNet) -> None:
    assign = lambda pyramid, images, targets: supervised.assign(grids_of(pyramid), images.sizes_hw, targets)[1]  # noqa: E731
    check_supervised(supervised, "retinanet", case, assign=assign, our_name=our_name)
