"""Distillation beside a second implementation; the teacher's own input; what is saved of it."""

import copy
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from aligndet_cli.backbones import Backbone, BackboneConfig, build_backbone
from aligndet_cli.data.transforms import MEAN, STD
from aligndet_cli.pretrain_image.method import View
from aligndet_cli.pretrain_image.methods import distill
from aligndet_cli.pretrain_image.methods.distill import Distill, distill_loss
from helpers.image_methods import BATCH, assert_same_as_plain, small_backbone, views


def teacher_of(name: str) -> Backbone:
    torch.manual_seed(1)
    return build_backbone(BackboneConfig.model_validate({"name": name})).eval()


def plain_loss(method: Distill, made: Sequence[View], wanted: Tensor) -> Tensor:
    """The student's map is resized first here, and the layer is applied place by place."""
    student = interpolate(method.backbone(made[0].pixels)["c5"], wanted.shape[2:], mode="bilinear")
    terms = []
    for image in range(len(wanted)):
        for row in range(wanted.shape[2]):
            for column in range(wanted.shape[3]):
                told, goal = method.layer(student[image, :, row, column]), wanted[image, :, row, column]
                terms.append(1 - told @ goal / told.norm() / goal.norm())
    return torch.stack(terms).mean()


def test_loss_by_hand() -> None:
    told = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).view(2, 2, 1, 1)
    wanted = torch.tensor([[5.0, 0.0], [-2.0, 0.0]]).view(2, 2, 1, 1)  # cosines 0.6 and -1
    assert float(distill_loss(told, wanted)) == pytest.approx((0.4 + 2.0) / 2)


def test_loss_and_gradients_are_those_of_a_plain_implementation() -> None:
    method = Distill(small_backbone(), teacher_of("resnet18")).double()

    def plain(made: Sequence[View]) -> Tensor:
        with torch.no_grad():
            wanted = method.teacher(made[0].pixels)["c5"]
        return plain_loss(method, made, wanted)

    assert_same_as_plain(method, views(side=64, dtype=torch.float64), "loss_similarity", plain)


def test_a_vit_sees_its_own_normalisation_and_teaches_on_its_own_grid() -> None:
    timm = pytest.importorskip("timm")
    teacher = teacher_of("timm:vit_tiny_patch16_224.augreg_in21k")
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    whole.load_state_dict(teacher.body.state_dict(), strict=False)
    method, whole = Distill(small_backbone(), teacher).double(), whole.double()

    def plain(made: Sequence[View]) -> Tensor:
        mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (MEAN, STD))
        pixels = made[0].pixels * std + mean  # 0..1 again
        with torch.no_grad():
            tokens = whole.forward_features((pixels - 0.5) / 0.5)[:, 1:]  # without the class token
        return plain_loss(method, made, tokens.transpose(1, 2).unflatten(2, (4, 4)))

    assert_same_as_plain(method, views(side=64, dtype=torch.float64), "loss_similarity", plain)


def test_chance_is_the_best_constant() -> None:
    method = Distill(small_backbone(), teacher_of("resnet18"))
    made = views(side=64)
    _, shown = method(made, None, with_health=True)
    wanted = torch.nn.functional.normalize(method.teacher(made[0].pixels)["c5"], dim=1)
    best = wanted.mean(dim=(0, 2, 3))
    for constant, is_best in ((best, True), (wanted[0, :, 0, 0], False), (torch.ones(512), False)):
        loss = distill_loss(constant.view(1, -1, 1, 1).expand_as(wanted), wanted)
        assert (float(loss) == pytest.approx(float(shown["chance"]), abs=1e-6)) == is_best
        assert float(loss) >= float(shown["chance"]) - 1e-6


def test_the_spread_is_a_share_of_the_teachers() -> None:
    """A random teacher hardly tells images apart, and who repeats it is not to blame."""
    method = Distill(small_backbone(), teacher_of("resnet18"))
    made = views(side=64)
    with patch.object(distill, "interpolate", lambda *_, **__: method.teacher(made[0].pixels)["c5"]):
        shown = method(made, None, with_health=True)[1]
    assert float(shown["embedding_spread"]) == pytest.approx(1)
    with patch.object(distill, "interpolate", lambda *_, **__: torch.ones(BATCH, 512, 2, 2)):
        shown = method(made, None, with_health=True)[1]
    assert float(shown["embedding_spread"]) == pytest.approx(0, abs=1e-6)
    assert float(method([views(batch=1, side=64)[0]], None, with_health=True)[1]["embedding_spread"]) == 0


def test_the_teacher_stays_as_it_is_and_is_not_saved() -> None:
    method = Distill(small_backbone(), teacher_of("resnet18"))
    before = copy.deepcopy(method.teacher.state_dict())
    method.train()
    losses, _ = method(views(), None, with_health=False)
    losses["loss_similarity"].backward()
    assert not method.teacher.training and method.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    state = method.state_dict()
    assert state.keys() == {name for name in dict(method.named_parameters()) | dict(method.named_buffers())} - {
        f"teacher.{name}" for name in before
    }
    other = Distill(small_backbone(2), teacher_of("resnet18"))
    other.load_state_dict(state)
    assert torch.equal(other.layer.weight, method.layer.weight)
    del state["layer.weight"]
    with pytest.raises(RuntimeError, match=r"layer\.weight"):
        other.load_state_dict(state)
