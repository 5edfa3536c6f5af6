import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torchvision.ops import generalized_box_iou_loss

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors import neck_norm_of, settle_neck_norm
from aligndet_cli.detectors.detr import DETR, DETRConfig, giou_loss
from aligndet_cli.detectors.interface import Features
from aligndet_cli.detectors.parts.transformer import encode_position
from aligndet_cli.detectors.retinanet import RetinaNetConfig

SMALL = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 48}


def build(**options: object) -> DETR:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18"))
    return DETRConfig.model_validate({**SMALL, **options}).build(backbone, 3).eval()


def test_default_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = DETRConfig().build(build_backbone(BackboneConfig()), 91)
    assert (model.feature_dim, model.num_slots) == (256, 1)
    assert model.class_predictor.weight.shape == (92, 256) and model.query_embedding.weight.shape == (100, 256)
    # Carion et al., table 1: 41 M parameters
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(41.5e6, rel=0.01)


def test_position_runs_to_two_pi_over_the_image_and_not_its_padding() -> None:
    is_inside = torch.zeros(1, 4, 6, dtype=torch.bool)
    is_inside[:, :3, :5] = True
    position = encode_position(is_inside, 8)  # channels: y sin, cos, sin, cos of two wavelengths, then x
    assert position.shape == (1, 4, 6, 8)
    # row 0 of 3 is at 2 pi / 3, column 4 of 5 at 2 pi; wavelengths 1 and 100 = 10000^(2/4)
    y, x = 2 * math.pi / 3, 2 * math.pi
    expected = [f(place / length) for place in (y, x) for length in (1, 100) for f in (math.sin, math.cos)]
    torch.testing.assert_close(position[0, 0, 4], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def random_features(model: DETR, sizes_hw: tuple[tuple[int, int], ...], batch_hw: tuple[int, int]) -> Features:
    generator = torch.Generator().manual_seed(1)
    rows, columns = (side // 32 for side in batch_hw)
    c5 = torch.randn(len(sizes_hw), model.backbone.channels["c5"], rows, columns, generator=generator)
    return Features({"c5": c5}, sizes_hw, batch_hw)


def test_padding_is_not_seen() -> None:
    model = build()
    features = random_features(model, ((70, 130), (96, 160)), (96, 160))  # all of 3 x 5 cells are in the images
    c5 = torch.full((2, model.backbone.channels["c5"], 5, 7), 1e3)
    c5[:, :, :3, :5] = features.maps["c5"]
    padded = Features({"c5": c5}, features.sizes_hw, (160, 224))
    torch.testing.assert_close(model.decode(padded), model.decode(features), rtol=1e-4, atol=1e-5)
    # and a cell counts as padding from its first pixel on: 64 rows are two cells, 65 are three
    first_sizes = [model.decode(replace(features, sizes_hw=((rows, 130), (96, 160))))[:, 0] for rows in (64, 65, 96)]
    assert not torch.allclose(first_sizes[0], first_sizes[1], atol=1e-3)
    torch.testing.assert_close(first_sizes[1], first_sizes[2])


def test_an_image_alone_has_the_detections_it_has_in_a_batch() -> None:
    model = build()
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    batch = torch.zeros(2, 3, 96, 128)
    batch[0, :, :64, :96] = pixels[0]
    batch[1] = torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(3))
    maps = {"c5": model.backbone(pixels)["c5"]}
    alone = model.decode(Features(maps, ((64, 96),), (64, 96)))
    # The convolutions see the zeros beside the image; from there on nothing else of the batch is seen.
    both = {"c5": model.backbone(batch)["c5"].clone()}
    both["c5"][0, :, :2, :3] = maps["c5"][0]
    together = model.decode(Features(both, ((64, 96), (96, 128)), (96, 128)))
    torch.testing.assert_close(together[:, :1], alone, rtol=1e-4, atol=1e-5)


def outputs(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of 3 classes and "no object", and boxes, of 2 layers, 2 images and 4 queries."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 4, 4, generator=generator), 0.2 + 0.3 * torch.rand(2, 2, 4, 4, generator=generator)


TARGETS = [
    BoxTargets(torch.tensor([[10.0, 20, 30, 60], [5, 5, 45, 25]]), torch.tensor([2, 0]), torch.tensor([0, 1])),
    BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
]
SIZES_HW = ((80, 50), (64, 64))
MATCHED = torch.tensor([[[1, -1, 0, -1], [-1] * 4], [[-1, -1, 1, 0], [-1] * 4]])


def test_class_losses_weigh_no_object_in_training_but_not_in_the_pretext() -> None:
    logits, _ = outputs(0)
    model = build(num_queries=4)
    weighted, plain = (f(logits, MATCHED, TARGETS) for f in (model.class_loss, model.cluster_loss))
    for layer, (first, second) in enumerate([((0, 0), (2, 2)), ((2, 0), (3, 2))]):  # (query, class) of each box
        log_probability = log_softmax(logits[layer], dim=-1)
        objects = -sum(log_probability[0, query, class_id] for query, class_id in (first, second))
        nothing = -log_probability[..., 3].sum() + sum(log_probability[0, query, 3] for query, _ in (first, second))
        # 2 queries with boxes, 6 without
        torch.testing.assert_close(weighted[layer], (objects + 0.1 * nothing) / (2 + 0.1 * 6))
        torch.testing.assert_close(plain[layer], (objects + nothing) / 2)


def test_box_losses_are_per_matched_query() -> None:
    _, boxes = outputs(1)
    boxes[0, 0, 0] = torch.tensor([25 / 50, 15 / 80, 40 / 50, 20 / 80])  # exactly box 1
    boxes[0, 0, 2] = torch.tensor([20 / 50, 40 / 80, 20 / 50, 20 / 80])  # box 0, but half as high
    losses = build(num_queries=4).box_losses(boxes, MATCHED, TARGETS, SIZES_HW)
    # L1 5 x (0 + 0.25) / 2; the half inside the whole has IoU = GIoU 1/2: 2 x (0 + 0.5) / 2
    assert losses["loss_box_reg"][0].item() == pytest.approx(0.625)
    assert losses["loss_giou"][0].item() == pytest.approx(0.5, rel=1e-5)


def test_the_loss_of_giou_is_torchvisions_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 500, 2, generator=generator) * 25
    boxes = torch.cat([corners, corners + torch.rand(2, 500, 2, generator=generator) * 40], dim=2)  # half overlap
    boxes[0, :2] = torch.tensor([0.0, 0, 20, 20])
    boxes[1, :2] = torch.tensor([[20.0, 0, 30, 20], [0.0, 0, 20, 20]])  # they touch; they are the same
    weights = torch.rand(500, generator=generator)
    results = []
    for loss_of in (giou_loss, generalized_box_iou_loss):
        predicted = boxes[0].clone().requires_grad_()
        loss = loss_of(predicted, boxes[1])
        (loss * weights).sum().backward()
        results.append((loss.detach(), predicted.grad))
    assert 0.2 < (results[0][0] > 1).float().mean() < 0.8
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_one_matching_gives_clusters_and_instances() -> None:
    model = build(num_queries=7)
    images = ImageBatch(torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)), SIZES_HW)
    features = model.extract(images)
    logits, boxes = model.predict(model.decode(features))
    matched = model.assign(logits, boxes, TARGETS, SIZES_HW)
    renamed = [replace(target, instance_ids=target.instance_ids + 300) for target in TARGETS]
    found = model.box_candidates(features, renamed, with_losses=True)
    assert torch.equal(found.instance_ids, torch.where(matched < 0, -1, matched + 300).flatten())
    assert len(found.features) == 2 * 2 * 7  # layers, images, queries
    assert found.losses["loss_cls"].item() == pytest.approx(model.cluster_loss(logits, matched, TARGETS).sum().item())


