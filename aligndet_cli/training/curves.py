"""Draw the curves in `metrics.jsonl` of one run, or of several on the same axes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from aligndet_cli.plotting import COLOURS, DASHES, REFERENCE, finish_axes, never_failing, new_figure, save_figure, wrap
from aligndet_cli.training.embeddings import HEAD_PREFIX

MAX_POINTS = 400  # per curve; more cannot be told apart on a panel, and longer logs take seconds to draw
_PANEL = (4.8, 3.5)  # inches
_MAX_COLUMNS = 3
_CONTRAST_LOSS = "loss_contrastive"
_Panel = tuple[str, str, tuple[str, ...]]  # title, label, numbers
_PERCENT = "AP in percent"
# Numbers of similar size and meaning share a panel. Losses are not listed: their names begin with `loss_`.
_PANELS: tuple[_Panel, ...] = (
    ("Contrastive loss", "loss", (_CONTRAST_LOSS,)),
    ("Contrast accuracy", "share of pairs", ("contrast_accuracy",)),
    ("Met in the other view", "share of queries", ("counterparts",)),
    ("Similarity of embeddings", "cosine", ("positive_similarity", "negative_similarity")),
    ("Embedding rank", "directions used", ("embedding_rank",)),
    ("Embedding spread", "1 = even over the sphere", ("embedding_spread",)),
    ("Accuracy", "share", ("accuracy",)),
    ("On the validation split", _PERCENT, ("AP", "AP50", "AP75")),
)
_ACCURACIES = ("contrast_accuracy", "accuracy")
_CHANCE, _ACCURACY_BY_CHANCE = "chance", "accuracy_by_chance"
_CHANCE_OF_FIRST = f"{HEAD_PREFIX}1_{_CHANCE}"
Log = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def plot_curves(metrics: Path, folder: Path, limits: Mapping[str, tuple[float, str]] | None = None) -> None:
    """Write `folder/curves.png`: every number of a run over its steps, with its chance level if it has one.

    Args:
        limits: by number, a level to draw and its label.
    """
    file = folder / "curves.png"
    with never_failing(file):
        save_figure(draw_runs({"": read_log(metrics)}, limits=limits or {}), file)


def plot_comparison(runs: Mapping[str, Path], file: Path, title: str = "", *, colours: Sequence[str] = COLOURS) -> None:
    """Write a picture of the losses of several runs, and of their AP if it was measured, on the same axes.

    Args:
        runs: `metrics.jsonl` by the name of the run.
        colours: of the runs.

    Source: figure 7 of the paper, which draws the fine-tuning losses with and without pre-training.
    """
    with never_failing(file):
        logs = {name: read_log(metrics) for name, metrics in runs.items()}
        save_figure(draw_runs(logs, limits={}, title=title, colours=colours), file)


def read_log(metrics: Path) -> Log:
    """Return steps (N,) and values (N,) of each number in a `metrics.jsonl`; incomplete lines are left out."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for text in metrics.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        for key, value in line.items():
            steps, values = columns.setdefault(key, ([], []))
            steps.append(line["step"])
            values.append(value)
    log = {key: (np.array(steps), np.array(values, dtype=np.float64)) for key, (steps, values) in columns.items()}
    if _CHANCE in log:  # log(n): guessing picks the right one of n classes, or pairs, once in n times
        logged_at, chance = log.get(_CHANCE_OF_FIRST, log[_CHANCE])  # of several heads it is a weighted sum
        log[_ACCURACY_BY_CHANCE] = (logged_at, np.exp(-chance))
    return log


