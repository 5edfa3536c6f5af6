"""Draws weights and images as the golden numbers were made with, and compares; see tests/detectors/golden/README.md."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors import Detector, DetectorConfig
from aligndet_cli.detectors.checkpoint import load_detector, read_detector
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.tools.conversion import mmdet
from aligndet_cli.tools.conversion.convert import convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.importing import ImportRequest, import_weights
from aligndet_cli.tools.conversion.reading import Checkpoint
from aligndet_cli.workspace import Workspace

GOLDEN = Path(__file__).parents[1] / "detectors" / "golden"
TAU = 0.5
# mmdetection's names of our losses, if others.
THEIR_LOSSES = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_bbox", "loss_box_reg": "loss_bbox"}


def draw(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def draw_tensor(name: str, spec: list, seed: int) -> np.ndarray:
    """`spec` is [distribution, shape, a, b]."""
    distribution, shape, a, b = spec
    state = draw(name, seed)
    return state.uniform(a, b, shape) if distribution == "uniform" else a + b * state.standard_normal(shape)


def draw_weights(file: str, seed: int) -> dict[str, np.ndarray]:
    specs = json.loads((GOLDEN / file).read_text())
    return {name: draw_tensor(name, spec, seed) for name, spec in specs.items()}


def as_tensors(weights: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(array)).float() for name, array in weights.items()}


def build(
    config: DetectorConfig,
    backbone: str,
    weights: dict[str, np.ndarray],
    num_classes: int = 80,
    *,
    fresh: tuple[str, ...] = ("class_predictor",),
) -> Detector:
    """A detector filled from weights with mmdetection's names; only the modules `fresh` may be left out."""
    model = config.build(build_backbone(BackboneConfig(name=backbone)), num_classes).eval()
    state, unknown = mmdet.from_mmdet(config.family, as_tensors(weights))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unknown and not unexpected
    assert all("num_batches_tracked" in name or name.partition(".")[0] in fresh for name in missing), missing
    return model


def import_drawn(weights: dict[str, np.ndarray], *, key: str = "state_dict") -> Detector:
    """The detector that `import-weights` makes of a file with these weights; also exports it and imports that again."""
    with TemporaryDirectory() as name:  # some hold 160 MB
        folder = Path(name)
        file = folder / "drawn.pth"
        torch.save({key: as_tensors(weights)}, file)
        style = "pytorch" if key == "state_dict" else None  # mmdetection's, without a config
        run = import_weights(ImportRequest(file, style=style), Workspace(folder / "workspace"))
        file.unlink()
        content = read_detector(run.folder / "weights.pt")
        checkpoint, left_out = mmdet_checkpoint(content)
        again = convert(Checkpoint(file, checkpoint["state_dict"], checkpoint["meta"]))
        assert not left_out and not again.left_out
        assert (again.detector, again.backbone, again.stage) == (content.detector, content.backbone, content.stage)
        assert list(again.state_dict) == list(content.state_dict)
        assert all(torch.equal(tensor, content.state_dict[name]) for name, tensor in again.state_dict.items())
        return load_detector(run.folder / "weights.pt").model


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


