"""UP-DETR beside a second implementation, and its masks and patches by hand."""

import pytest
import torch
from torch.nn import functional

from aligndet_cli.detectors.parts.transformer import encode_position
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.pretrain_box.methods.patches import cut_patches
from aligndet_cli.pretrain_box.methods.up_detr import (
    NUM_PATCHES,
    UPDETRViews,
    other_patches,
    reconstruction_loss,
    with_patches,
)
from helpers.methods import SETTINGS, assert_gradients_reach_what_is_trained, build, config_of, draw_samples
from helpers.small_detectors import SMALL

CPU = torch.device("cpu")


def small() -> UPDETRViews:
    detector = SMALL["detr"].model_copy(update={"num_queries": 20}).model_dump()
    return build("up-detr", "detr", detector=detector)


def plain_decoder(module: UPDETRViews, cells: torch.Tensor, position: torch.Tensor, queries: torch.Tensor) -> list:
    """DETR's decoder for one image, whose queries attend to themselves patch by patch."""
    decoder, outputs = module.model.transformer.decoder, []
    memory = module.model.transformer.encoder(cells[None], position[None], torch.zeros(1, len(cells), dtype=torch.bool))
    found, size = torch.zeros_like(queries), len(queries) // NUM_PATCHES
    for layer in decoder.layers:
        attended = []
        for start in range(0, len(queries), size):
            own = slice(start, start + size)
            asking = (found + queries)[own][None]
            attended.append(layer.self_attn(asking, asking, found[own][None])[0][0])
        found = layer.norm1(found + torch.cat(attended))
        seen = layer.multihead_attn((found + queries)[None], memory + position[None], memory)[0][0]
        found = layer.norm2(found + seen)
        found = layer.norm3(found + layer.linear2(layer.linear1(found).relu()))
        outputs.append(decoder.norm(found))
    return outputs


def test_states_and_losses_are_those_of_a_plain_implementation() -> None:
    module = small().eval()  # no patch is dropped
    samples = draw_samples((2, 1))
    losses, _ = module(samples, 0)
    torch.stack(list(losses.values())).sum().backward()
    assert_gradients_reach_what_is_trained(module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()

    drawn = [with_patches(sample, SETTINGS.seed) for sample in samples]
    images, targets = module.make_view(drawn)
    states, features = [], []
    for image, sample in enumerate(drawn):
        patches = cut_patches([sample], SETTINGS.seed, CPU)
        feature = module.model.backbone(patches)["c5"].mean(dim=(2, 3))  # (P, D)
        features.append(feature)
        queries = torch.stack([module.patch2query(feature[query // 2]) for query in range(20)])
        queries = queries + module.model.query_embedding.weight
        # All images have one size, and 64 x 90 pixels are padded to 64 x 96: cells of padding are left out.
        height, width = images.sizes_hw[image]
        extracted = module.model.extract(images).maps["c5"]
        columns = -(-width // 32)
        cells = module.model.neck(extracted)[image, :, : -(-height // 32), :columns]
        inside = torch.ones(1, *cells.shape[1:], dtype=torch.bool)
        position = encode_position(inside, module.model.feature_dim)[0].flatten(0, 1)
        states.append(torch.stack(plain_decoder(module, cells.flatten(1).T, position, queries)))
    hidden = torch.stack(states, dim=1)  # (L, B, Q, C)
    expected, matched = module.model.losses_of(hidden, targets, images.sizes_hw)
    distances = []
    for layer in range(len(hidden)):
        parts = []
        for image in range(len(drawn)):
            for query in range(20):
                place = int(matched[layer, image, query])
                if place >= 0:
                    told = functional.normalize(module.feature_align(hidden[layer, image, query]), dim=0)
                    wanted = functional.normalize(torch.cat(features)[place], dim=0)
                    parts.append(2 - 2 * told @ wanted)
        assert len(parts) == NUM_PATCHES * len(drawn)  # every patch has one query in every layer
        distances.append(torch.stack(parts).mean())
    expected["loss_reconstruction"] = torch.stack(distances).sum()
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    torch.stack(list(expected.values())).sum().backward()
    for name, parameter in module.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_queries_of_a_patch_see_each_other_and_no_other() -> None:
    blocked = other_patches(6, 2, CPU)
    one, two = [False] * 3 + [True] * 3, [True] * 3 + [False] * 3
    assert blocked.tolist() == [one] * 3 + [two] * 3
    # Three patches of two queries each: the number of patches and the queries of a patch are not the same.
    assert (~other_patches(6, 3, CPU)).nonzero().tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [2, 3], [3, 2], [3, 3], [4, 4], [4, 5], [5, 4], [5, 5],
    ]  # fmt: skip


def test_patches_are_dropped_in_training_only() -> None:
    module = small()
    features = torch.randn(40, NUM_PATCHES, module.patch2query.in_features)
    embedding = module.model.query_embedding.weight
    module.eval()
    whole = module._queries(features)
    torch.testing.assert_close(whole[:, 3], module.patch2query(features[:, 1]) + embedding[3])
    module.train()
    torch.manual_seed(0)
    queries = module._queries(features)
    is_dropped = (queries == embedding).all(dim=2)  # (40, 20)
    assert torch.equal(queries[~is_dropped], whole[~is_dropped])
    assert 0.06 < is_dropped.float().mean() < 0.14


@pytest.mark.parametrize("size_hw", [(80, 112), (300, 40), (16, 90), (5, 3)])
def test_patches_lie_in_the_image(size_hw: tuple[int, int]) -> None:
    [sample] = draw_samples((0,), size_hw=size_hw) if min(size_hw) > 44 else [tiny(size_hw)]
    boxes = with_patches(sample, 7).boxes
    height, width = size_hw
    assert boxes.shape == (NUM_PATCHES, 4) and torch.equal(boxes, boxes.round())
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    for lengths, side in ((sides[:, 0], width), (sides[:, 1], height)):
        assert lengths.min() >= min(8, side) and lengths.max() <= max(side - 8, min(8, side))
    assert torch.equal(boxes, with_patches(sample, 7).boxes)
    assert max(size_hw) < 9 or not torch.equal(boxes, with_patches(sample, 8).boxes)


def tiny(size_hw: tuple[int, int]):
    [sample] = draw_samples((0,))
    return type(sample)(0, 0, torch.zeros(3, *size_hw, dtype=torch.uint8), sample.boxes, sample.class_ids)


def test_reconstruction_by_hand() -> None:
    # Two layers of one pair each: equal directions are 0 apart, right angles 2.
    found, wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert reconstruction_loss(found, wanted, num_layers=2) == 2.0
    assert reconstruction_loss(found, wanted, num_layers=1) == 1.0


def test_what_is_refused() -> None:
    check = METHODS["up-detr"].check
    with pytest.raises(ConfigError, match="--method up-detr: is for detr, not for fcos"):
        check(config_of("up-detr", "fcos"))
    odd = SMALL["detr"].model_copy(update={"num_queries": 25}).model_dump()
    with pytest.raises(ConfigError, match="detector.num_queries = 25: .* give a multiple of 10"):
        check(config_of("up-detr", "detr", detector=odd))
    with pytest.raises(ConfigError, match="--no-freeze-backbone: .* with the features of its backbone; leave it out"):
        check(config_of("up-detr", "detr", freeze_backbone=False))
