"""What the pretext promises for every detector family."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, make_batch
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.pretrain_box.pretext import BoxPretext, Projector, View
from aligndet_cli.training.recipe import ProjectorRecipe, ProjectorStart
from aligndet_cli.training.schedules import momentum_at
from helpers.small_detectors import SMALL, build_pretext

CPU = torch.device("cpu")


def build(family: str, *, objectness: bool = False, backbone: str = "resnet18", **settings: object) -> BoxPretext:
    torch.manual_seed(0)
    detector = SMALL[family].build(build_backbone(BackboneConfig.model_validate({"name": backbone})), 1)
    detector.trains_objectness = objectness
    return build_pretext(detector, SMALL[family], **settings)


def samples(counts: tuple[int, ...]) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for position, count in enumerate(counts):
        image = torch.randint(0, 256, (3, 80, 112), generator=generator, dtype=torch.uint8)
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([64.0, 32.0])
        boxes = torch.cat([corner, corner + 32 + 12 * torch.rand(count, 2, generator=generator)], dim=1)
        made.append(Sample(position, position, image, boxes, torch.zeros(count, dtype=torch.int64)))
    return made


def views(counts: tuple[int, ...]) -> tuple[View, View]:
    drawn = samples(counts)
    first, second = ViewParams(64, 200), ViewParams(96, 200, flip=True, colour="contrast", magnitude=9)
    return tuple(make_batch(drawn, [p] * len(drawn), CPU, instance_offset=0) for p in (first, second))


@pytest.fixture(params=sorted(DETECTORS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("counts", [(4, 3), (0, 3), (4, 0), (0, 0), (180, 170)])
def test_losses_reach_every_trainable_parameter_and_nothing_else(family: str, counts: tuple[int, int]) -> None:
    pretext = build(family)
    losses, shown = pretext(*views(counts), with_health=True)
    assert all(torch.isfinite(value) for value in (*losses.values(), *shown.values()))
    assert 0 <= shown["counterparts"] <= 1
    sum(losses.values()).backward()
    for name, parameter in pretext.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name.split(".")[1] for name, p in pretext.named_parameters() if p.requires_grad and "online." in name}
    assert "backbone" not in trained
    assert ("class_predictor" in trained) == SMALL[family].RECIPE.needs_clusters
    if sum(counts):
        assert losses["loss_contrastive"] > 0


def test_a_step_moves_the_online_side_only_and_the_update_follows(family: str) -> None:
    pretext = build(family)
    before = copy.deepcopy(pretext.state_dict())
    optimizer = torch.optim.SGD([p for p in pretext.parameters() if p.requires_grad], lr=0.1)
    losses, _ = pretext(*views((4, 3)))
    sum(losses.values()).backward()
    optimizer.step()
    stepped = copy.deepcopy(pretext.state_dict())
    for name, value in stepped.items():
        if ".backbone." in name or name.startswith("momentum"):
            assert torch.equal(value, before[name]), name
    pretext.update_momentum(0.9)
    moved = 0
    for name, online in pretext.named_parameters():
        if not online.requires_grad:
            continue
        twin = name.replace("online.", "momentum.").replace("projector.", "momentum_projector.")
        is_taken_over = name.removeprefix("online.") in SMALL[family].RECIPE.momentum_follows
        expected = stepped[name] if is_taken_over else 0.9 * before[twin] + 0.1 * stepped[name]
        torch.testing.assert_close(pretext.state_dict()[twin], expected)
        moved += int(not torch.equal(before[name], stepped[name]))
    assert moved > 5


def test_the_frozen_backbone_is_shared_and_its_norms_rest(family: str) -> None:
    pretext = build(family)
    assert pretext.momentum.backbone is pretext.online.backbone
    pretext.train()
    assert not any(module.training for module in pretext.online.backbone.modules())


def test_an_unfrozen_backbone_is_trained_and_has_a_momentum_copy(family: str) -> None:
    pretext = build(family, freeze_backbone=False)
    assert pretext.momentum.backbone is not pretext.online.backbone
    losses, _ = pretext(*views((4, 3)))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in pretext.online.backbone.parameters())
    assert all(p.grad is None for p in pretext.momentum.parameters())


@pytest.mark.parametrize(("tasks", "has_contrast"), [("contrastive", True), ("regression", False)])
def test_one_task_alone_trains_only_its_parts(family: str, tasks: str, has_contrast: bool) -> None:
    pretext = build(family, tasks=tasks)
    losses, _ = pretext(*views((4, 3)))
    assert ("loss_contrastive" in losses) == has_contrast
    assert ("loss_box_reg" in losses) != has_contrast
    sum(losses.values()).backward()
    for name, parameter in pretext.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def losses_of(pretext: BoxPretext) -> dict[str, Tensor]:
    torch.manual_seed(1)  # candidates are sampled
    losses: dict[str, Tensor] = pretext(*views((4, 3)))[0]
    return losses


@pytest.mark.parametrize("tasks", ["both", "regression"])
@pytest.mark.parametrize("dense", ["retinanet", "fcos"])
def test_objectness_is_one_more_loss_and_changes_no_other(dense: str, tasks: str) -> None:
    plain, with_score = build(dense, tasks=tasks), build(dense, tasks=tasks, objectness=True)
    losses, scored = losses_of(plain), losses_of(with_score)
    assert scored.keys() - losses.keys() == {"loss_objectness"} and losses.keys() < scored.keys()
    assert all(torch.equal(scored[name], loss) for name, loss in losses.items())
    assert plain.state_dict().keys() == with_score.state_dict().keys()
    assert not plain.online.class_predictor.weight.requires_grad
    sum(scored.values()).backward()
    for name, parameter in with_score.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # The loss is that of fine-tuning on proposals of one class.
    images, targets = views((4, 3))[0]
    torch.testing.assert_close(scored["loss_objectness"], with_score.online(images, targets)["loss_cls"])
    # Trained on nothing else, the score finds where the boxes are.
    optimizer = torch.optim.SGD(with_score.online.class_predictor.parameters(), lr=0.02, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        losses_of(with_score)["loss_objectness"].backward()
        optimizer.step()
    assert losses_of(with_score)["loss_objectness"] < scored["loss_objectness"]


def test_only_the_online_side_drops_out(family: str) -> None:
    pretext = build(family).train()
    kinds = nn.Dropout | nn.MultiheadAttention
    assert all(module.training for module in pretext.online.modules() if isinstance(module, kinds))
    assert not any(module.training for module in pretext.momentum.modules() if isinstance(module, kinds))


def test_both_views_name_the_same_proposals(family: str) -> None:
    first, second = views((4, 3))
    for one, two in zip(first[1], second[1], strict=True):
        assert torch.equal(one.instance_ids, two.instance_ids)
    assert torch.cat([target.instance_ids for target in first[1]]).tolist() == list(range(7))


def test_projector_keeps_slots_apart() -> None:
    torch.manual_seed(0)
    projector = Projector(5, ProjectorRecipe(6), 4, num_slots=3)
    nn.init.normal_(projector.output.bias)
    features, slots = torch.randn(11, 5), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 0])
    everything = projector.output(projector.hidden(features).relu()).view(11, 3, 4)
    expected = normalize(everything[torch.arange(11), slots], dim=1)
    torch.testing.assert_close(projector(features, slots), expected)


def test_projector_with_one_slot_and_no_rows() -> None:
    for num_slots in (1, 9):
        projector = Projector(5, ProjectorRecipe(6), 4, num_slots)
        assert projector(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


def test_projectors_start_as_released() -> None:
    def deviations(start: ProjectorStart) -> list[float]:
        torch.manual_seed(0)
        projector = Projector(256, ProjectorRecipe(256, start), 256, num_slots=1)
        return [float(layer.weight.detach().std()) for layer in (projector.hidden, projector.output)]

    assert deviations("normal") == pytest.approx([0.01, 0.01], rel=0.01)
    assert deviations("kaiming") == pytest.approx([(2 / 256) ** 0.5] * 2, rel=0.01)  # 0.088
    assert deviations("torch") == pytest.approx([(1 / 3 / 256) ** 0.5] * 2, rel=0.01)  # even in +-1/sqrt(256): 0.036


def test_momentum_rises_on_a_cosine() -> None:
    # 1 - (1 - m) * (cos(pi k / K) + 1) / 2: m at the start, halfway between m and 1 in the middle, 1 at the end
    assert momentum_at(0, 100, 0.996) == pytest.approx(0.996)
    assert momentum_at(50, 100, 0.996) == pytest.approx(0.998)
    assert momentum_at(100, 100, 0.996) == pytest.approx(1.0)


def test_same_seed_same_bits(family: str) -> None:
    def once() -> Tensor:
        pretext = build(family)
        torch.manual_seed(3)
        losses, _ = pretext(*views((4, 3)))
        return torch.stack(list(losses.values()))

    assert torch.equal(once(), once())


@pytest.mark.parametrize("family", ["htc", "fcos"])
def test_each_head_has_a_contrast_in_both_pyramids(family: str) -> None:
    pretext = build(family, backbone="cb-resnet18")
    losses, shown = pretext(*views((4, 3)), with_health=True)
    heads = pretext.online.head_weights
    # Liang et al., CBNet: 0.5 for the assistant, whose heads come first, and 1 for the lead; one projector for both
    weights = [0.5 * weight for weight in heads] + list(heads)
    assert isinstance(pretext.projector, nn.ModuleList) == (len(heads) > 1)
    contrasts = [shown[f"head{number}_loss_contrastive"] for number in range(1, len(weights) + 1)]
    assert f"head{len(weights) + 1}_loss_contrastive" not in shown
    assert len({contrast.item() for contrast in contrasts}) == len(contrasts)
    expected = sum(weight * contrast for weight, contrast in zip(weights, contrasts, strict=True))
    torch.testing.assert_close(losses["loss_contrastive"], expected)
    sum(losses.values()).backward()
    for name, parameter in pretext.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not any(parameter.requires_grad for parameter in pretext.online.backbone.parameters())


@pytest.mark.parametrize("family", ["cascade-rcnn", "retinanet"])
def test_two_pyramids_that_are_alike_count_one_and_a_half_times(family: str) -> None:
    # Links of ResNets add nothing before they are trained, so with equal weights both pyramids are those of one.
    one, both = build(family, tasks="regression"), build(family, tasks="regression", backbone="cb-resnet18")
    parts = one.online.state_dict()
    for name in ("assistant", "lead"):
        own = both.online.backbone.get_submodule(name)
        own.load_state_dict({key: parts[f"backbone.{key}"] for key in own.state_dict()})
    rest = {key: value for key, value in parts.items() if not key.startswith("backbone.")}
    assert both.online.load_state_dict(rest, strict=False).unexpected_keys == []
    of_one, of_both = losses_of(one), losses_of(both)
    for name in of_one.keys() - {"loss_objectness", "loss_rpn_box_reg"}:  # anchors of the RPN are drawn
        assert of_one[name] > 0
        torch.testing.assert_close(of_both[name], 1.5 * of_one[name])
