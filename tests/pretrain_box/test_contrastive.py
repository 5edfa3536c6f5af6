"""The closed form against the authors' per-instance loop: reference numbers (G1) and an independent loop."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.utils._python_dispatch import TorchDispatchMode

from aligndet_cli.pretrain_box import contrastive
from aligndet_cli.pretrain_box.contrastive import contrastive_loss
from aligndet_cli.training.embeddings import Contrast, effective_rank
from helpers.host_reads import host_reads, shown

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "g1_contrastive.json").read_text())
ARRAYS = np.load(GOLDEN / "g1_contrastive.npz")
CASES = [case for case in META["cases"] if f"{case}/loss64" in ARRAYS]


def embeddings(case: str, side: str) -> np.ndarray:
    """Stored, or for the large case drawn by the formula of the reference: RandomState(crc32(name) + seed)."""
    if f"{case}/{side}" in ARRAYS:
        return ARRAYS[f"{case}/{side}"]
    info = META["cases"][case]
    state = np.random.RandomState((zlib.crc32(f"emb/{case}/{side}".encode()) + META["seed"]) % 2**32)
    return state.standard_normal((info[f"n_{side}"], info["dim"])).astype(np.float32)


def inputs(case: str, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Raw embeddings, ids with -1 as background, and which boxes take part (weight > 0)."""
    labels = torch.from_numpy(ARRAYS[f"{case}/{side}_labels"].astype(np.int64))
    ids = torch.where(labels == META["background_id"], -1, labels)
    return torch.from_numpy(embeddings(case, side)), ids, torch.from_numpy(ARRAYS[f"{case}/{side}_weights"]) > 0


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str) -> None:
    raw, online_ids, is_online = inputs(case, "online")
    momentum, momentum_ids, is_momentum = inputs(case, "target")
    raw = raw.double().requires_grad_()
    contrast = contrastive_loss(
        normalize(raw, dim=1)[is_online],
        online_ids[is_online],
        normalize(momentum.double(), dim=1)[is_momentum],
        momentum_ids[is_momentum],
        temperature=META["cases"][case]["temperature"],
    )
    (contrast.loss * META["cases"][case]["loss_weight"]).backward()
    loss = contrast.loss.item() * META["cases"][case]["loss_weight"]
    assert loss == pytest.approx(float(ARRAYS[f"{case}/loss64"]), rel=1e-6, abs=1e-9)
    gradient = raw.grad.numpy()
    flat = gradient.ravel()
    checksum = np.array(
        [flat.sum(), np.abs(flat).sum(), np.sqrt((flat**2).sum()), flat @ np.cos(0.1 * np.arange(flat.size))]
    )
    expected = ARRAYS[f"{case}/grad_online_checksum"]
    np.testing.assert_allclose(checksum, expected, atol=1e-6 * max(expected[1], 1e-9))
    if f"{case}/grad_online" in ARRAYS:
        np.testing.assert_allclose(gradient, ARRAYS[f"{case}/grad_online"], atol=1e-6)


def per_instance_loop(online: Tensor, online_ids: Tensor, momentum: Tensor, momentum_ids: Tensor, tau: float) -> Tensor:
    """Compute docs/paper.md §4.3 word by word: every instance, every query, every positive."""
    terms = []
    for instance in online_ids[online_ids >= 0].unique():
        queries = online[online_ids == instance]
        positives = momentum[momentum_ids == instance]
        positives = positives if len(positives) else queries
        negatives = torch.cat([online[online_ids != instance], momentum[momentum_ids != instance]]).detach()
        pairs = []
        for query in queries:
            negative = (query @ negatives.T / tau).exp().sum()
            for positive in positives:
                own = (query @ positive / tau).exp()
                pairs.append(-(own / (own + negative)).log())
        terms.append(torch.stack(pairs).mean())
    return torch.stack(terms).mean()


def random_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    online = torch.randn(37, 8, generator=generator, dtype=torch.float64)
    momentum = torch.randn(41, 8, generator=generator, dtype=torch.float64)
    online_ids = torch.randint(-1, 300, (37,), generator=generator)
    online_ids[:20] = torch.randint(250, 260, (20,), generator=generator)
    momentum_ids = torch.randint(252, 262, (41,), generator=generator)
    return online, online_ids, normalize(momentum, dim=1), momentum_ids


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop_in_value_and_gradient(seed: int) -> None:
    online, online_ids, momentum, momentum_ids = random_problem(seed)
    gradients = []
    for function in (
        lambda *args: contrastive_loss(*args, temperature=0.3).loss,
        lambda *args: per_instance_loop(*args, 0.3),
    ):
        raw = online.clone().requires_grad_()
        loss = function(normalize(raw, dim=1), online_ids, momentum, momentum_ids)
        loss.backward()
        gradients.append((loss.item(), raw.grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-11)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=0, atol=1e-11)


