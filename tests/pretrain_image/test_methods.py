import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from aligndet_cli.pretrain_image.method import View, embed
from aligndet_cli.pretrain_image.methods.moco import MoCo, moco_loss
from aligndet_cli.pretrain_image.methods.simsiam import SimSiam, simsiam_loss
from aligndet_cli.pretrain_image.methods.supervised import Supervised
from helpers.image_methods import BATCH, small_backbone, views


@torch.no_grad()
def keys_of(moco: MoCo, view: View) -> Tensor:
    return normalize(moco.momentum_head(embed(moco.momentum_backbone, view.pixels)), dim=1)


def test_simsiam_loss_by_hand() -> None:
    predicted_of_second = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    second = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], requires_grad=True)  # cosines 3/5 and -1: mean -0.2
    predicted_of_first = torch.tensor([[0.0, 2.0], [1.0, 1.0]], requires_grad=True)
    first = torch.tensor([[0.0, 7.0], [1.0, 0.0]], requires_grad=True)  # cosines 1 and 1/sqrt(2): mean 0.853553
    loss = simsiam_loss(predicted_of_second, second, predicted_of_first, first)
    assert float(loss.detach()) == pytest.approx(-(-0.2 + 0.853553) / 2, abs=1e-6)
    loss.backward()
    assert first.grad is None and second.grad is None  # the stop-gradient
    # d cos(p, z) / dp = (z/|z| - cos p/|p|) / |p|; of the first pair ((1, 0) - 0.6 * (0.6, 0.8)) / 5 = (0.128, -0.096),
    # a quarter of it (two pairs, two directions), negated.
    assert predicted_of_second.grad is not None
    torch.testing.assert_close(predicted_of_second.grad[0], torch.tensor([-0.032, 0.024]))


def test_moco_loss_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    keys = torch.tensor([[0.6, 0.8], [0.0, 1.0]], requires_grad=True)
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    contrast = moco_loss(queries, keys, queue, temperature=0.5)
    # Query 1: positive 0.6 / 0.5 = 1.2, negatives 0 and -2: log((e^1.2 + 1 + e^-2) / e^1.2) = log(4.455452 / 3.320117).
    # Query 2: positive 2, negatives 2 and 0: log((2 e^2 + 1) / e^2) = log(15.778112 / 7.389056).
    assert float(contrast.loss.detach()) == pytest.approx((0.294130 + 0.758610) / 2, abs=1e-5)
    assert float(contrast.chance) == pytest.approx(1.098612)  # log 3
    assert float(contrast.positive_similarity) == pytest.approx((0.6 + 1.0) / 2)
    assert float(contrast.negative_similarity) == pytest.approx((0.0 - 1.0 + 1.0 + 0.0) / 4)
    assert float(contrast.accuracy) == 0.5  # the second query is as near to a negative
    contrast.loss.backward()
    assert keys.grad is None and queries.grad is not None


def test_queue_is_filled_in_order_and_goes_round() -> None:
    moco = MoCo(small_backbone(), embedding_dim=2, queue_size=4, temperature=0.2)
    first, second = views(batch=3)[1], views(1, batch=3)[1]
    before, after = keys_of(moco, first), keys_of(moco, second)
    moco([first, first], None, with_health=False)
    moco([second, second], None, with_health=False)
    # Rows 0, 1, 2 and then 3, 0, 1.
    torch.testing.assert_close(moco.queue.keys, torch.stack([after[1], after[2], before[2], after[0]]))
    assert int(moco.queue.position) == 2
    many = views(2)[1]  # 6 of them, more than there is room for: the last four stay, from row 2 on
    moco([many, many], None, with_health=False)
    torch.testing.assert_close(moco.queue.keys, keys_of(moco, many)[[4, 5, 2, 3]])


def test_moco_steps_like_its_parts() -> None:
    moco = MoCo(small_backbone(), embedding_dim=8, queue_size=16, temperature=0.2)
    before = moco.queue.keys.clone()
    losses, shown = moco(views(), None, with_health=True)
    losses["loss_contrastive"].backward()  # although the queue has changed since
    assert not torch.equal(moco.queue.keys[:BATCH], before[:BATCH]) and torch.equal(
        moco.queue.keys[BATCH:], before[BATCH:]
    )
    torch.testing.assert_close(moco.queue.keys.norm(dim=1), torch.ones(16))
    assert all((p.grad is not None) == p.requires_grad for p in moco.parameters())
    assert {"chance", "contrast_accuracy", "embedding_rank", "embedding_spread"} <= shown.keys()
    online, momentum = moco.head[0].weight, moco.momentum_head[0].weight
    with torch.no_grad():
        online.add_(1.0)
    expected = 0.9 * momentum + 0.1 * online
    moco.update_momentum(0.9)
    torch.testing.assert_close(momentum, expected)


def test_simsiam_trains_everything_and_needs_no_labels() -> None:
    simsiam = SimSiam(small_backbone(), embedding_dim=32, bottleneck_dim=8)
    losses, shown = simsiam(views(), None, with_health=False)
    assert shown == {} and -1 <= float(losses["loss_similarity"].detach()) <= 1
    losses["loss_similarity"].backward()
    assert all(parameter.grad is not None for parameter in simsiam.parameters())


def test_supervised_is_the_cross_entropy_of_the_classes() -> None:
    method = Supervised(small_backbone(), num_classes=3)
    with torch.no_grad():
        method.fc.weight.zero_()
        method.fc.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    losses, shown = method(views()[:1], torch.tensor([1, 1, 1, 1, 1, 0]), with_health=False)
    # log(2 + e^2) = 2.239545, less 2 for the five of class 1.
    assert float(losses["loss_cls"].detach()) == pytest.approx(2.239545 - 2 * 5 / 6, abs=1e-5)
    assert float(shown["accuracy"]) == pytest.approx(5 / 6) and float(shown["chance"]) == pytest.approx(1.098612)
