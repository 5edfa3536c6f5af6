"""Faster and Mask R-CNN against numbers computed with mmdetection and the authors' code; see golden/README.md.

The official pre-training has box offsets for every instance id, ours for one class, "object" (docs/differences.md 13).
To compare, the model here has 256 classes and a proposal's class is its instance id.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.faster_rcnn import FasterRCNN, FasterRCNNConfig
from aligndet_cli.detectors.interface import BoxCandidates
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.parts.box_coder import encode_boxes
from aligndet_cli.detectors.parts.cells import grids_of
from aligndet_cli.detectors.parts.mask_head import paste_mask
from aligndet_cli.detectors.parts.rcnn_config import DELTA_STDS
from aligndet_cli.detectors.parts.roi_head import RoiSamples, pool_rois, sample_rois
from aligndet_cli.detectors.parts.sampling import Sampling
from aligndet_cli.tools.conversion import mmdet
from aligndet_cli.tools.conversion.rules import translate
from helpers.golden import (
    GOLDEN,
    assert_boxes_equal,
    assert_gradients_equal,
    assert_losses_equal,
    assert_maps_equal,
    build,
    checksum,
    contrastive_loss,
    draw_pretext_images,
    draw_pretext_weights,
    draw_weights,
    import_drawn,
    of_case,
    read_labelled,
    read_pretext_boxes,
    split_projector,
)

PROJECTOR = "roi_head.bbox_head.fc_cls."
EVERYTHING = {"rpn_samples": 10**6, "rpn_positive_fraction": 1, "roi_samples": 10**6, "roi_positive_fraction": 1}

our_name = partial(translate, rules=mmdet.RULES["mask-rcnn"], to_ours=True)


def draw_all_weights(heads: str, backbone: str, seed: int) -> dict[str, np.ndarray]:
    """The backbones are those of RetinaNet's numbers."""
    body = {name: array for name, array in draw_weights(backbone, seed).items() if name.startswith("backbone.")}
    return {**body, **draw_weights(heads, seed)}


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((GOLDEN / "rcnn.json").read_text())


def true_deltas(samples: RoiSamples, targets: list[BoxTargets]) -> np.ndarray:
    """(P, 4) what the box predictor should say about the positive RoIs."""
    positives = samples.positives()
    boxes = torch.cat([t.boxes[m] for m, t in zip(positives.matched, targets, strict=True)])
    return (encode_boxes(boxes, torch.cat(positives.boxes)) / torch.tensor(DELTA_STDS[0])).numpy()


