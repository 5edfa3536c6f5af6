"""The box-level contrastive loss in closed form, for a block of boxes at a time, without a loop over instances."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from aligndet_cli.detectors.parts.sampling import places_in_rows
from aligndet_cli.training.embeddings import Contrast

# Memory for similarities, which grow with the square of the batch; a block has as many queries as fit in. Small blocks
# stay in a processor's cache; a GPU needs few and large ones.
BLOCK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


def contrastive_loss(
    online: Tensor, online_ids: Tensor, momentum: Tensor, momentum_ids: Tensor, *, temperature: float
) -> Contrast:
    """Return InfoNCE over instances: boxes assigned to the same proposal in two views attract each other.

    Positives of an online box are all momentum boxes of its instance or, if there are none, the online boxes of its
    instance (itself included). Negatives are all boxes of both views with another id, without gradient.
    The term of a pair is -log(e^s / (e^s + sum_neg e^n)) = softplus(logsumexp(n) - s).

    The gradient is computed with the value, block by block, so no similarities are kept for the backward pass.

    Args:
        online: (S1, D) L2-normalised embeddings of the online view.
        online_ids: (S1,) int64 instance ids, -1 = background.
        momentum: (S2, D) L2-normalised embeddings of the momentum view; treated as constants.
        momentum_ids: (S2,) int64.
        temperature: tau of eq. 4.

    Source: docs/paper.md §4.3, which is eqs. 2 to 4 and Algorithm 1. The value and gradient are those of the authors'
        loop over instances (`contrastive_loss.py`), whose background id collides with instance 256: ours is -1.
    """
    with torch.no_grad():
        paired, orphans = _find_queries(online_ids, momentum_ids, online.dtype)
        keys = torch.cat([momentum, online])  # (S2 + S1, D)
        size = max(1, BLOCK_BYTES[keys.device.type] // max(1, len(keys) * keys.element_size()))
        sums, gradient = online.new_zeros(4), torch.zeros_like(online) if online.requires_grad else None
        for block, num_pairs in chain(paired.blocks(size), orphans.blocks(size)):
            sums += _add_up(block, num_pairs, keys, online, temperature, gradient)
        loss, pair_logits, accuracy, negative_logits = sums.unbind()
        num_queries = len(paired.rows) + len(orphans.rows)
        num_negatives = torch.cat([paired.num_negatives(), orphans.num_negatives()])  # (P,)
        weights = torch.cat([paired.weights, orphans.weights])  # (P,)
    return Contrast(
        loss=loss if gradient is None else _WithGradient.apply(online, loss, gradient),
        chance=(num_negatives.to(keys.dtype).log1p() * weights).sum(),
        positive_similarity=pair_logits * temperature,
        negative_similarity=negative_logits * temperature / num_negatives.sum().clamp(min=1),
        accuracy=accuracy,
        counterparts=loss.new_full((), len(paired.rows) / num_queries if num_queries else 1.0),
    )


class _WithGradient(torch.autograd.Function):
    """Value whose gradient with regard to `inputs` is known already."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None


