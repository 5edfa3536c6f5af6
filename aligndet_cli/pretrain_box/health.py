"""One-word verdict on a pre-training run, from its log."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aligndet_cli.data.findings import counted
from aligndet_cli.training.embeddings import HEAD_PREFIX, MIN_LINES, MIN_RANK, MIN_RANK_SHARE, MIN_SPREAD

# Least gain of the loss since the start, as a share of the chance level; noise between logged steps is a third of it.
MIN_GAIN = 0.005
MIN_FALL = 0.02  # least fall of the sum of losses that are no contrast, as a share of it at the start
# Least share of boxes whose instance is in the other view too; with fewer, views are hardly compared with each other.
MIN_COUNTERPARTS = 0.9

_WORSE = ("healthy", "few counterparts", "too short", "not learning", "collapsed")  # from good to bad
_SIMILARITIES = ("positive_similarity", "negative_similarity")
_NUMBERS = ("loss_contrastive", "chance", *_SIMILARITIES, "embedding_spread", "embedding_rank")


def judge(metrics: Path) -> dict[str, Any]:
    """Judge a run by the last fifth of its `metrics.jsonl`, against its first logged step.

    Where several heads have a contrast each, every one is judged, and the worst verdict is the run's.

    Returns:
        `verdict` (`healthy`, `collapsed`, `not learning`, `few counterparts`, `too short` or `no contrast`), one
        sentence of `explanation`, and the means of the last fifth; with several heads also `verdicts`, head by head.
    """
    lines, last = _read(metrics, "loss_contrastive")
    if not lines:
        return {"verdict": "no contrast", "explanation": "the contrastive task was off"}
    # `counterparts` is not in the logs of old versions.
    names = [*_NUMBERS, *(["counterparts"] if all("counterparts" in line for line in last) else [])]
    means = _means(last, names)
    heads = [_judge_head(lines, last, names, prefix) for prefix in _prefixes(lines[0])]
    worst = max(range(len(heads)), key=lambda number: _WORSE.index(heads[number][0]))
    verdict, explanation = heads[worst]
    verdicts = {} if len(heads) == 1 else {"verdicts": [of_head for of_head, _ in heads]}
    if verdicts:
        explanation = f"head {worst + 1} of {len(heads)}: {explanation}"
    if "loss_box_reg" in lines[0]:  # no part of the verdict: in an R-CNN it rises as its proposals get better
        [boxes] = _means(last, ["loss_box_reg"]).values()
        explanation += f"; box regression loss {boxes:.2f} (at the start {lines[0]['loss_box_reg']:.2f})"
    rounded = {key: round(value, 4) for key, value in means.items()}
    return {"verdict": verdict, "explanation": explanation, **verdicts, **rounded}


def judge_losses(metrics: Path) -> dict[str, Any]:
    """Judge a run without a contrast by the sum of its losses: the last fifth of the log against its first line.

    Where the run predicts embeddings, these must differ from each other.

    Returns:
        `verdict` (`healthy`, `collapsed`, `not learning` or `too short`), one sentence of `explanation`, and the means
        of the losses.
    """
    lines, last = _read(metrics)
    means = _means(last, [name for name in lines[0] if name.startswith("loss_")])
    before, after = sum(lines[0][name] for name in means), sum(means.values())
    facts = ", ".join(f"{name.removeprefix('loss_')} {means[name]:.2f} ({lines[0][name]:.2f})" for name in means)
    explanation = f"losses (at the start): {facts}"
    variety = sum(line.get("embedding_variety", 1.0) for line in last) / len(last)
    if len(lines) < MIN_LINES:
        verdict, reason = "too short", f"only {counted(len(lines), 'logged step')}, too few to judge"
    elif variety < MIN_SPREAD:
        verdict = "collapsed"
        reason = f"all boxes are told alike, with {variety:.0%} of the variety there is; train longer, or lower --lr"
    elif before - after < MIN_FALL * before:
        verdict, reason = "not learning", "hardly moved; more steps, or a higher --lr"
    else:
        verdict, reason = "healthy", f"their sum fell by {1 - after / before:.0%}"
    rounded = {name: round(value, 4) for name, value in means.items()}
    return {"verdict": verdict, "explanation": f"{explanation}: {reason}", **rounded}


def judge_similarity(metrics: Path, *, best: float) -> dict[str, Any]:
    """Judge a run without negatives by the last fifth of its log, against its first line.

    Args:
        metrics: with `loss_similarity`, `embedding_spread` and `embedding_rank`.
        best: value of the loss for embeddings that agree.

    Returns:
        `verdict` (`healthy`, `collapsed`, `not learning` or `too short`), one sentence of `explanation`, and means.
    """
    lines, last = _read(metrics)
    first, names = lines[0], ("loss_similarity", "embedding_spread", "embedding_rank")
    means = _means(last, names)
    explanation = (
        f"similarity loss {means['loss_similarity']:.2f} (at best {best:.0f}, at the start "
        f"{first['loss_similarity']:.2f}), embeddings use {means['embedding_rank']:.0f} directions (at the start "
        f"{first['embedding_rank']:.0f})"
    )
    verdict, reason = "healthy", ""
    if means["embedding_rank"] < _rank_limit(first) or means["embedding_spread"] < MIN_SPREAD:
        verdict, reason = "collapsed", ": boxes can no longer be told apart; lower --lr, or raise --momentum"
    elif len(lines) < MIN_LINES:
        verdict, reason = "too short", f": only {counted(len(lines), 'logged step')}, too few to judge"
    elif first["loss_similarity"] - means["loss_similarity"] < MIN_FALL * abs(best):
        verdict, reason = "not learning", ": hardly moved; more steps, or a higher --lr"
    rounded = {name: round(value, 4) for name, value in means.items()}
    return {"verdict": verdict, "explanation": explanation + reason, **rounded}


def _read(metrics: Path, needed: str | None = None) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the lines of a log that have a number of this name (None: all), and their last fifth."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if needed is None or needed in line]
    return lines, lines[-max(len(lines) // 5, 1) :]


def _means(lines: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    return {name: sum(line[name] for line in lines) / len(lines) for name in names}


def _prefixes(line: Mapping[str, float]) -> list[str]:
    """Return what the names of each head's numbers begin with; a single head's have nothing before them."""
    of_heads = (f"{HEAD_PREFIX}{number}_" for number in itertools.count(1))
    return list(itertools.takewhile(lambda prefix: f"{prefix}chance" in line, of_heads)) or [""]


def _judge_head(
    lines: Sequence[Mapping[str, float]], last: Sequence[Mapping[str, float]], names: Sequence[str], prefix: str
) -> tuple[str, str]:
    """Return the verdict on one head and its explanation; arguments as in `judge`."""
    first = {name: lines[0][f"{prefix}{name}"] for name in _NUMBERS}
    means = {name: sum(line[f"{prefix}{name}"] for line in last) / len(last) for name in names}
    verdict, explanation = _verdict(first, means, len(lines))
    if means.get("counterparts", 1.0) < MIN_COUNTERPARTS:
        verdict = "few counterparts" if verdict == "healthy" else verdict
        explanation += (
            f"; only {means['counterparts']:.0%} of the boxes meet theirs in the other view: lower --topk, or raise "
            "detector.pretext_samples (R-CNN: detector.pretext_roi_samples; cascades: detector.roi_samples)"
        )
    return verdict, explanation


def rank_level(metrics: Path) -> dict[str, tuple[float, str]]:
    """Return the embedding rank below which a run counts as collapsed, for `plot_curves`; empty without a contrast."""
    with metrics.open() as lines:
        first = json.loads(next(lines, "{}"))
    return {"embedding_rank": (_rank_limit(first), "collapsed below")} if "embedding_rank" in first else {}


def _rank_limit(first: Mapping[str, float]) -> float:
    return max(MIN_RANK, MIN_RANK_SHARE * first["embedding_rank"])


def _verdict(first: Mapping[str, float], means: Mapping[str, float], num_lines: int) -> tuple[str, str]:
    loss, chance = means["loss_contrastive"], means["chance"]
    rank, spread = means["embedding_rank"], means["embedding_spread"]
    facts = (
        f"contrastive loss {loss:.2f} (by chance {chance:.2f}, at the start {first['loss_contrastive']:.2f}), "
        f"embeddings use {rank:.0f} directions (at the start {first['embedding_rank']:.0f})"
    )
    if rank < _rank_limit(first) or spread < MIN_SPREAD:
        return "collapsed", f"{facts}: boxes can no longer be told apart; lower --lr"
    if num_lines < MIN_LINES:
        return "too short", f"{facts}: only {counted(num_lines, 'logged step')}, too few to judge"
    gain = (chance - loss) - (first["chance"] - first["loss_contrastive"])
    if gain < MIN_GAIN * chance:
        return "not learning", f"{facts}: hardly moved; more steps, or a higher --lr"
    return "healthy", facts