Problem = tuple[Tensor, Tensor, Tensor, Tensor]  # embeddings and ids of the online view, then of the momentum view


def all_at_once(online: Tensor, online_ids: Tensor, momentum: Tensor, momentum_ids: Tensor, tau: float) -> Contrast:
    """Every number of a `Contrast` from whole matrices, with the gradient of autograd."""
    queries, ids = online[online_ids >= 0], online_ids[online_ids >= 0]
    keys = torch.cat([momentum, online.detach()])
    is_same = ids[:, None] == torch.cat([momentum_ids, online_ids])  # (P, S2 + S1)
    logits = queries @ keys.T / tau
    negatives = logits.masked_fill(is_same, torch.finfo(logits.dtype).min)
    is_positive = ids[:, None] == torch.cat([momentum_ids, ids])  # (P, S2 + P)
    is_paired = is_positive[:, : len(momentum)].any(dim=1)
    is_positive[:, len(momentum) :] &= ~is_paired[:, None]
    own = queries @ torch.cat([momentum, queries]).T / tau
    weights = torch.zeros_like(own)
    for instance in ids.unique():
        of_instance = is_positive & (ids == instance)[:, None]
        weights[of_instance] = 1 / (of_instance.sum() * len(ids.unique())).double()
    num_negatives = (~is_same).sum(dim=1)
    return Contrast(
        loss=(softplus(negatives.logsumexp(dim=1)[:, None] - own) * weights).sum(),
        chance=(num_negatives.double().log1p() * weights.sum(dim=1)).sum(),
        positive_similarity=(own * weights).sum() * tau,
        negative_similarity=logits.masked_fill(is_same, 0).sum() * tau / max(num_negatives.sum(), 1),
        accuracy=((own > negatives.amax(dim=1)[:, None]) * weights).sum(),
        counterparts=is_paired.double().mean(),
    )


def with_orphans() -> Problem:
    return random_problem(1)


def without_orphans() -> Problem:
    online, online_ids, momentum, momentum_ids = random_problem(1)
    return online, torch.where(torch.isin(online_ids, momentum_ids), online_ids, -1), momentum, momentum_ids


def nothing_but_orphans() -> Problem:
    online, online_ids, momentum, momentum_ids = random_problem(1)
    return online, online_ids, momentum, momentum_ids + 1000


def nothing_in_the_momentum_view() -> Problem:
    online, online_ids, momentum, momentum_ids = random_problem(1)
    return online, online_ids, momentum[:0], momentum_ids[:0]


def no_negatives() -> Problem:
    online, online_ids, momentum, momentum_ids = random_problem(1)
    return online, torch.full_like(online_ids, 7), momentum, torch.full_like(momentum_ids, 7)


@pytest.mark.parametrize("rows", [1, 5, 8, 1000])
@pytest.mark.parametrize(
    "problem", [with_orphans, without_orphans, nothing_but_orphans, nothing_in_the_momentum_view, no_negatives]
)
def test_blocks_give_what_whole_matrices_give(
    problem: Callable[[], Problem], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    online, online_ids, momentum, momentum_ids = problem()
    monkeypatch.setitem(contrastive.BLOCK_BYTES, "cpu", rows * (len(online) + len(momentum)) * 8)
    found = []
    for function in (lambda *args: contrastive_loss(*args, temperature=0.3), lambda *args: all_at_once(*args, 0.3)):
        raw = online.clone().requires_grad_()
        contrast = function(normalize(raw, dim=1), online_ids, momentum, momentum_ids)
        (3 * contrast.loss).backward()
        found.append((torch.stack([contrast.loss.detach(), *contrast.shown().values()]).double(), raw.grad))
    assert len(found[0][0]) == 6
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)