def draw_runs(
    runs: Mapping[str, Log],
    *,
    limits: Mapping[str, tuple[float, str]],
    title: str = "",
    colours: Sequence[str] = COLOURS,
    panel: tuple[float, float] = _PANEL,
) -> Figure:
    """Draw one panel per kind of number that was measured. Colours tell several runs apart, or a panel's numbers.

    Args:
        limits: by number, a level to draw and its label.
        panel: width and height of a panel in inches.
    """
    last = max((steps[-1] for log in runs.values() for steps, _ in log.values()), default=1.0)
    panels = _panels_of({key for log in runs.values() for key in log}, split=len(runs) > 1)
    num_columns = min(len(panels), _MAX_COLUMNS) or 1
    num_rows = -(-len(panels) // num_columns) or 1
    figure = new_figure(panel[0] * num_columns, panel[1] * num_rows + (0.3 if title else 0))
    for place, (heading, label, keys) in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        for run_place, (name, log) in enumerate(runs.items()):
            for key_place, key in enumerate(key for key in keys if key in log):
                colour = colours[(key_place if len(runs) == 1 else run_place) % len(colours)]
                shown = wrap(name, 30) or _name_of(key)
                dash = DASHES[run_place % 2]
                steps, values = log[key]
                unit = 100 if label == _PERCENT else 1
                _draw_curve(axes, steps, unit * values, color=colour, linestyle=dash, label=shown)
            if len(runs) == 1 and (chance := _chance_of(keys, log)) is not None:
                _draw_curve(axes, *log[chance], color=REFERENCE, linestyle="--", label="by chance")
        for key in keys:
            if key in limits:
                axes.axhline(limits[key][0], color=REFERENCE, linestyle=":", label=limits[key][1])
        _scale(axes, keys, last)
        finish_axes(axes, title=heading, x="step", y=label)
    if title:
        figure.suptitle(wrap(title, 30 * num_columns))
    return figure


def _panels_of(keys: set[str], *, split: bool) -> list[_Panel]:
    """Return title, label and numbers of each panel. With `split`, every number has a panel of its own."""
    losses = sorted(key for key in keys if key.startswith("loss_") and key != _CONTRAST_LOSS)
    found = [(title, label, tuple(key for key in known if key in keys)) for title, label, known in _PANELS]
    kept = [panel for panel in found if panel[2]]
    if not split:
        if losses:  # behind the contrastive loss
            kept.insert(1 if _CONTRAST_LOSS in keys else 0, ("Losses", "loss", tuple(losses)))
        return kept
    singles: list[_Panel] = [(_name_of(key), "loss", (key,)) for key in losses]
    for title, label, known in kept:
        singles += [(key if label == _PERCENT else title, label, (key,)) for key in known]
    return singles


def _chance_of(keys: Sequence[str], log: Log) -> str | None:
    """Return the number that holds the chance level of a panel, if the run has one.

    The level is that of the contrastive loss, or of the only loss where a backbone learns classes
    or predicts features.
    """
    if _CHANCE not in log:
        return None
    if set(keys) & set(_ACCURACIES):
        return _ACCURACY_BY_CHANCE
    leading = (_CONTRAST_LOSS,) if _CONTRAST_LOSS in log else ("loss_cls", "loss_similarity")
    return _CHANCE if set(leading) & set(keys) else None


def _draw_curve(axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], **style: Any) -> None:
    """Draw a line; of more points than can be seen, draw the means of blocks in a band from minimum to maximum."""
    size = -(-len(values) // MAX_POINTS)
    if size > 1:
        starts = np.arange(0, len(values), size)
        lows, highs = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        counts = np.diff([*starts, len(values)])
        steps, values = np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    if len(values) < 12:
        style |= {"marker": "o", "markersize": 3}
    axes.plot(steps, values, linewidth=1.6, **style)


def _scale(axes: Axes, keys: Sequence[str], last: float) -> None:
    axes.set_xlim(0, 1.02 * last)  # the same for all panels, also for AP, which has few points
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    # Start at 0, except for negative numbers and the contrastive loss, which changes little and far above 0.
    if axes.dataLim.y0 >= 0 and axes.dataLim.y1 >= 0 and _CONTRAST_LOSS not in keys:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)


def _name_of(key: str) -> str:
    return key.removeprefix("loss_").replace("_", " ").replace("box reg", "box regression").replace("cls", "class")
