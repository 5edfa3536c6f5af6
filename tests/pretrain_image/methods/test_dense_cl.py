"""DenseCL beside a second implementation; partners by hand; queues."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from aligndet_cli.pretrain_image.method import View
from aligndet_cli.pretrain_image.methods.dense_cl import DenseCL, nearest_places
from helpers.image_methods import BATCH, assert_same_as_plain, disturb_copies, small_backbone, views

TAU = 0.3


def small() -> DenseCL:
    return DenseCL(small_backbone(), embedding_dim=8, queue_size=16, temperature=TAU)


def test_partners_are_the_most_similar_places() -> None:
    places = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    others = torch.tensor([[[0.0, 9.0], [1.0, 0.9], [0.1, 0.0]]])  # up, diagonal, right, whatever their lengths
    assert nearest_places(places, others).tolist() == [[2, 0, 1]]


def test_loss_and_gradients_are_those_of_a_plain_implementation() -> None:
    method = small().double()
    disturb_copies(method)

    def plain(made: Sequence[View]) -> Tensor:
        first = method.backbone(made[0].pixels)["c5"]  # (B, C, 2, 2)
        with torch.no_grad():
            second = method.momentum_backbone(made[1].pixels)["c5"]
        whole, dense = [], []
        for image in range(BATCH):
            query = method.head(first[image].mean(dim=(1, 2)))
            key = method.momentum_head(second[image].mean(dim=(1, 2)))
            whole.append(one_loss(query, key, method.queue.keys))
            for row in range(2):
                for column in range(2):
                    place = first[image, :, row, column]
                    others = [second[image, :, y, x] for y in range(2) for x in range(2)]
                    alike = [(place @ other / place.norm() / other.norm()).item() for other in others]
                    partner = others[alike.index(max(alike))]
                    key = method.momentum_dense_head(partner).detach()
                    dense.append(one_loss(method.dense_head(place), key, method.dense_queue.keys))
        return 0.5 * sum(whole) / len(whole) + 0.5 * sum(dense) / len(dense)

    assert_same_as_plain(method, views(side=64, dtype=torch.float64), "loss_contrastive", plain)


def one_loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    query, key = query / query.norm(), (key / key.norm()).detach()
    logits = torch.cat([(query @ key)[None], queue.clone() @ query]) / TAU
    return cross_entropy(logits[None], torch.tensor([0]))


def test_the_dense_queue_has_the_mean_embeddings_of_the_places() -> None:
    method = small()
    made = views(side=64)
    with torch.no_grad():
        last = method.momentum_backbone(made[1].pixels)["c5"].flatten(2).transpose(1, 2)
        pooled = normalize(method.momentum_dense_head(last).mean(dim=1), dim=1)
        whole = normalize(method.momentum_head(last.mean(dim=1)), dim=1)
    _, shown = method(made, None, with_health=True)
    torch.testing.assert_close(method.dense_queue.keys[:BATCH], pooled)
    torch.testing.assert_close(method.queue.keys[:BATCH], whole)
    assert int(method.queue.position) == int(method.dense_queue.position) == BATCH
    assert {"chance", "contrast_accuracy", "embedding_rank", "embedding_spread"} <= shown.keys()
    torch.testing.assert_close(shown["chance"], torch.tensor(17.0).log())
    assert len(method.copies()) == 3
    assert not any(p.requires_grad for _, copied in method.copies() for p in copied.parameters())
