"""One-word verdict on a pre-trained backbone, from its log and its probes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aligndet_cli.data.findings import counted
from aligndet_cli.training.embeddings import MIN_LINES, MIN_RANK, MIN_RANK_SHARE, MIN_SPREAD

# Least share of the way from the loss by chance to the best possible loss.
MIN_LEARNED = 0.02
_COSINE_CHANCE = 0.0  # of methods that do not log `chance`

Scores = Mapping[str, float]


def judge(metrics: Path, before: Scores | None, after: Scores | None, *, best: float) -> dict[str, Any]:
    """Judge a run by the last fifth and the first line of its `metrics.jsonl`, and by its probes if there are any.

    Args:
        before, after: `knn` and `linear` accuracy of the backbone at the start and at the end.
        best: loss of perfect predictions, for methods that do not log `chance`; of the others it is 0.

    Returns:
        `verdict` (`healthy`, `collapsed`, `not learning` or `too short`), one sentence of `explanation`, and the means
        of the last fifth.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = lines[-max(len(lines) // 5, 1) :]
    means = {key: sum(line[key] for line in last) / len(last) for key in last[-1] if key not in ("step", "lr")}
    loss_name = next(key for key in means if key.startswith("loss_"))
    verdict, reason = _verdict(lines, means, loss_name, best)
    if verdict != "collapsed" and before and after and after["knn"] <= before["knn"]:
        verdict, reason = "not learning", ": no better than the backbone at the start; train longer"
    explanation = _facts(lines[0], means, loss_name) + _probe_facts(before, after) + reason
    return {"verdict": verdict, "explanation": explanation, **{key: round(value, 4) for key, value in means.items()}}


def _verdict(lines: list[dict[str, float]], means: dict[str, float], loss_name: str, best: float) -> tuple[str, str]:
    rank, spread = means["embedding_rank"], means["embedding_spread"]
    start = lines[0]["embedding_rank"]
    # Embeddings of few images use few directions from the start, and few classes need few.
    least = min(max(MIN_RANK, MIN_RANK_SHARE * start), start / 2)
    if (rank < least and loss_name != "loss_cls") or spread < MIN_SPREAD:
        return "collapsed", ": all images look alike to it; lower --lr"
    if len(lines) < MIN_LINES:
        return "too short", f": only {counted(len(lines), 'logged step')}, too few to judge"
    chance, best = (means["chance"], 0.0) if "chance" in means else (_COSINE_CHANCE, best)
    if (chance - means[loss_name]) / (chance - best) < MIN_LEARNED:
        return "not learning", ": hardly better than chance; train longer, or change --lr"
    return "healthy", ""


def _facts(first: dict[str, float], means: dict[str, float], loss_name: str) -> str:
    chance = means.get("chance", _COSINE_CHANCE)
    return (
        f"{loss_name.removeprefix('loss_')} loss {means[loss_name]:.2f} (by chance {chance:.2f}), embeddings use "
        f"{means['embedding_rank']:.0f} directions (at the start {first['embedding_rank']:.0f})"
    )


def _probe_facts(before: Scores | None, after: Scores | None) -> str:
    if not before or not after:
        return ""
    names = {"knn": "nearest-neighbour", "linear": "linear"}
    parts = [f"{names[key]} accuracy {after[key]:.1%} (at the start {before[key]:.1%})" for key in names]
    return f", {', '.join(parts)}"