@dataclass(frozen=True)
class _Members:
    """Boxes of a view that belong to the same instance as each of P queries.

    Attributes:
        by_id: (S,) int64 rows of the view, instance by instance.
        starts, counts: (P,) int64 begin and length of each query's instance in `by_id`.
    """

    by_id: Tensor
    starts: Tensor
    counts: Tensor

    def of(self, queries: Tensor | slice) -> "_Members":
        """Return the members for some of the queries."""
        return _Members(self.by_id, self.starts[queries], self.counts[queries])

    def pairs(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Return all pairs of query and member: (R,) queries and (R,) rows of the view, query by query.

        Args:
            num_pairs: R, the sum of `counts`, for which a GPU would have to be asked.
        """
        query = torch.arange(len(self.counts), device=self.counts.device)
        query = query.repeat_interleave(self.counts, output_size=num_pairs)
        offsets = self.starts - (self.counts.cumsum(0) - self.counts)
        return query, self.by_id[offsets[query] + torch.arange(len(query), device=query.device)]


@dataclass(frozen=True)
class _Queries:
    """P online boxes with an instance; orphans have no box of their instance in the momentum view.

    Attributes:
        rows: (P,) int64 rows of the online view.
        weights: (P,) weight of each in the mean over instances.
        in_momentum, in_online: boxes of their instances.
        are_orphans: True if all are orphans, False if none is.
    """

    rows: Tensor
    weights: Tensor
    in_momentum: _Members
    in_online: _Members
    are_orphans: bool

    def blocks(self, size: int) -> "Iterator[tuple[_Queries, list[int]]]":
        """Yield at most `size` queries at a time, and how many pairs they make with `in_momentum` and `in_online`."""
        if not len(self.rows):
            return
        counts = torch.stack([self.in_momentum.counts, self.in_online.counts])  # (2, P)
        nums_pairs = torch.stack([of_block.sum(dim=1) for of_block in counts.split(size, dim=1)]).tolist()
        for start, num_pairs in zip(range(0, len(self.rows), size), nums_pairs, strict=True):
            part = slice(start, start + size)
            members = self.in_momentum.of(part), self.in_online.of(part)
            yield _Queries(self.rows[part], self.weights[part], *members, self.are_orphans), num_pairs

    def num_negatives(self) -> Tensor:
        """Return (P,) int64 numbers of boxes of both views with another instance or none."""
        num_keys = len(self.in_momentum.by_id) + len(self.in_online.by_id)
        return num_keys - self.in_momentum.counts - self.in_online.counts


def _find_queries(online_ids: Tensor, momentum_ids: Tensor, dtype: torch.dtype) -> tuple[_Queries, _Queries]:
    """Return the queries with a counterpart in the momentum view, and the orphans; ids are (S1,) and (S2,)."""
    in_momentum, in_online = _find_members(momentum_ids, online_ids), _find_members(online_ids, online_ids)
    is_query, is_orphan = online_ids >= 0, in_momentum.counts == 0
    first = in_online.by_id[in_online.starts]  # (S1,) of the same instance
    num_instances = (is_query & (first == torch.arange(len(first), device=first.device))).sum()
    weights = (in_online.counts * num_instances).to(dtype).reciprocal()
    kinds = places_in_rows(torch.stack([is_query & ~is_orphan, is_query & is_orphan]))
    paired, orphans = (
        _Queries(rows, weights[rows], in_momentum.of(rows), in_online.of(rows), are_orphans=bool(kind))
        for kind, rows in enumerate(kinds)
    )
    return paired, orphans


def _find_members(ids: Tensor, wanted: Tensor) -> _Members:
    """Find the rows with each of (P,) wanted ids among (S,) ids."""
    ordered, by_id = ids.sort(stable=True)
    starts = torch.searchsorted(ordered, wanted)
    return _Members(by_id, starts, torch.searchsorted(ordered, wanted, right=True) - starts)


def _add_up(
    queries: _Queries,
    num_pairs: Sequence[int],
    keys: Tensor,
    online: Tensor,
    temperature: float,
    gradient: Tensor | None,
) -> Tensor:
    """Return the (4,) share of c queries in loss, mean positive logit and accuracy, and their sum of negative logits.

    Args:
        num_pairs: see `_Queries.blocks`.
        keys: (S2 + S1, D), momentum view first.
        online: (S1, D).
        gradient: (S1, D) gradient of the loss with regard to `online`; the share of the queries is added.
    """
    num_momentum = len(keys) - len(online)
    own = online[queries.rows] / temperature  # (c, D)
    logits = own @ keys.T  # (c, S2 + S1)
    row, column = queries.in_online.pairs(num_pairs[1])
    same = positives = row, column + num_momentum
    if not queries.are_orphans:
        positives = queries.in_momentum.pairs(num_pairs[0])
        same = torch.cat([positives[0], same[0]]), torch.cat([positives[1], same[1]])
    pair_logits, row = logits[positives], positives[0]  # (R,)
    negative_sum = logits.index_put_(same, logits.new_zeros(())).sum()
    best = logits.index_put_(same, logits.new_full((), torch.finfo(logits.dtype).min)).amax(dim=1)  # (c,)
    shares = logits.sub_(best[:, None]).exp_()  # softmax over the negatives, once divided by `total`
    total = shares.sum(dim=1)
    margin = (best + total.log())[row] - pair_logits
    num_positives = queries.in_online.counts if queries.are_orphans else queries.in_momentum.counts
    weights = (queries.weights / num_positives)[row]
    if gradient is not None:
        pull = margin.sigmoid() * weights / temperature
        push = torch.zeros_like(total).index_put_((row,), pull, accumulate=True)
        shares.mul_((push / total)[:, None]).index_put_(positives, -pull)
        gradient[queries.rows] += shares @ keys
        if queries.are_orphans:  # gradient flows through both sides here: docs/differences.md 25
            shares.zero_().index_put_(positives, -pull)
            gradient += shares[:, num_momentum:].T @ online[queries.rows]
    hits = pair_logits > best[row]
    return torch.stack(
        [(softplus(margin) * weights).sum(), (pair_logits * weights).sum(), (hits * weights).sum(), negative_sum]
    )
