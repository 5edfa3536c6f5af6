import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig


def build(**options: object) -> RetinaNet:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18"))
    return RetinaNetConfig.model_validate({"neck_channels": 32, "head_convs": 1, **options}).build(backbone, 3)


def one_image(boxes: Tensor, class_ids: Tensor) -> tuple[ImageBatch, list[BoxTargets]]:
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels, ((96, 128),)), [BoxTargets(boxes, class_ids, torch.arange(len(boxes)))]


def test_default_sizes_are_mmdetections() -> None:
    model = RetinaNetConfig().build(build_backbone(BackboneConfig(name="resnet18")), 80)
    assert (model.feature_dim, model.num_slots) == (256, 9)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "backbone" not in name}
    assert shapes["class_predictor.weight"] == (720, 256, 3, 3)
    assert shapes["box_predictor.weight"] == (36, 256, 3, 3)
    assert sum(name.startswith("head.") for name in shapes) == 2 * 4 * 2  # towers x convolutions x (weight, bias)


def test_initial_weights() -> None:
    model = RetinaNetConfig().build(build_backbone(BackboneConfig(name="resnet18")), 80)
    assert model.class_predictor.weight.std().item() == pytest.approx(0.01, rel=0.01)
    torch.testing.assert_close(model.class_predictor.bias.sigmoid(), torch.full((720,), 0.01))
    assert not model.box_predictor.bias.any()
    lateral = model.neck.pyramid.inner_blocks[0][0].weight  # Xavier uniform: |w| <= sqrt(6 / (128 + 256)) = 0.125
    assert 0.124 < lateral.abs().max().item() <= math.sqrt(6 / (128 + 256))


def test_losses_are_torchvisions_for_one_image_and_the_same_assignment() -> None:
    model = build()
    boxes = torch.tensor([[10.0, 12, 60, 50], [70, 20, 120, 90]])
    images, targets = one_image(boxes, torch.tensor([2, 0]))
    pyramid = model.neck(model.extract(images).maps)
    anchors, matched = model.assign([tuple(level.shape[-2:]) for level in pyramid], images.sizes_hw, targets)
    losses = model(images, targets)

    def outputs(tower: nn.Module, predictor: nn.Module, width: int) -> Tensor:
        maps = [predictor(tower(level)) for level in pyramid]
        return torch.cat([m.view(9, width, -1).permute(2, 0, 1).reshape(1, -1, width) for m in maps], dim=1)

    class_head, box_head = RetinaNetClassificationHead(32, 9, 3), RetinaNetRegressionHead(32, 9)
    target_dicts = [{"boxes": boxes, "labels": torch.tensor([2, 0])}]
    head_outputs = {
        "cls_logits": outputs(model.head.class_tower, model.class_predictor, 3),
        "bbox_regression": outputs(model.head.box_tower, model.box_predictor, 4),
    }
    box_loss = box_head.compute_loss(target_dicts, head_outputs, [anchors], list(matched))
    class_loss = class_head.compute_loss(target_dicts, head_outputs, list(matched))
    torch.testing.assert_close(losses["loss_box_reg"], box_loss)
    torch.testing.assert_close(losses["loss_cls"], class_loss)


def test_an_image_without_boxes_counts_as_one_in_the_normaliser() -> None:
    # mmdetection divides by the sum over images of max(1, positives): two equal empty images have the loss of one.
    model = build().eval()
    images, targets = one_image(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    twice = ImageBatch(images.pixels.repeat(2, 1, 1, 1), images.sizes_hw * 2)
    one, two = model(images, targets), model(twice, targets * 2)
    torch.testing.assert_close(one["loss_cls"], two["loss_cls"])
    assert one["loss_box_reg"].item() == 0


def test_candidates_prefer_positives_but_the_box_loss_counts_them_all() -> None:
    images, targets = one_image(
        torch.tensor([[10.0, 12, 60, 50], [70, 20, 120, 90]]), torch.zeros(2, dtype=torch.int64)
    )
    few, many = build(pretext_samples=5).eval(), build(pretext_samples=100_000).eval()
    of_few = few.box_candidates(few.extract(images), targets, with_losses=True)
    of_many = many.box_candidates(many.extract(images), targets, with_losses=True)
    assert len(of_few.slots) == 5 and (of_few.instance_ids >= 0).all()
    torch.testing.assert_close(of_few.losses, of_many.losses)


def test_candidate_features_are_the_class_towers_at_their_cell() -> None:
    model = build(pretext_samples=100_000).eval()
    images, targets = one_image(torch.tensor([[10.0, 12, 60, 50]]), torch.zeros(1, dtype=torch.int64))
    features = model.extract(images)
    found = model.box_candidates(features, targets, with_losses=False)
    pyramid = model.neck(features.maps)
    _, matched = model.assign([tuple(level.shape[-2:]) for level in pyramid], images.sizes_hw, targets)
    tower = torch.cat([model.head.class_tower(level).flatten(2)[0].T for level in pyramid])  # (cells, C)
    positives = (matched[0] >= 0).nonzero().squeeze(1)
    assert found.slots[: len(positives)].tolist() == (positives % 9).tolist()
    torch.testing.assert_close(found.features[: len(positives)], tower[positives // 9])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norms_replace_biases_in_the_head(norm: str) -> None:
    names = [name for name, _ in build(head_norm=norm, neck_channels=64).head.named_parameters()]
    assert "class_tower.0.0.bias" not in names and "class_tower.0.1.weight" in names


@pytest.mark.parametrize(
    "options",
    [{"neck_channels": 100, "neck_norm": "group"}, {"negative_iou": 0.6}, {"family": "fcos"}, {"topk": 50}],
)
def test_config_rejects(options: dict) -> None:
    with pytest.raises(ValidationError):
        RetinaNetConfig.model_validate(options)