def assert_proposals_equal(proposals: list[Tensor], stored: dict[str, np.ndarray], prefix: str) -> None:
    for i, ours in enumerate(proposals):
        assert len(ours) == stored[f"{prefix}num_proposals{i}"]
        np.testing.assert_allclose(ours[::8], stored[f"{prefix}proposals{i}"], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def pretext_weights() -> dict[str, dict[str, np.ndarray]]:
    return draw_pretext_weights(partial(draw_all_weights, "g2_mask_rcnn_weights.json", "g2_weights.json"))


class View:
    """One network on one view, with the projector applied to its candidates."""

    def __init__(self, case: str, net: str, stored: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
        self.projector, body = split_projector(weights, PROJECTOR)
        fresh = ("class_predictor", "mask_head", "mask_predictor")
        self.model = build(MaskRCNNConfig(neck_norm="none"), "resnet18", body, 256, fresh=fresh)
        self.model.backbone.requires_grad_(False)
        view = "view1" if net == "online" else "view2"
        images = draw_pretext_images("mask_rcnn", case, view, stored)
        boxes = read_pretext_boxes(case, view, stored)
        self.targets = [BoxTargets(t.boxes, t.instance_ids, t.instance_ids) for t in boxes]
        features = self.model.extract(images)
        self.pyramid = self.model.neck(features.maps)
        output = self.model.rpn(self.pyramid)
        self.anchors, self.matched = self.model.rpn.assign(grids_of(output[0]), images.sizes_hw, self.targets)
        self.proposals = self.model.rpn.propose(output, images.sizes_hw, 2000, 1000)
        sampling = Sampling(self.model.config.pretext_roi_samples, 1.0)
        self.samples = sample_rois(
            self.proposals, self.targets, positive_iou=0.5, sampling=sampling, only_positives=True
        )
        self.candidates = self.model.box_candidates(features, self.targets, with_losses=net == "online")

    def embeddings(self, candidates: BoxCandidates) -> Tensor:
        """(S, 256), before normalisation."""
        p = self.projector
        hidden = functional.linear(candidates.features, p["0.weight"], p["0.bias"]).relu()
        return functional.linear(hidden, p["2.weight"], p["2.bias"])


@pytest.fixture(scope="module", params=["b1", "b2", "ragged"])
def views(request: pytest.FixtureRequest, pretext_weights: dict) -> tuple[str, dict, dict[str, View]]:
    case = request.param
    stored = dict(np.load(GOLDEN / "g2_mask_rcnn.npz"))
    return case, stored, {net: View(case, net, stored, pretext_weights[net]) for net in ("online", "target")}


def test_pretext_pyramid_and_proposals(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        assert_maps_equal(view.pyramid, stored, f"{case}/{net}/fpn")
        assert_proposals_equal(view.proposals, stored, f"{case}/{net}/")


def test_pretext_assignment_is_identical(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        labels = torch.where(view.matched >= 0, 1, view.matched + 1)  # 1, 0 background, -1 ignored
        assert np.array_equal(labels, stored[f"{case}/{net}/rpn_labels"])
        assert np.array_equal(view.candidates.instance_ids, stored[f"{case}/{net}/roi_instance_ids"])
        assert not view.candidates.slots.any()


def test_pretext_box_targets(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        boxes = torch.cat([t.boxes[m[m >= 0]] for m, t in zip(view.matched, view.targets, strict=True)])
        anchors = view.anchors[(view.matched >= 0).nonzero()[:, 1]]
        np.testing.assert_allclose(encode_boxes(boxes, anchors), stored[f"{case}/{net}/rpn_pos_targets"], atol=1e-6)
        np.testing.assert_allclose(view.samples.rois(), stored[f"{case}/{net}/rois"], rtol=0, atol=1e-3)
        deltas = true_deltas(view.samples, view.targets)
        # proposals are right to 4e-4 px of sides from 10 px on, and the unit of an offset is a tenth of a side
        np.testing.assert_allclose(deltas, stored[f"{case}/{net}/roi_targets"], rtol=1e-4, atol=4e-4)


def test_pretext_roi_features_and_embeddings(views: tuple) -> None:
    case, stored, by_net = views
    for net, view in by_net.items():
        pooled, row = pool_rois(view.pyramid, view.samples.rois(), 7, view.model.config)
        expected = stored[f"{case}/{net}/roi_features"]
        np.testing.assert_allclose(pooled[row][:4, :4].detach(), expected, rtol=1e-4, atol=1e-4 * expected.max())
        sums = stored[f"{case}/{net}/roi_features_checksum"]
        np.testing.assert_allclose(checksum(pooled[row]), sums, rtol=0, atol=1e-5 * sums[1])
        embeddings = view.embeddings(view.candidates).detach()
        norms = stored[f"{case}/{net}/emb_norm"]
        np.testing.assert_allclose(embeddings.norm(dim=1), norms, rtol=1e-4)
        expected = stored[f"{case}/{net}/emb8"] / norms[:, None]
        np.testing.assert_allclose(functional.normalize(embeddings)[:, :8], expected, rtol=1e-4, atol=1e-5)


def test_pretext_losses_and_gradients(views: tuple, numbers: dict) -> None:
    case, _, by_net = views
    expected = numbers[f"g2_{case}"]
    online, target = by_net["online"], by_net["target"]
    losses = online.candidates.losses
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_box_reg"}
    assert_losses_equal(losses, expected["losses"])
    query, key = (view.embeddings(view.candidates) for view in (online, target))
    contrast = contrastive_loss(query, online.candidates.instance_ids, key, target.candidates.instance_ids)
    assert contrast.item() == pytest.approx(expected["losses"]["loss_cls"], rel=1e-5)
    total = contrast + sum(losses.values())
    assert total.item() == pytest.approx(expected["total"], rel=1e-5)
    total.backward()
    projector = {PROJECTOR + name: weight for name, weight in online.projector.items()}
    norms = dict(zip(numbers["grad_names"]["g2"], expected["grad_norms"], strict=True))
    assert_gradients_equal(online.model, norms, our_name, projector, tolerance=1e-5)


@pytest.fixture(scope="module")
def supervised_weights() -> dict[str, np.ndarray]:
    return draw_all_weights("g3_rcnn_weights.json", "g3_weights.json", 303)


@pytest.fixture(scope="module")
def supervised_numbers() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "g3_rcnn.npz"))


def choose_weights(weights: dict[str, np.ndarray], *, has_masks: bool) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.items() if has_masks or "mask_head" not in name}


def build_supervised(family: str, weights: dict[str, np.ndarray], **options: object) -> Detector:
    has_masks = family == "mask_rcnn"
    config = (MaskRCNNConfig if has_masks else FasterRCNNConfig).model_validate({"neck_norm": "batch", **options})
    model = build(config, "resnet50", choose_weights(weights, has_masks=has_masks), fresh=())
    model.backbone.freeze(1, norm_eval=True)
    return model.eval()


def draw_ellipses(boxes: np.ndarray, batch_hw: np.ndarray) -> Tensor:
    """(N, H, W) bool: the ellipse inscribed in each box, tested at pixel centres."""
    b = boxes.astype(np.float64)
    center_x, center_y = (b[:, 0] + b[:, 2]) / 2, (b[:, 1] + b[:, 3]) / 2
    radius_x, radius_y = (b[:, 2] - b[:, 0]) / 2, (b[:, 3] - b[:, 1]) / 2
    y, x = np.arange(batch_hw[0]) + 0.5, np.arange(batch_hw[1]) + 0.5
    across = ((x[None, None, :] - center_x[:, None, None]) / radius_x[:, None, None]) ** 2
    down = ((y[None, :, None] - center_y[:, None, None]) / radius_y[:, None, None]) ** 2
    return torch.from_numpy(across + down <= 1)


def draw_inputs(case: str, stored: dict[str, np.ndarray]) -> tuple[ImageBatch, list[BoxTargets]]:
    images, targets = read_labelled(of_case(stored, case), f"g3/{case}", 17)
    batch_hw = stored[f"{case}/batch_hw"]
    return images, [replace(target, masks=draw_ellipses(target.boxes.numpy(), batch_hw)) for target in targets]


def check_training(
    family: str, case: str, weights: dict, stored: dict, numbers: dict, patch: pytest.MonkeyPatch
) -> None:
    first_drawn = case == "eq_firstk"  # official sample sizes, with the first instead of random candidates
    if first_drawn:
        patch.setattr(torch, "randperm", torch.arange)
    model = build_supervised(family, weights, **({} if first_drawn else EVERYTHING))
    images, targets = draw_inputs(case.partition("_")[0], stored)
    seen: list[Tensor] = []
    model.class_predictor.register_forward_hook(lambda *call: seen.append(call[2]))
    losses = model(images, targets)

    expected = numbers[f"g3_{family}_{case}"]
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_cls", "loss_box_reg"}
    assert set(losses) == names | ({"loss_mask"} if family == "mask_rcnn" else set())
    assert_losses_equal(losses, expected["losses"])
    logits, sums = seen[0].detach(), stored[f"{case}/train/logits_checksum"]
    np.testing.assert_allclose(logits[:32, :12], stored[f"{case}/train/logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(checksum(logits), sums, rtol=0, atol=1e-5 * sums[1])

    sum(losses.values()).backward()
    norms = dict(zip(numbers["grad_names"][f"g3_{family}"], expected["grad_norms"], strict=True))
    assert_gradients_equal(model, norms, our_name)


@pytest.mark.parametrize("family", ["mask_rcnn", pytest.param("faster_rcnn", marks=pytest.mark.slow)])
def test_supervised_losses_and_gradients(
    family: str,
    supervised_weights: dict,
    supervised_numbers: dict,
    numbers: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_training(family, "eq_firstk", supervised_weights, supervised_numbers, numbers, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["eq", "ragged"])
@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn"])
def test_supervised_losses_and_gradients_of_all_candidates(
    family: str,
    case: str,
    supervised_weights: dict,
    supervised_numbers: dict,
    numbers: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_training(family, case, supervised_weights, supervised_numbers, numbers, monkeypatch)


@pytest.mark.parametrize("case", ["eq", "ragged", "eq_firstk"])
def test_supervised_assignment_is_identical(
    case: str, supervised_weights: dict, supervised_numbers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randperm", torch.arange)
    stored = supervised_numbers
    options = {} if case == "eq_firstk" else EVERYTHING
    model = build_supervised("faster_rcnn", supervised_weights, **options)
    images, targets = draw_inputs(case.partition("_")[0], stored)
    with torch.no_grad():
        pyramid = model.neck(model.extract(images).maps)
        output = model.rpn(pyramid)
    assert_maps_equal(pyramid, stored, f"{case.partition('_')[0]}/fpn")
    assert_proposals_equal(model.rpn.propose(output, images.sizes_hw, 1000, 1000), stored, f"{case.partition('_')[0]}/")
    samples = sample_rois(
        model.rpn.propose(output, images.sizes_hw, 2000, 1000),
        targets,
        positive_iou=0.5,
        sampling=Sampling(model.config.roi_samples, model.config.roi_positive_fraction),
        only_positives=False,
    )
    class_ids = [
        torch.where(m >= 0, t.class_ids[m.clamp(min=0)], 80) for m, t in zip(samples.matched, targets, strict=True)
    ]
    assert np.array_equal(torch.cat(class_ids), stored[f"{case}/train/roi_class_ids"])
    np.testing.assert_allclose(samples.rois()[::8], stored[f"{case}/train/rois"], rtol=0, atol=1e-3)
    deltas = true_deltas(samples, targets)
    np.testing.assert_allclose(deltas, stored[f"{case}/train/positive_targets"], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["faster_rcnn", "mask_rcnn"])
def imported(request: pytest.FixtureRequest, supervised_weights: dict):
    has_masks = request.param == "mask_rcnn"
    weights = choose_weights(supervised_weights, has_masks=has_masks)
    return import_drawn(weights)


@pytest.mark.parametrize(
    ("case", "chosen"), [("ragged", [1]), *(pytest.param(c, [0, 1], marks=pytest.mark.slow) for c in ("eq", "ragged"))]
)
def test_supervised_detections(case: str, chosen: list[int], imported: Detector, supervised_numbers: dict) -> None:
    stored, model = supervised_numbers, imported
    images, _ = draw_inputs(case, stored)
    chosen_images = ImageBatch(images.pixels[chosen], tuple(images.sizes_hw[i] for i in chosen))
    for i, found in zip(chosen, model.detect(chosen_images), strict=True):
        assert_boxes_equal(found, of_case(stored, case), i)
        if found.masks is None:
            assert isinstance(model, FasterRCNN)
            continue
        expected = torch.from_numpy(stored[f"{case}/mask_logits{i}"]).sigmoid()
        np.testing.assert_allclose(found.masks[:2], expected, rtol=0, atol=1e-4)
        pasted = [
            paste_mask(mask, box, images.sizes_hw[i])[0] for mask, box in zip(found.masks, found.boxes, strict=True)
        ]
        areas = [int(mask.sum()) for mask in pasted]
        # at most one pixel on the threshold may fall to the other side
        np.testing.assert_allclose(areas, stored[f"{case}/mask_areas{i}"], rtol=0, atol=1)
