"""FCOS against numbers computed with mmdetection and the authors' code; see golden/README.md.

The official pre-training embeds a point's 3x3 neighbourhood of class features (conv3x3, ReLU, conv1x1), ours the point
alone. Here the official projector is applied to our class maps, so that embeddings and losses can be compared; the
features that the detector itself hands over are compared with those maps.
"""

import functools
import json

import numpy as np
import pytest
import torch
from golden_tools import (
    GOLDEN,
    as_tensors,
    assert_maps_equal,
    contrastive_loss,
    draw_image,
    draw_pretext_images,
    draw_pretext_weights,
    draw_weights,
    import_drawn,
    read_pretext_boxes,
    to_batch,
)
from torch import Tensor
from torch.nn import functional

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors.fcos import FCOS, FCOSConfig, build_fcos, compute_centerness
from aligndet_cli.detectors.interface import BoxTargets
from aligndet_cli.detectors.parts.cells import gather_cells, grids_of
from aligndet_cli.detectors.parts.points import measure_sides
from aligndet_cli.tools.conversion import mmdet

ALL_POINTS = 100_000
PROJECTOR = "bbox_head.conv_cls."
SCALES = "bbox_head.scales."

our_name = functools.partial(mmdet.our_name, "fcos")


def build(backbone: str, weights: dict[str, np.ndarray], **options: object) -> FCOS:
    config = FCOSConfig.model_validate(options)
    model = build_fcos(config, build_backbone(BackboneConfig(name=backbone)), num_classes=80).eval()
    state, unknown = mmdet.from_mmdet("fcos", as_tensors(weights))
    assert not unknown
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name or name.startswith("class_predictor.") for name in missing), missing
    return model


def assert_gradients_equal(model: FCOS, projector: dict[str, Tensor], norms: dict[str, float]) -> None:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in norms.items():
        if name.startswith(SCALES):
            gradient = gradients["head.scales.factors"][int(name.split(".")[2])]
        elif name.removeprefix(PROJECTOR) in projector:
            gradient = projector[name.removeprefix(PROJECTOR)].grad
        else:
            gradient = gradients[our_name(name)]
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    trained = {
        "head.scales.factors" if n.startswith(SCALES) else our_name(n)
        for n in norms
        if n.removeprefix(PROJECTOR) not in projector
    }
    assert {name for name, gradient in gradients.items() if gradient is not None} == trained


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((GOLDEN / "fcos.json").read_text())


@pytest.fixture(scope="module")
def pretext_weights() -> dict[str, dict[str, np.ndarray]]:
    return draw_pretext_weights("g2_fcos_weights.json")


class View:
    """One network on one view, with the official projector applied to its class maps."""

    def __init__(self, case: str, net: str, stored: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
        body = {name: array for name, array in weights.items() if not name.startswith(PROJECTOR)}
        self.projector = {
            name.removeprefix(PROJECTOR): torch.from_numpy(array).float().requires_grad_()
            for name, array in weights.items()
            if name.startswith(PROJECTOR)
        }
        self.model = build("resnet18", body, neck_norm="none", pretext_samples=ALL_POINTS)
        self.model.backbone.requires_grad_(False)
        view = "view1" if net == "online" else "view2"
        self.images = draw_pretext_images("fcos", case, view, stored)
        self.targets = read_pretext_boxes(case, view, stored)
        features = self.model.extract(self.images)
        self.pyramid = self.model.neck(features.maps)
        self.class_maps = [self.model.head.class_tower(level) for level in self.pyramid]
        self.matched = self.model.assign(self.pyramid, self.targets)
        self.candidates = self.model.box_candidates(features, self.targets, with_losses=net == "online")

    def instance_ids(self) -> Tensor:
        """(B, P): instance id, -1 background."""
        pairs = zip(self.matched, self.targets, strict=True)
        return torch.stack([torch.where(m >= 0, t.instance_ids[m.clamp(min=0)], m) for m, t in pairs])

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
        assert np.array_equal(view.instance_ids().numpy(), stored[f"{case}/{net}/instance_ids"])


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
    assert losses["loss_box_reg"].item() == pytest.approx(expected["loss_bbox"], rel=1e-5)
    assert losses["loss_centerness"].item() == pytest.approx(expected["loss_centerness"], rel=1e-5)
    query, key = (gather_cells(view.embedding_maps(), *view.sampled()) for view in (online, target))
    contrast = contrastive_loss(query, online.candidates.instance_ids, key, target.candidates.instance_ids)
    assert contrast.item() == pytest.approx(expected["loss_cls"], rel=1e-5)
    total = contrast + sum(losses.values())
    assert total.item() == pytest.approx(numbers[case]["total"], rel=1e-5)
    total.backward()
    assert_gradients_equal(online.model, online.projector, numbers[case]["grad_norms"])


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> FCOS:
    model = import_drawn(draw_weights("g3_fcos_weights.json", 303), tmp_path_factory.mktemp("import"))
    model.backbone.freeze(1, norm_eval=True)
    return model.eval()


@pytest.mark.parametrize("case", ["eq", "ragged"])
def test_supervised_losses_detections_and_gradients(case: str, supervised: FCOS, numbers: dict) -> None:
    stored = dict(np.load(GOLDEN / "g3_fcos.npz"))
    sizes = stored[f"{case}/sizes_hw"].tolist()
    images = to_batch(
        [draw_image(f"g3/{case}/img{i}", 17, *hw) for i, hw in enumerate(sizes)], stored[f"{case}/batch_hw"]
    )
    targets = [
        BoxTargets(
            torch.from_numpy(stored[f"{case}/boxes{i}"]), torch.from_numpy(stored[f"{case}/class_ids{i}"]).long()
        )
        for i in range(len(sizes))
    ]
    pyramid = supervised.neck(supervised.extract(images).maps)
    class_maps = [supervised.head.class_tower(level) for level in pyramid]
    assert_maps_equal(pyramid, stored, f"{case}/fpn")
    assert_maps_equal([supervised.class_predictor(level) for level in class_maps], stored, f"{case}/cls")
    assert_maps_equal(supervised.predict_centerness(class_maps), stored, f"{case}/ctr")
    assert_maps_equal([level.exp() for level in supervised.predict_log_sides(pyramid)], stored, f"{case}/reg")

    matched = supervised.assign(pyramid, targets)
    pairs = zip(matched, targets, strict=True)
    class_ids = torch.stack([torch.where(m >= 0, t.class_ids[m.clamp(min=0)], m) for m, t in pairs])
    assert np.array_equal(class_ids.numpy(), stored[f"{case}/assigned_class_ids"])

    losses = supervised(images, targets)
    expected = numbers[f"g3_{case}"]
    for ours, theirs in (
        ("loss_cls", "loss_cls"),
        ("loss_box_reg", "loss_bbox"),
        ("loss_centerness", "loss_centerness"),
    ):
        assert losses[ours].item() == pytest.approx(expected["losses"][theirs], rel=1e-5), ours
    supervised.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    assert_gradients_equal(supervised, {}, expected["grad_norms"])

    for i, found in enumerate(supervised.detect(images)):
        boxes, scores = np.split(stored[f"{case}/detections{i}"], [4], axis=1)
        np.testing.assert_allclose(found.boxes, boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(found.scores, scores[:, 0], rtol=0, atol=1e-5)
        assert np.array_equal(found.class_ids, stored[f"{case}/detected_class_ids{i}"])