def test_only_training_mode_drops_out() -> None:
    model = build()
    features = random_features(model, ((96, 160),), (96, 160))
    assert torch.equal(model.decode(features), model.decode(features))
    model.train()
    assert not torch.equal(model.decode(features), model.decode(features))


def test_every_query_is_a_detection_unless_a_threshold_says_otherwise() -> None:
    images = ImageBatch(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)), ((60, 90),))
    (everything,) = build(num_queries=11).detect(images)
    assert len(everything.scores) == 11
    limit = float(everything.scores[4])
    (some,) = build(num_queries=11, score_threshold=limit).detect(images)
    assert torch.equal(some.scores, everything.scores[:5])
    (few,) = build(num_queries=11, max_detections=3).detect(images)
    assert torch.equal(few.boxes, everything.boxes[:3])


def test_neck_norms_are_settled_where_there_are_any() -> None:
    assert neck_norm_of(DETRConfig()) is None and settle_neck_norm(DETRConfig(), "batch") == DETRConfig()
    assert settle_neck_norm(RetinaNetConfig(), "batch").neck_norm == "batch"
    assert settle_neck_norm(RetinaNetConfig(neck_norm="none"), "batch").neck_norm == "none"


def test_transformer_weights_start_as_xavier() -> None:
    weight = build().transformer.encoder.layers[0].linear1.weight  # uniform up to sqrt(6 / (32 + 48)) = 0.274
    bound = math.sqrt(6 / (32 + 48))
    assert 0.98 * bound < weight.abs().max().item() <= bound
    assert isinstance(build().neck, nn.Conv2d)


@pytest.mark.parametrize("options", [{"hidden_dim": 30}, {"num_heads": 5}, {"dropout": 1.0}, {"neck_norm": "batch"}])
def test_config_rejects(options: dict) -> None:
    with pytest.raises(ValidationError):
        DETRConfig.model_validate(options)
