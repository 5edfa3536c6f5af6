"""SoCo beside a second implementation; boxes, levels and pairs by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torchvision.ops import roi_align

from aligndet_cli.data.crops import CropParams
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge_similarity
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.pretrain_box.methods.soco import SoCoViews, similarity_loss
from aligndet_cli.pretrain_box.methods.soco_views import (
    NUM_BOXES,
    choose_boxes,
    common_boxes,
    draw_three_views,
    jitter_boxes,
    level_of_sides,
    place_boxes,
)
from helpers.methods import SETTINGS, assert_gradients_reach_what_is_trained, build, config_of, draw_samples

CPU = torch.device("cpu")
SMALL = {"projector": {"hidden_dim": 24, "embedding_dim": 16}}
SQUARE = {"views": {"short_side": (64,)}, **SMALL}


def small(family: str = "faster-rcnn") -> SoCoViews:
    return build("soco", family, **SQUARE)


def plain_loss(module: SoCoViews, counts: tuple[int, ...]) -> torch.Tensor:
    """The loss of one batch, box by box and pair by pair."""
    views = draw_three_views(draw_samples(counts), 64, SETTINGS.seed, CPU)

    def embed(model, projector, view):
        pyramid = model.neck(model.backbone(view.pixels))
        pooled = []
        for roi in view.rois:
            side = float(((roi[3] - roi[1]) * (roi[4] - roi[2])).sqrt())
            level = 0 if side <= 48 else 1 if side <= 96 else 2 if side <= 192 else 3
            pooled.append(roi_align(pyramid[level], roi[None], 7, 1 / (4 * 2**level), 0, True))
        return projector(model.head(torch.cat(pooled))).view(*view.ids.shape, -1)

    with torch.no_grad():
        wanted = [embed(module.momentum, module.momentum_projector, view) for view in views]
    projected = [embed(module.model, module.projector, view) for view in views]
    predicted = [module.predictor(one.flatten(0, 1)).view_as(one) for one in projected]
    terms = []
    for image in range(len(counts)):
        for other in (1, 2):
            for ones, twos in ((predicted, wanted), (wanted, predicted)):
                cosines = []
                for a in range((other - 1) * NUM_BOXES, other * NUM_BOXES):
                    for b in range(NUM_BOXES):
                        if views[0].ids[image, a] == views[other].ids[image, b]:
                            cosines.append(
                                functional.cosine_similarity(ones[0][image, a], twos[other][image, b], dim=0)
                            )
                if cosines:
                    terms.append(-2 * sum(cosines) / (len(cosines) + 1e-6))
    return sum(terms) / len(counts)


@pytest.mark.parametrize("counts", [(5, 2, 1), (3, 0, 6)])
def test_loss_and_gradients_are_those_of_a_plain_implementation(counts: tuple[int, ...]) -> None:
    module = small()
    with torch.no_grad():  # a momentum side of its own
        for parameter in (*module.momentum.parameters(), *module.momentum_projector.parameters()):
            parameter.mul_(1 + 0.1 * torch.randn(1))
    losses, shown = module(draw_samples(counts), 0)
    assert losses.keys() == {"loss_similarity"} and shown.keys() == {"embedding_spread", "embedding_rank"}
    losses["loss_similarity"].backward()
    assert_gradients_reach_what_is_trained(module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    expected = plain_loss(module, counts)
    torch.testing.assert_close(losses["loss_similarity"], expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    for name, parameter in module.named_parameters():
        if name in gradients:
            plain = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # a level without boxes
            # float32 adds up to 2e-6 of the largest entry on the way through the backbone.
            torch.testing.assert_close(
                gradients[name], plain, rtol=0, atol=1e-6 + 5e-6 * float(plain.abs().max()), msg=name
            )


def test_all_but_rpn_predictors_and_masks_is_trained_and_saved() -> None:
    module = small("mask-rcnn")
    model = module.detector
    idle = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert idle == {"rpn", "class_predictor", "box_predictor", "mask_head", "mask_predictor"}
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert set(module.left_out) | set(model.fresh_modules) == idle
    config = METHODS["soco"].detector_config(config_of("soco", "mask-rcnn", **SQUARE))
    assert (config.neck_norm, config.head_norm) == ("batch", "none")  # the small detector asks for none in its head
    plain = METHODS["soco"].detector_config(config_of("soco", "mask-rcnn", detector={"family": "mask-rcnn"}, **SMALL))
    assert (plain.neck_norm, plain.head_norm) == ("batch", "batch")


def test_a_recorded_config_says_which_norm_the_head_has() -> None:
    views = {"short_side": (64,)}
    plain = config_of("soco", "mask-rcnn", detector={"family": "mask-rcnn"}, views=views)
    asked = config_of("soco", "mask-rcnn", detector={"family": "mask-rcnn", "head_norm": "none"}, views=views)
    assert asked.changes_since(plain.hashed_settings()).keys() == {"detector.head_norm"}
    for config in (plain, asked):
        again = PretrainBoxConfig.model_validate(config.to_json())
        assert METHODS["soco"].detector_config(again) == METHODS["soco"].detector_config(config)
    given = PretrainBoxConfig(method="soco", detector=MaskRCNNConfig())
    assert METHODS["soco"].detector_config(given) == METHODS["soco"].detector_config(plain)


def test_the_momentum_side_follows() -> None:
    module = small()
    before = {name: p.clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for parameter in (*module.model.parameters(), *module.projector.parameters()):
            parameter.add_(1.0)
    module.after_step(0)
    # 0.99 of its own and 0.01 of the online side, which is 1 larger; what is not trained stays.
    for part, online in (("momentum", module.model), ("momentum_projector", module.projector)):
        moves = {name: 0.01 if parameter.requires_grad else 0.0 for name, parameter in online.named_parameters()}
        for name, parameter in getattr(module, part).named_parameters():
            torch.testing.assert_close(parameter, before[f"{part}.{name}"] + moves[name])


def test_pairs_by_hand() -> None:
    # Boxes 7 and 5 against boxes 5 and none: one pair, at 60 degrees, cosine 0.5; -2 * 0.5 = -1.
    ones = torch.tensor([[[9.0, 9.0], [2.0, 0.0]]])
    others = torch.tensor([[[0.5, 0.75**0.5], [1.0, 1.0]]])
    ids, other_ids = torch.tensor([[7, 5]]), torch.tensor([[5, -2]])
    assert similarity_loss(ones, others, ids, other_ids) == pytest.approx(-1.0, abs=1e-5)
    # Places without a box never meet, and an image without pairs counts as 0 in the mean.
    two = torch.cat([ones, ones]), torch.cat([others, others])
    more_ids = torch.tensor([[7, 5], [-1, -1]]), torch.tensor([[5, -2], [-2, -2]])
    assert similarity_loss(*two, *more_ids) == pytest.approx(-0.5, abs=1e-5)
    # The same box twice in both views is four pairs: their mean.
    same = torch.tensor([[3, 3]])
    cosines = [1.0, 1.0, 0.5, 0.5]
    twice = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.5, 0.75**0.5]]])
    assert similarity_loss(*twice, same, same) == pytest.approx(-2 * sum(cosines) / 4, abs=1e-5)


def test_levels_by_size() -> None:
    sides = [1, 48, 49, 96, 97, 192, 193, 224]
    rois = torch.tensor([[0.0, 0.0, 0.0, side, side] for side in sides])
    assert level_of_sides(rois).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert level_of_sides(torch.tensor([[0.0, 0.0, 0.0, 24.0, 96.0]])).tolist() == [0]  # 24 x 96 is as large as 48 x 48


def test_boxes_follow_crop_scale_and_flip() -> None:
    # A crop of 40 x 20 pixels at (10, 30) in a view of 80: x is doubled and y made four times as large.
    params = CropParams((30, 10, 20, 40))
    boxes = torch.tensor([[10.0, 30.0, 50.0, 50.0], [0.0, 0.0, 20.0, 35.0], [60.0, 60.0, 70.0, 70.0]])
    assert place_boxes(boxes, params, 80).tolist() == [[0, 0, 80, 80], [0, 0, 20, 20], [80, 80, 80, 80]]
    flipped = place_boxes(boxes[1:2], CropParams((30, 10, 20, 40), flip=True), 80)
    assert flipped.tolist() == [[60, 0, 80, 20]]
    assert common_boxes(boxes, params).tolist() == [0, 1]


def test_boxes_are_drawn_without_repeats_unless_there_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    many = choose_boxes(torch.arange(9), generator)
    assert len(set(many.tolist())) == NUM_BOXES
    assert sorted(choose_boxes(torch.tensor([4, 8, 9]), generator).tolist()) in (
        [4, 4, 8, 9],
        [4, 8, 8, 9],
        [4, 8, 9, 9],
    )
    assert choose_boxes(torch.tensor([], dtype=torch.int64), generator).tolist() == [-1] * NUM_BOXES
    boxes = torch.tensor([[10.0, 10.0, 30.0, 50.0]]).repeat(1000, 1)
    moved = jitter_boxes(boxes, (100, 100), generator)
    is_moved = (moved != boxes).any(dim=1)
    assert 0.4 < is_moved.float().mean() < 0.6
    corners, sizes = (moved - boxes)[:, :2].abs(), (moved[:, 2:] - moved[:, :2] - torch.tensor([20.0, 40.0])).abs()
    for changes in (corners, sizes):  # up to 2 pixels of 20 in width, 4 of 40 in height
        assert 1.8 < changes[:, 0].max() <= 2.001 and 3.6 < changes[:, 1].max() <= 4.001


def test_views_share_their_boxes() -> None:
    samples = draw_samples((6, 1, 0))
    first, second, third = draw_three_views(samples, 64, 0, CPU)
    assert [view.pixels.shape[-1] for view in (first, second, third)] == [64, 64, 32]
    for number, view in enumerate((second, third)):
        own = first.ids[:, number * NUM_BOXES : (number + 1) * NUM_BOXES]
        assert torch.equal(own[:2], view.ids[:2]) and (view.ids[2] == -2 - number).all() and (own[2] == -1).all()
    assert set(first.ids[1].tolist()) <= {0, -1}
    again = draw_three_views(samples, 64, 0, CPU)
    assert all(torch.equal(one.pixels, two.pixels) for one, two in zip((first, second, third), again, strict=True))


def test_a_collapsed_network_is_called_collapsed(tmp_path: Path) -> None:
    module, samples = small(), draw_samples((5, 4, 6))
    lines = []
    for step in range(5):
        losses, shown = module(samples, step)
        lines.append({name: float(value.detach()) for name, value in {**losses, **shown}.items()})
        with torch.no_grad():  # from the second step on, all embeddings are one
            module.projector[-1].weight.zero_()
            module.projector[-1].bias.fill_(1.0)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = judge_similarity(tmp_path / "metrics.jsonl", best=-8.0)
    assert found["verdict"] == "collapsed" and "no longer be told apart" in found["explanation"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [lines[0]] * 5)))
    assert judge_similarity(tmp_path / "metrics.jsonl", best=-8.0)["verdict"] == "not learning"
    better = [{**lines[0], "loss_similarity": lines[0]["loss_similarity"] - step} for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, better)))
    assert judge_similarity(tmp_path / "metrics.jsonl", best=-8.0)["verdict"] == "healthy"


def test_what_is_refused() -> None:
    check = METHODS["soco"].check
    with pytest.raises(ConfigError, match="--method soco: is for faster-rcnn, mask-rcnn, not for htc"):
        check(config_of("soco", "htc", **SQUARE))
    for settings, message in (
        ({"freeze_backbone": True}, "--freeze-backbone: --method soco trains the backbone"),
        ({"views": {"short_side": (64, 96)}}, "--short-side 64,96: --method soco has square views"),
        ({"views": {"short_side": (64,), "long_side": 99}}, "views.long_side: no effect"),
        ({"projector": {"start": "kaiming"}}, "projector.start: no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(config_of("soco", "faster-rcnn", **{**SQUARE, **settings}))
