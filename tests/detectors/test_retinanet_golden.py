"""RetinaNet against numbers computed with mmdetection and the authors' code; see golden/README.md."""

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
from aligndet_cli.detectors.interface import BoxCandidates, BoxTargets
from aligndet_cli.detectors.parts.box_coder import encode_boxes
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig, build_retinanet
from aligndet_cli.tools.conversion import mmdet

ALL_ANCHORS = 100_000

our_name = functools.partial(mmdet.our_name, "retinanet")


def build(backbone: str, weights: dict[str, np.ndarray], **options: object) -> RetinaNet:
    config = RetinaNetConfig.model_validate(options)
    model = build_retinanet(config, build_backbone(BackboneConfig(name=backbone)), num_classes=80).eval()
    state, unknown = mmdet.from_mmdet("retinanet", as_tensors(weights))
    assert not unknown
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name or name.startswith("class_predictor.") for name in missing), missing
    return model


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((GOLDEN / "retinanet.json").read_text())


@pytest.fixture(scope="module")
def pretext_weights() -> dict[str, dict[str, np.ndarray]]:
    return draw_pretext_weights("g2_weights.json")


class View:
    """One network on one view, with the projector applied to its candidates."""

    def __init__(self, case: str, net: str, stored: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
        projector = {name: array for name, array in weights.items() if ".retina_cls." in name}
        body = {name: array for name, array in weights.items() if ".retina_cls." not in name}
        self.projector = {
            name.removeprefix("bbox_head.retina_cls."): torch.from_numpy(array).float().squeeze().requires_grad_()
            for name, array in projector.items()
        }
        self.model = build("resnet18", body, neck_norm="none", pretext_samples=ALL_ANCHORS)
        self.model.backbone.requires_grad_(False)
        view = "view1" if net == "online" else "view2"
        self.images = draw_pretext_images("retinanet", case, view, stored)
        self.targets = read_pretext_boxes(case, view, stored)
        self.features = self.model.extract(self.images)
        self.pyramid = self.model.neck(self.features.maps)
        grids = [tuple(level.shape[-2:]) for level in self.pyramid]
        self.anchors, self.matched = self.model.assign(grids, self.images.sizes_hw, self.targets)
        self.candidates = self.model.box_candidates(self.features, self.targets, with_losses=net == "online")

    def instance_ids(self) -> Tensor:
        """(B, anchors): instance id, -1 background, -2 ignored."""
        pairs = zip(self.matched, self.targets, strict=True)
        return torch.stack([torch.where(m >= 0, t.instance_ids[m.clamp(min=0)], m) for m, t in pairs])

    def embeddings(self, candidates: BoxCandidates) -> Tensor:
        """(S, 256), before normalisation; row `slot * 256 + d` of the last convolution belongs to that anchor."""
        hidden = functional.linear(candidates.features, self.projector["0.weight"], self.projector["0.bias"]).relu()
        weight, bias = self.projector["2.weight"].view(9, 256, 256), self.projector["2.bias"].view(9, 256)
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
        assert np.array_equal(view.instance_ids().numpy(), stored[f"{case}/{net}/instance_ids"])


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
    parameters = dict(online.model.named_parameters())
    for name, norm in numbers[case]["grad_norms"].items():
        own = online.projector.get(name.removeprefix("bbox_head.retina_cls."))
        gradient = (parameters[our_name(name)] if own is None else own).grad
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> RetinaNet:
    model = import_drawn(draw_weights("g3_weights.json", 303), tmp_path_factory.mktemp("import"))
    model.backbone.freeze(1, norm_eval=True)
    return model.eval()


@pytest.mark.parametrize("case", ["eq", "ragged"])
def test_supervised_losses_detections_and_gradients(case: str, supervised: RetinaNet, numbers: dict) -> None:
    stored = dict(np.load(GOLDEN / "g3_retinanet.npz"))
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
    assert_maps_equal(pyramid, stored, f"{case}/fpn")

    _, matched = supervised.assign([tuple(level.shape[-2:]) for level in pyramid], images.sizes_hw, targets)
    pairs = zip(matched, targets, strict=True)
    class_ids = torch.stack([torch.where(m >= 0, t.class_ids[m.clamp(min=0)], m) for m, t in pairs])
    assert np.array_equal(class_ids.numpy(), stored[f"{case}/assigned_class_ids"])

    losses = supervised(images, targets)
    expected = numbers[f"g3_{case}"]
    assert losses["loss_cls"].item() == pytest.approx(sum(expected["losses"]["loss_cls"]), rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(sum(expected["losses"]["loss_bbox"]), rel=1e-5)
    supervised.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in supervised.named_parameters()}
    for name, norm in expected["grad_norms"].items():
        assert float(gradients[our_name(name)].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    trained = {our_name(name) for name in expected["grad_norms"]}
    assert {name for name, gradient in gradients.items() if gradient is not None} == trained

    for i, found in enumerate(supervised.detect(images)):
        boxes, scores = np.split(stored[f"{case}/detections{i}"], [4], axis=1)
        np.testing.assert_allclose(found.boxes, boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(found.scores, scores[:, 0], rtol=0, atol=1e-5)
        assert np.array_equal(found.class_ids, stored[f"{case}/detected_class_ids{i}"])
