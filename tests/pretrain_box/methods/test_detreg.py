"""DETReg beside a second implementation, pair by pair."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional
from torchvision.ops import box_convert, generalized_box_iou

from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.pretrain_box.methods.detreg import DETRegViews, embedding_loss
from aligndet_cli.pretrain_box.methods.patches import SIDE, cut_patches
from helpers.methods import SETTINGS, assert_gradients_reach_what_is_trained, build, config_of, draw_samples


def plain_losses(module: DETRegViews, counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The losses of one batch: for every layer and image the cheapest pairs, then every pair by itself."""
    samples = draw_samples(counts)
    images, targets = module.make_view(samples)
    model, config = module.model, module.model.config
    hidden = model.decode(model.extract(images))
    logits, boxes = model.predict(hidden)
    patches = cut_patches(samples, SETTINGS.seed, torch.device("cpu")).split(counts)
    found = {name: [] for name in ("loss_cls", "loss_box_reg", "loss_giou", "loss_embedding")}
    for layer in range(len(hidden)):
        weighted, weights, distances, overlaps = [], [], [], []
        for image, (target, (height, width)) in enumerate(zip(targets, images.sizes_hw, strict=True)):
            true = box_convert(target.boxes, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
            probability = logits[layer, image].softmax(dim=1)[:, :1].expand(-1, len(true))
            distance = torch.cdist(boxes[layer, image], true, p=1)
            overlap = generalized_box_iou(
                box_convert(boxes[layer, image], "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy")
            )
            cost = 5 * distance - probability - 2 * overlap
            pairs = list(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))
            matched = {query for query, _ in pairs}
            for query in range(config.num_queries):
                weight = 1.0 if query in matched else 0.1
                weights.append(weight)
                label = torch.tensor(0 if query in matched else 1)
                weighted.append(weight * functional.cross_entropy(logits[layer, image, query], label))
            distances += [distance[pair] for pair in pairs]
            overlaps += [1 - overlap[pair] for pair in pairs]
            if layer == len(hidden) - 1 and pairs:
                wanted = module.embedder(patches[image])["c3"].mean(dim=(2, 3))
                for query, box in pairs:
                    told = module.feature_embed(hidden[layer, image, query])
                    found["loss_embedding"].append((told - wanted[box]).abs().mean() / sum(counts))
        found["loss_cls"].append(sum(weighted) / sum(weights))
        found["loss_box_reg"].append(5 * sum(distances) / len(distances))
        found["loss_giou"].append(2 * sum(overlaps) / len(overlaps))
    return {name: torch.stack(parts).sum() for name, parts in found.items()}


@pytest.mark.parametrize("counts", [(4, 3), (2, 0)])
def test_losses_and_gradients_are_those_of_a_plain_implementation(counts: tuple[int, ...]) -> None:
    module = build("detreg", "detr")
    losses, shown = module(draw_samples(counts), 0)
    torch.stack(list(losses.values())).sum().backward()
    assert_gradients_reach_what_is_trained(module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in gradients} == {"model", "feature_embed"}
    assert not any(name.startswith("model.backbone") for name in gradients)
    module.zero_grad()
    expected = plain_losses(module, counts)
    torch.stack(list(expected.values())).sum().backward()
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    for name, parameter in module.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert shown.keys() == {"embedding_constant", "embedding_variety"}


def test_without_boxes_everything_still_has_a_gradient() -> None:
    module = build("detreg", "detr")
    losses, _ = module(draw_samples((0, 0)), 0)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["loss_embedding"] == 0
    assert_gradients_reach_what_is_trained(module)


def test_embeddings_by_hand() -> None:
    # |1 - 0| + |2 - 4| and |0 - 0| + |3 - 2|: 4 in all, of 4 numbers.
    told, wanted = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert embedding_loss(told, wanted) == 1.0
    assert embedding_loss(told[:0], wanted[:0]) == 0.0


def test_a_patch_is_the_pixels_of_its_box() -> None:
    [sample] = draw_samples((1,))
    sample.boxes[:] = torch.tensor([[20.2, 30.7, 51.6, 60.0]])  # grown to whole pixels: 20..52 x 30..60
    sample.image[:] = 200
    sample.image[:, 30:60, 20:52] = 0
    patches = cut_patches([sample], 0, torch.device("cpu"))
    assert patches.shape == (1, 3, SIDE, SIDE)
    assert patches[0].flatten(1).std(dim=1).max() < 1e-5  # black in any brightness, and nothing beside it


def test_the_embedder_has_its_own_weights_and_stays_as_it_is() -> None:
    module = build("detreg", "detr").train()
    assert module.embedder is not module.model.backbone
    assert not any(part.training for part in module.embedder.modules())
    assert set(module.extra_parts()) == {"feature_embed"}


def test_other_detectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="--method detreg: is for detr, not for retinanet; give --detector detr$"):
        METHODS["detreg"].check(config_of("detreg", "retinanet"))


@pytest.mark.parametrize("embedder", ["none", "auto"])
def test_an_embedder_that_may_be_random_is_refused(embedder: str) -> None:
    with pytest.raises(ConfigError, match=f"^embedder = {embedder}: may be random, .* or leave it out"):
        METHODS["detreg"].check(config_of("detreg", "detr", embedder=embedder))