def test_blocks_do_not_make_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    online, online_ids, momentum, momentum_ids = with_orphans()
    online.requires_grad_()
    monkeypatch.setitem(contrastive.BLOCK_BYTES, "cpu", 1)
    reads = host_reads(
        lambda: contrastive_loss(online, online_ids, momentum, momentum_ids, temperature=0.5).loss.backward(), "cpu"
    )
    assert reads.total() == 3, shown(reads)  # which are queries, and the pairs of those with a counterpart and without


def test_memory_does_not_grow_with_the_number_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    # 600 queries x 1200 keys = 720,000 similarities; in blocks of 16 KiB no tensor may have more values than the
    # embeddings (600 + 600) x 8, or a block's pairs.
    monkeypatch.setitem(contrastive.BLOCK_BYTES, "cpu", 1 << 14)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple | list) else (result,)
            largest = max(largest, *(t.numel() for t in tensors if isinstance(t, Tensor)))
            return result

    generator = torch.Generator().manual_seed(0)
    online, momentum = (normalize(torch.randn(600, 8, generator=generator), dim=1) for _ in range(2))
    ids = torch.arange(600) // 4
    with Watch():
        contrastive_loss(online.requires_grad_(), ids, momentum, (ids + 30) % 200, temperature=0.5).loss.backward()
    assert largest == 1200 * 8


def test_counterparts_are_counted_over_queries() -> None:
    # Instance 0 has three boxes and a counterpart, instance 1 one and none; background does not count.
    online, momentum = normalize(torch.randn(5, 4), dim=1), normalize(torch.randn(3, 4), dim=1)
    ids, momentum_ids = torch.tensor([0, 0, 0, 1, -1]), torch.tensor([0, 2, -1])
    contrast = contrastive_loss(online, ids, momentum, momentum_ids, temperature=0.5)
    assert contrast.shown()["counterparts"].item() == 0.75
    nothing = contrastive_loss(online, torch.full((5,), -1), momentum, momentum_ids, temperature=0.5)
    assert nothing.shown()["counterparts"].item() == 1


def test_momentum_embeddings_get_no_gradient() -> None:
    online, online_ids, momentum, momentum_ids = random_problem(0)
    momentum.requires_grad_()
    online.requires_grad_()
    contrastive_loss(normalize(online, dim=1), online_ids, momentum, momentum_ids, temperature=0.5).loss.backward()
    assert momentum.grad is None and online.grad is not None


def test_only_background_is_a_zero_that_can_be_differentiated() -> None:
    online = torch.randn(5, 4, requires_grad=True)
    ids = torch.full((5,), -1)
    contrast = contrastive_loss(online, ids, torch.randn(3, 4), ids[:3], temperature=0.5)
    contrast.loss.backward()
    assert contrast.loss.item() == 0 and online.grad.abs().sum() == 0


def identical(count: int) -> Contrast:
    """All embeddings the same: `count` online and momentum boxes, one instance each."""
    same = normalize(torch.ones(count, 4), dim=1)
    ids = torch.arange(count)
    return contrastive_loss(same, ids, same, ids, temperature=0.5)


def test_chance_is_the_loss_of_embeddings_without_information() -> None:
    # 6 boxes a view: a query has 5 negatives in each view, so the loss is log(1 + 10).
    contrast = identical(6)
    assert contrast.chance.item() == pytest.approx(np.log(11), rel=1e-6)
    assert contrast.loss.item() == pytest.approx(np.log(11), rel=1e-6)
    assert contrast.positive_similarity.item() == pytest.approx(1) == contrast.negative_similarity.item()


def test_accuracy_counts_pairs_closer_than_every_negative() -> None:
    # Instance 0 finds itself in the other view; instance 1's partner is nearer to instance 0's.
    online = normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), dim=1)
    momentum = normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=1)
    ids = torch.arange(2)
    assert contrastive_loss(online, ids, momentum, ids, temperature=0.5).accuracy.item() == pytest.approx(0.5)


def test_effective_rank_counts_directions() -> None:
    # Four orthogonal directions, used equally: the centred spectrum has 3 equal values and nothing else.
    corners = torch.eye(4).repeat(5, 1)
    assert effective_rank(corners).item() == pytest.approx(3, abs=1e-2)
    assert effective_rank(torch.ones(9, 4)).item() == pytest.approx(1, abs=1e-2)


def test_effective_rank_is_that_of_float32_under_autocast() -> None:
    # On a GPU the 16-bit product would be an error: it has no eigenvalues of those.
    some = normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rank = effective_rank(some)
    assert torch.equal(rank, effective_rank(some))