def draw_pretext_weights(draw: Callable[[int], dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Online network, and momentum network as a blend of it with another draw; `draw` takes the seed."""
    online, other = (draw(seed) for seed in (101, 202))
    return {"online": online, "target": {name: 0.8 * online[name] + 0.2 * other[name] for name in online}}


def split_projector(weights: dict[str, np.ndarray], prefix: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The projector's weights without their prefix, trainable, and all other weights."""
    projector = {
        name.removeprefix(prefix): torch.from_numpy(array).float().requires_grad_()
        for name, array in weights.items()
        if name.startswith(prefix)
    }
    return projector, {name: array for name, array in weights.items() if not name.startswith(prefix)}


def draw_pretext_images(family: str, case: str, view: str, stored: dict[str, np.ndarray]) -> ImageBatch:
    """`case` is the name in the file; the images were drawn under its first word ("ragged_fixed": "ragged")."""
    first_sizes = stored[f"{case}/view1/sizes_hw"].tolist()
    names = [f"g2/{family}/{case.partition('_')[0]}/img{i}" for i in range(len(first_sizes))]
    images = [draw_image(n, 7, *hw) for n, hw in zip(names, first_sizes, strict=True)]
    if view == "view2":
        sizes = stored[f"{case}/view2/sizes_hw"].tolist()
        images = [draw_second_view(im, n, 7, *hw) for im, n, hw in zip(images, names, sizes, strict=True)]
    return to_batch(images, stored[f"{case}/{view}/batch_hw"])


def read_pretext_boxes(case: str, view: str, stored: dict[str, np.ndarray]) -> list[BoxTargets]:
    """Boxes of each image; instance ids count on over the batch."""
    targets, start = [], 0
    for i in range(len(stored[f"{case}/{view}/sizes_hw"])):
        boxes = torch.from_numpy(stored[f"{case}/{view}/boxes{i}"])
        ids = torch.arange(start, start + len(boxes))
        targets.append(BoxTargets(boxes, torch.zeros_like(ids), ids))
        start += len(boxes)
    return targets


def of_case(stored: Mapping[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{case}/"): stored[name] for name in stored if name.startswith(f"{case}/")}


def read_labelled(stored: dict[str, np.ndarray], names: str, seed: int) -> tuple[ImageBatch, list[BoxTargets]]:
    sizes = stored["sizes_hw"].tolist()
    images = [draw_image(f"{names}/img{i}", seed, *hw) for i, hw in enumerate(sizes)]
    boxes = [torch.from_numpy(stored[f"boxes{i}"]) for i in range(len(sizes))]
    class_ids = [torch.from_numpy(stored[f"class_ids{i}"]).long() for i in range(len(sizes))]
    return to_batch(images, stored["batch_hw"]), [BoxTargets(*pair) for pair in zip(boxes, class_ids, strict=True)]


def matched_ids(matched: Tensor, ids_per_image: list[Tensor]) -> Tensor:
    """(B, A): the id of the matched box; negative matches as they are."""
    pairs = zip(matched, ids_per_image, strict=True)
    return torch.stack([torch.where(m >= 0, ids[m.clamp(min=0)], m) for m, ids in pairs])


def checksum(tensor: Tensor) -> np.ndarray:
    values = tensor.detach().double().numpy().ravel()
    cosine = np.cos(0.1 * np.arange(values.size))
    return np.array([values.sum(), np.abs(values).sum(), np.sqrt((values**2).sum()), (values * cosine).sum()])


def assert_maps_equal(maps: list[Tensor], stored: dict[str, np.ndarray], prefix: str) -> None:
    assert len(maps) == 5
    for level, ours in enumerate(maps):
        expected = stored[f"{prefix}/{level}/slice"]
        np.testing.assert_allclose(
            ours[tuple(slice(side) for side in expected.shape)].detach().numpy(),
            expected,
            rtol=1e-4,
            atol=1e-4 * np.abs(expected).max(),
        )
        sums = stored[f"{prefix}/{level}/checksum"]
        np.testing.assert_allclose(checksum(ours), sums, rtol=0, atol=1e-5 * sums[1])


def assert_losses_equal(losses: dict[str, Tensor], expected: dict[str, float | list[float]]) -> None:
    """Some of theirs are one number per level."""
    for name, loss in losses.items():
        theirs = expected[THEIR_LOSSES.get(name, name)]
        total = sum(theirs) if isinstance(theirs, list) else theirs
        assert loss.item() == pytest.approx(total, rel=1e-5), name


def assert_gradients_equal(
    model: Detector,
    norms: dict[str, float],
    our_name: Callable[[str], str],
    projector: dict[str, Tensor] | None = None,
    tolerance: float = 1e-6,
) -> None:
    """`norms` and `projector` have mmdetection's names; `our_name` may end in `:index`, an element of a vector."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    outside = projector or {}
    trained = set()
    for name, norm in norms.items():
        if name in outside:
            gradient = outside[name].grad
        else:
            ours, _, index = our_name(name).partition(":")
            trained.add(ours)
            gradient = gradients[ours][int(index)] if index else gradients[ours]
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=tolerance), name
    assert {name for name, gradient in gradients.items() if gradient is not None} == trained


def assert_boxes_equal(found: Detections, stored: dict[str, np.ndarray], image: int) -> None:
    boxes, scores = np.split(stored[f"detections{image}"], [4], axis=1)
    np.testing.assert_allclose(found.boxes, boxes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.scores, scores[:, 0], rtol=0, atol=1e-5)
    assert np.array_equal(found.class_ids, stored[f"detected_class_ids{image}"])


def check_supervised(
    model: Detector,
    family: str,
    case: str,
    *,
    assign: Callable[[list[Tensor], ImageBatch, list[BoxTargets]], Tensor],
    our_name: Callable[[str], str],
    head_maps: Callable[[list[Tensor]], dict[str, list[Tensor]]] = lambda pyramid: {},
) -> None:
    """Maps, matches, losses, gradients and detections of a detector with dense heads.

    Args:
        assign: of the pyramid, images and targets: (B, A) matches.
        our_name: of a parameter in mmdetection, see `assert_gradients_equal`.
        head_maps: further maps of the pyramid, by the name they are stored under.
    """
    stored = of_case(np.load(GOLDEN / f"g3_{family}.npz"), case)
    expected = json.loads((GOLDEN / f"{family}.json").read_text())[f"g3_{case}"]
    images, targets = read_labelled(stored, f"g3/{case}", 17)
    pyramid = model.neck(model.extract(images).maps)
    for name, maps in {"fpn": pyramid, **head_maps(pyramid)}.items():
        assert_maps_equal(maps, stored, name)
    class_ids = matched_ids(assign(pyramid, images, targets), [of_image.class_ids for of_image in targets])
    assert np.array_equal(class_ids, stored["assigned_class_ids"])

    losses = model(images, targets)
    assert {THEIR_LOSSES.get(name, name) for name in losses} == set(expected["losses"])
    assert_losses_equal(losses, expected["losses"])
    model.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    assert_gradients_equal(model, expected["grad_norms"], our_name)
    for i, found in enumerate(model.detect(images)):
        assert_boxes_equal(found, stored, i)


def contrastive_loss(query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor) -> Tensor:
    """Compute the loss of docs/paper.md §4.3, instance by instance, of (S1, D) and (S2, D) embeddings."""
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
