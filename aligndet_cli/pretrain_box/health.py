"""Whether a pre-training run learned something, in one word, from its log."""

import json
from pathlib import Path
from typing import Any

# A loss this close to chance has not moved; measured at random initialisation it is within 2 %.
LEARNING_MARGIN = 0.98
# Fewer directions than this, or a spread below it, and the embeddings no longer tell boxes apart.
MIN_RANK = 4.0
MIN_SPREAD = 0.1


def judge(metrics: Path) -> dict[str, Any]:
    """Verdict over the last fifth of a run's `metrics.jsonl`: `healthy`, `collapsed`, `not learning` or `no contrast`.

    Returns:
        `verdict`, one sentence of `explanation`, and the means it rests on.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if "loss_contrastive" in line]
    if not lines:
        return {"verdict": "no contrast", "explanation": "the contrastive task was off"}
    last = lines[-max(len(lines) // 5, 1) :]
    keys = ("loss_contrastive", "chance", "positive_similarity", "negative_similarity")
    means = {key: _mean(last, key) for key in (*keys, "embedding_spread", "embedding_rank")}
    verdict, explanation = _verdict(means)
    return {"verdict": verdict, "explanation": explanation, **{key: round(value, 4) for key, value in means.items()}}


def _mean(lines: list[dict[str, float]], key: str) -> float:
    values = [line[key] for line in lines if key in line]
    return sum(values) / max(len(values), 1)


def _verdict(means: dict[str, float]) -> tuple[str, str]:
    loss, chance = means["loss_contrastive"], means["chance"]
    rank, spread = means["embedding_rank"], means["embedding_spread"]
    against = f"contrastive loss {loss:.2f} against {chance:.2f} by chance"
    if rank < MIN_RANK or spread < MIN_SPREAD:
        return "collapsed", f"embeddings use {rank:.1f} directions, spread {spread:.2f}: lower --lr; {against}"
    if loss > LEARNING_MARGIN * chance:
        return "not learning", f"{against}: too few steps yet, or --lr too low"
    return "healthy", f"{against}, embeddings use {rank:.0f} directions"
