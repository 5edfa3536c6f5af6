"""RetinaNet against numbers computed with mmdetection and the authors' code; see golden/README.md."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors.interface import BoxCandidates, BoxTargets, ImageBatch
from aligndet_cli.detectors.parts.box_coder import encode_boxes
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig, build_retinanet

GOLDEN = Path(__file__).parent / "golden"
ALL_ANCHORS = 100_000
TAU = 0.5

# mmdetection's names -> ours, first match wins
RENAMES = (
    ("neck.lateral_convs.", "neck.pyramid.inner_blocks."),
    ("neck.fpn_convs.3.", "neck.pyramid.extra_blocks.p6."),
    ("neck.fpn_convs.4.", "neck.pyramid.extra_blocks.p7."),
    ("neck.fpn_convs.", "neck.pyramid.layer_blocks."),
    ("bbox_head.cls_convs.", "head.class_tower."),
    ("bbox_head.reg_convs.", "head.box_tower."),
    ("bbox_head.retina_cls.", "class_predictor."),
    ("bbox_head.retina_reg.", "box_predictor."),
)


def our_name(name: str) -> str:
    if name.startswith("backbone."):
        return name
    for theirs, ours in RENAMES:
        if name.startswith(theirs):
            return (ours + name.removeprefix(theirs)).replace(".conv.", ".0.").replace(".bn.", ".1.")
    raise AssertionError(name)


def draw(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def draw_weights(file: str, seed: int) -> dict[str, np.ndarray]:
    weights = {}
    for name, (distribution, shape, a, b) in json.loads((GOLDEN / file).read_text()).items():
        state = draw(name, seed)
        weights[name] = (
            state.uniform(a, b, shape) if distribution == "uniform" else a + b * state.standard_normal(shape)
        )
    return weights


def draw_image(name: str, seed: int, height: int, width: int) -> np.ndarray:
    state = draw(f"image/{name}", seed)
    image = np.zeros((3, height, width))
    for cell, amplitude in ((32, 1.0), (8, 0.6), (1, 0.25)):
        blocks = state.standard_normal((3, -(-height // cell), -(-width // cell)))
        image += amplitude * blocks.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    return image.astype(np.float32)


def draw_second_view(first: np.ndarray, name: str, seed: int, height: int, width: int) -> np.ndarray:
    rows = ((np.arange(height) + 0.5) * first.shape[1] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * first.shape[2] / width).astype(np.int64)
    noise = draw(f"view2/{name}", seed).standard_normal((3, height, width))
    return (0.8 * first.astype(np.float64)[:, :, ::-1][:, rows][:, :, columns] + 0.2 + 0.25 * noise).astype(np.float32)


def to_batch(images: list[np.ndarray], batch_hw: np.ndarray) -> ImageBatch:
    pixels = torch.zeros(len(images), 3, *batch_hw.tolist())
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
    return ImageBatch(pixels, tuple((image.shape[1], image.shape[2]) for image in images))


def build(backbone: str, weights: dict[str, np.ndarray], **options: object) -> RetinaNet:
    config = RetinaNetConfig.model_validate(options)
    model = build_retinanet(config, build_backbone(BackboneConfig(name=backbone)), num_classes=80).eval()
    state = {our_name(name): torch.from_numpy(array).float() for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name or name.startswith("class_predictor.") for name in missing), missing
    return model


def checksum(tensor: Tensor) -> np.ndarray:
    values = tensor.detach().double().numpy().ravel()
    cosine = np.cos(0.1 * np.arange(values.size))
    return np.array([values.sum(), np.abs(values).sum(), np.sqrt((values**2).sum()), (values * cosine).sum()])


def assert_maps_equal(maps: list[Tensor], stored: dict[str, np.ndarray], prefix: str) -> None:
    assert len(maps) == 5
    for level, ours in enumerate(maps):
        expected = stored[f"{prefix}/{level}/slice"]
        np.testing.assert_allclose(
            ours[:, :6, :4, :4].detach().numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )
        sums = stored[f"{prefix}/{level}/checksum"]
        np.testing.assert_allclose(checksum(ours), sums, rtol=0, atol=1e-5 * sums[1])


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((GOLDEN / "retinanet.json").read_text())


@pytest.fixture(scope="module")
def pretext_weights() -> dict[str, dict[str, np.ndarray]]:
    """Online network, and momentum network as a blend of it with another draw."""
    online, other = (draw_weights("g2_weights.json", seed) for seed in (101, 202))
    return {"online": online, "target": {name: 0.8 * online[name] + 0.2 * other[name] for name in online}}


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
        self.images = self._draw_images(case, view, stored)
        self.targets = self._read_boxes(case, view, stored)
        self.features = self.model.extract(self.images)
        self.pyramid = self.model.neck(self.features.maps)
        grids = [tuple(level.shape[-2:]) for level in self.pyramid]
        self.anchors, self.matched = self.model.assign(grids, self.images.sizes_hw, self.targets)
        self.candidates = self.model.box_candidates(self.features, self.targets, with_losses=net == "online")

    @staticmethod
    def _draw_images(case: str, view: str, stored: dict[str, np.ndarray]) -> ImageBatch:
        names = [
            f"g2/retinanet/{case.removesuffix('_fixed')}/img{i}" for i in range(len(stored[f"{case}/view1/sizes_hw"]))
        ]
        images = [draw_image(n, 7, *hw) for n, hw in zip(names, stored[f"{case}/view1/sizes_hw"].tolist(), strict=True)]
        if view == "view2":
            sizes = stored[f"{case}/view2/sizes_hw"].tolist()
            images = [draw_second_view(im, n, 7, *hw) for im, n, hw in zip(images, names, sizes, strict=True)]
        return to_batch(images, stored[f"{case}/{view}/batch_hw"])

    @staticmethod
    def _read_boxes(case: str, view: str, stored: dict[str, np.ndarray]) -> list[BoxTargets]:
        targets, start = [], 0
        for i in range(len(stored[f"{case}/{view}/sizes_hw"])):
            boxes = torch.from_numpy(stored[f"{case}/{view}/boxes{i}"])
            ids = torch.arange(start, start + len(boxes))
            targets.append(BoxTargets(boxes, torch.zeros_like(ids), ids))
            start += len(boxes)
        return targets

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


def contrastive_loss(query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor) -> Tensor:
    """FACTS §4.3, instance by instance."""
    query, key = functional.normalize(query), functional.normalize(key).detach()
    pool, pool_ids = torch.cat([query.detach(), key]), torch.cat([query_ids, key_ids])
    terms = []
    for instance in query_ids[query_ids >= 0].unique():
        q = query[query_ids == instance]
        p = key[key_ids == instance] if (key_ids == instance).any() else q
        positive = q @ p.T / TAU  # (Q, P)
        negative = (q @ pool[pool_ids != instance].T / TAU).logsumexp(dim=1, keepdim=True)  # (Q, 1)
        terms.append((torch.logaddexp(positive, negative) - positive).mean())
    return torch.stack(terms).mean()


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
def supervised() -> RetinaNet:
    model = build("resnet50", draw_weights("g3_weights.json", 303), neck_norm="batch")
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
