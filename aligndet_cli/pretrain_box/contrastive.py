"""The box-level contrastive loss in closed form: one similarity matrix per view, no loop over instances."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Contrast:
    """The loss and what tells whether it is healthy. All scalars; only `loss` carries gradient.

    Attributes:
        loss: mean over instances of the mean over their (online, positive) pairs; 0 without instances.
        chance: value of `loss` for embeddings without information, log(1 + number of negatives).
        positive_similarity: mean cosine of the positive pairs.
        negative_similarity: mean cosine of online boxes and their negatives.
        accuracy: share of the pairs that are more alike than the online box and any of its negatives.
    """

    loss: Tensor
    chance: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    accuracy: Tensor

    def shown(self) -> dict[str, Tensor]:
        """All but the loss, by the names in the log."""
        return {
            "chance": self.chance,
            "positive_similarity": self.positive_similarity,
            "negative_similarity": self.negative_similarity,
            "contrast_accuracy": self.accuracy,
        }


def contrastive_loss(
    online: Tensor, online_ids: Tensor, momentum: Tensor, momentum_ids: Tensor, *, temperature: float
) -> Contrast:
    """InfoNCE over instances: boxes assigned to the same proposal in the two views attract each other.

    Positives of an online box are all momentum boxes of its instance, or, where there is none, the online boxes
    of that instance (itself included). Negatives are all boxes of both views with another id, without gradient.
    The term of a pair is -log(e^s / (e^s + sum_neg e^n)) = softplus(logsumexp(n) - s).

    Args:
        online: (S1, D) L2-normalised embeddings of the online view.
        online_ids: (S1,) int64 instance ids, -1 = background.
        momentum: (S2, D) L2-normalised embeddings of the momentum view; treated as constants.
        momentum_ids: (S2,) int64.
        temperature: tau of eq. 2.

    Source: AlignDet eqs. 2-3 and Algorithm 1; the value and gradient are those of the official per-instance loop
        (`contrastive_loss.py`), whose background id collides with instance 256: ours is -1.
    """
    queries, query_ids = _select(online, online_ids)
    if len(queries) == 0:
        zero = online.sum() * 0.0
        return Contrast(zero, *(zero.detach() for _ in range(4)))
    keys, key_ids = torch.cat([momentum.detach(), online.detach()]), torch.cat([momentum_ids, online_ids])
    is_same = query_ids[:, None] == key_ids[None, :]  # (P, S2 + S1)
    logits = (queries / temperature) @ keys.T  # (P, S2 + S1)
    negatives = logits.masked_fill(is_same, torch.finfo(logits.dtype).min)
    negative_lse = negatives.logsumexp(dim=1)  # (P,)

    pair_logits, pair_rows = _positive_pairs(queries, query_ids, logits, is_same[:, : len(momentum)], temperature)
    weights = _pair_divisors(query_ids, pair_rows).to(logits.dtype).reciprocal()
    loss = (softplus(negative_lse[pair_rows] - pair_logits) * weights).sum()
    with torch.no_grad():
        num_negatives = (~is_same).sum(dim=1)  # (P,)
        per_query = torch.zeros_like(negative_lse).index_add_(0, pair_rows, weights)
        return Contrast(
            loss=loss,
            chance=(torch.log1p(num_negatives.to(logits.dtype)) * per_query).sum(),
            positive_similarity=(pair_logits * weights).sum() * temperature,
            negative_similarity=_mean_negative(logits, is_same, num_negatives) * temperature,
            accuracy=((pair_logits > negatives.amax(dim=1)[pair_rows]) * weights).sum(),
        )


def effective_rank(embeddings: Tensor) -> Tensor:
    """Number of directions that embeddings (S, D) really use, 1..D: exp of the entropy of their spectrum.

    Collapsed embeddings have a rank near 1 however good their loss looks.

    Source: Roy & Vetterli 2007, on the centred covariance.
    """
    centred = embeddings.float() - embeddings.float().mean(dim=0)
    # Both products have the same spectrum, but for zeros: take the smaller.
    with torch.autocast(centred.device.type, enabled=False):  # a GPU has no eigenvalues of 16-bit matrices
        products = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    spectrum = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()  # (min(S, D),)
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())


def embedding_health(embeddings: Tensor) -> dict[str, Tensor]:
    """Spread (1 = even over the sphere, 0 = one point; SimSiam fig. 2) and effective rank of (S, D) embeddings."""
    if len(embeddings) < 2:  # no proposals, and a detector that offers no background
        return {"embedding_spread": embeddings.new_zeros(()), "embedding_rank": embeddings.new_zeros(())}
    spread = embeddings.std(dim=0).mean() * embeddings.shape[1] ** 0.5
    return {"embedding_spread": spread, "embedding_rank": effective_rank(embeddings)}


def _select(online: Tensor, online_ids: Tensor) -> tuple[Tensor, Tensor]:
    rows = (online_ids >= 0).nonzero()[:, 0]
    return online[rows], online_ids[rows]


def _positive_pairs(
    queries: Tensor, query_ids: Tensor, logits: Tensor, is_positive: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits of all positive pairs (R,) and the row of `queries` each belongs to (R,)."""
    rows, columns = is_positive.nonzero(as_tuple=True)
    pair_logits = logits[rows, columns]
    orphans = (~is_positive.any(dim=1)).nonzero()[:, 0]
    if len(orphans) == 0:
        return pair_logits, rows
    # Instances absent from the momentum view: the official code lets gradient flow through both sides here.
    own_logits = queries[orphans] @ queries[orphans].T / temperature
    own_rows, own_columns = (query_ids[orphans, None] == query_ids[None, orphans]).nonzero(as_tuple=True)
    return torch.cat([pair_logits, own_logits[own_rows, own_columns]]), torch.cat([rows, orphans[own_rows]])


def _pair_divisors(query_ids: Tensor, pair_rows: Tensor) -> Tensor:
    """(R,) int64, pairs of the instance times number of instances: the reciprocals average over both."""
    _, instance_of_query = query_ids.unique(return_inverse=True)
    instances = instance_of_query[pair_rows]
    counts = torch.bincount(instances)
    return counts[instances] * len(counts)


def _mean_negative(logits: Tensor, is_same: Tensor, num_negatives: Tensor) -> Tensor:
    return logits.masked_fill(is_same, 0.0).sum() / num_negatives.sum().clamp(min=1)
