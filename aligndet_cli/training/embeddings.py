"""Numbers that show whether embeddings are healthy, and their limits."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below one of these, embeddings no longer tell boxes or images apart, however good the loss looks.
MIN_RANK_SHARE = 0.1  # effective rank as a share of that at the start
MIN_RANK = 4.0
MIN_SPREAD = 0.1
MIN_LINES = 4  # logged steps for a verdict
HEAD_PREFIX = "head"  # of numbers of one of several heads, as in `head2_embedding_rank`


@dataclass(frozen=True)
class Contrast:
    """The contrastive loss and numbers to judge it by. All are scalars; only `loss` carries gradient.

    Attributes:
        loss: mean over instances of the mean over their (online, positive) pairs; 0 without instances.
        chance: value of `loss` for embeddings without information, log(1 + number of negatives).
        positive_similarity: mean cosine of the positive pairs.
        negative_similarity: mean cosine of online boxes and their negatives.
        accuracy: share of the pairs that are more similar than the online box is to any of its negatives.
        counterparts: share of the online boxes whose instance has boxes in the momentum view, too; 1 without
            instances. None if all have by construction.
    """

    loss: Tensor
    chance: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    accuracy: Tensor
    counterparts: Tensor | None = None

    def shown(self) -> dict[str, Tensor]:
        """Return the scalars other than the loss, by their names in the log."""
        numbers = {
            "chance": self.chance,
            "positive_similarity": self.positive_similarity,
            "negative_similarity": self.negative_similarity,
            "contrast_accuracy": self.accuracy,
        }
        return numbers if self.counterparts is None else {**numbers, "counterparts": self.counterparts}


def effective_rank(embeddings: Tensor) -> Tensor:
    """Return the scalar number of directions that embeddings (S, D) really use, 1..D; near 1 if they collapsed.

    Source: Roy & Vetterli 2007, exp of the entropy of the spectrum, here of the centred covariance.
    """
    centred = embeddings.float() - embeddings.float().mean(dim=0)
    # Both products have the same spectrum, except for zeros; take the smaller one.
    with torch.autocast(centred.device.type, enabled=False):  # a GPU has no eigenvalues of 16-bit matrices
        products = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    spectrum = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()  # (min(S, D),)
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())


def embedding_health(embeddings: Tensor) -> dict[str, Tensor]:
    """Return spread (1: even over the sphere, 0: one point; SimSiam fig. 2) and effective rank of (S, D) embeddings."""
    if len(embeddings) < 2:  # no proposals, and a detector that offers no background
        return {"embedding_spread": embeddings.new_zeros(()), "embedding_rank": embeddings.new_zeros(())}
    spread = embeddings.std(dim=0).mean() * embeddings.shape[1] ** 0.5
    return {"embedding_spread": spread, "embedding_rank": effective_rank(embeddings)}
