import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.ops import box_iou

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.fcos import FCOS, FCOSConfig, compute_centerness, compute_iou_of_sides


def build(**options: object) -> FCOS:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18"))
    return FCOSConfig.model_validate({"neck_channels": 64, "head_convs": 1, **options}).build(backbone, 3)


def one_image(boxes: Tensor, class_ids: Tensor) -> tuple[ImageBatch, list[BoxTargets]]:
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels, ((96, 128),)), [BoxTargets(boxes, class_ids, torch.arange(len(boxes)))]


def test_default_sizes_are_mmdetections() -> None:
    model = FCOSConfig().build(build_backbone(BackboneConfig(name="resnet18")), 80)
    assert (model.feature_dim, model.num_slots) == (256, 1)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "backbone" not in name}
    assert shapes["class_predictor.weight"] == (80, 256, 3, 3)
    assert shapes["box_predictor.sides.weight"] == (4, 256, 3, 3)
    assert shapes["box_predictor.centerness.weight"] == (1, 256, 3, 3)
    # towers x convolutions x (weight, norm's weight and bias), and the scales
    assert sum(name.startswith("head.") for name in shapes) == 2 * 4 * 3 + 1
    theirs = FCOSClassificationHead(256, 1, 80).conv  # with a bias to each convolution on top
    assert (
        sum(p.numel() for p in model.head.class_tower.parameters())
        == sum(p.numel() for p in theirs.parameters()) - 4 * 256
    )


def test_initial_weights() -> None:
    model = FCOSConfig().build(build_backbone(BackboneConfig(name="resnet18")), 80)
    assert model.class_predictor.weight.std().item() == pytest.approx(0.01, rel=0.01)
    torch.testing.assert_close(model.class_predictor.bias.sigmoid(), torch.full((80,), 0.01))
    assert not any(conv.bias.any() for conv in model.box_predictor.values())
    assert model.head.scales.factors.tolist() == [1] * 5


def test_centerness_by_hand() -> None:
    # sqrt(2/8 * 4/4) = 0.5; in the middle 1; near the left side sqrt(0.01/9.99 * 1)
    sides = torch.tensor([[2.0, 4, 8, 4], [5, 5, 5, 5], [0.01, 3, 9.99, 3]])
    torch.testing.assert_close(compute_centerness(sides), torch.tensor([0.5, 1.0, (0.01 / 9.99) ** 0.5]))


def test_iou_of_sides_is_that_of_the_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = 1 + 50 * torch.rand(2, 20, 4, generator=generator)
    sign = torch.tensor([-1.0, -1, 1, 1])
    expected = box_iou(one * sign, two * sign).diagonal()
    torch.testing.assert_close(compute_iou_of_sides(one, two), expected)


def test_losses_by_hand() -> None:
    # One box whose only points of range are P3's; with zero weights all predictions are exp(bias) and the biases.
    model = build()
    images, targets = one_image(torch.tensor([[8.0, 8, 32, 24]]), torch.tensor([1]))
    for parameter in (*model.class_predictor.parameters(), *model.box_predictor.parameters()):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.box_predictor["sides"].bias, torch.tensor(4.0).log().item())
    losses = model(images, targets)
    # Points (12|20|28, 12|20): left 4, 12, 20, right 20, 12, 4, top 4, 12, bottom 12, 4; predicted 4 to all sides, an
    # 8 x 8 box inside of the true 24 x 16: IoU 64 / 384 everywhere.
    assert (model.assign(model.neck(model.extract(images).maps), targets) >= 0).sum() == 6
    assert losses["loss_box_reg"].item() == pytest.approx(torch.tensor(6.0).log().item(), rel=1e-5)
    # Logit 0 costs ln 2 whatever the target is.
    assert losses["loss_centerness"].item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    # 6 positive logits of 0: 0.25 * 0.5^2 * ln 2 each; all others 0.75 * 0.5^2 * ln 2. 12 x 16, 6 x 8, 3 x 4, 2 x 2
    # and 1 x 1 points of 3 classes.
    num_logits = 3 * (192 + 48 + 12 + 4 + 1)
    expected = (6 * 0.25 + (num_logits - 6) * 0.75) * 0.25 * torch.tensor(2.0).log().item() / 6
    assert losses["loss_cls"].item() == pytest.approx(expected, rel=1e-5)


def test_scales_act_per_level() -> None:
    model = build().eval()
    images, _ = one_image(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    pyramid = model.neck(model.extract(images).maps)
    before = model.predict_log_sides(pyramid)
    model.head.scales.factors.data = torch.tensor([1.0, 2, 3, 4, 5])
    for level, (one, two) in enumerate(zip(before, model.predict_log_sides(pyramid), strict=True)):
        torch.testing.assert_close(two, one * (level + 1))


def test_candidates_are_drawn_from_the_whole_batch_and_positives_come_first() -> None:
    images, targets = one_image(
        torch.tensor([[10.0, 12, 60, 50], [70, 20, 120, 90]]), torch.zeros(2, dtype=torch.int64)
    )
    images = ImageBatch(images.pixels.repeat(2, 1, 1, 1), images.sizes_hw * 2)
    targets = [*targets, BoxTargets(targets[0].boxes, targets[0].class_ids, torch.tensor([2, 3]))]
    few, many = build(pretext_samples=7).eval(), build(pretext_samples=100_000).eval()
    of_few = few.box_candidates(few.extract(images), targets, with_losses=True)
    of_many = many.box_candidates(many.extract(images), targets, with_losses=True)
    assert len(of_few.slots) == 2 * 7 and (of_few.instance_ids >= 0).all()
    assert len(of_many.slots) == 2 * (192 + 48 + 12 + 4 + 1)
    torch.testing.assert_close(of_few.losses, of_many.losses)


def test_the_threshold_is_on_the_class_score_and_the_score_has_the_centerness() -> None:
    model = build(score_threshold=0.5).eval()
    for parameter in (*model.class_predictor.parameters(), *model.box_predictor.parameters()):
        torch.nn.init.zeros_(parameter)
    # Class scores 0.5, 0.6 and 0.4, centerness 0.2: class 1 passes with 0.6 * 0.2, the others do not.
    model.class_predictor.bias.data = torch.logit(torch.tensor([0.5, 0.6, 0.4]))
    model.box_predictor["centerness"].bias.data = torch.logit(torch.tensor([0.2]))
    images, _ = one_image(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    (found,) = model.detect(images)
    assert len(found.scores) == 100 and set(found.class_ids.tolist()) == {1}
    torch.testing.assert_close(found.scores, torch.full((100,), 0.12))


@pytest.mark.parametrize(
    "options",
    [{"neck_channels": 100}, {"neck_channels": 32}, {"family": "retinanet"}, {"positive_iou": 0.5}],
)
def test_config_rejects(options: dict) -> None:
    with pytest.raises(ValidationError):
        FCOSConfig.model_validate(options)


def test_config_takes_narrow_necks_without_group_norm() -> None:
    assert FCOSConfig(neck_channels=32, head_norm="none").neck_channels == 32
