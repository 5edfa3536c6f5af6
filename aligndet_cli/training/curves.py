"""Curves of a run's `metrics.jsonl` as a picture. A drawing error is a warning: it must not cost anyone a run."""

import json
from collections.abc import Sequence
from pathlib import Path

from aligndet_cli.training.logs import logger

# Okabe-Ito: told apart by everyone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAX_POINTS = 2000


def plot_curves(metrics: Path, folder: Path) -> None:
    """Write `folder/curves.png`: losses (with the chance level, where there is one) and the other numbers."""
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        folder.mkdir(exist_ok=True)
        _draw(lines, folder / "curves.png")
    except Exception as error:
        logger.warning(f"{folder / 'curves.png'}: not drawn: {type(error).__name__}: {error}")


def _draw(lines: Sequence[dict[str, float]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [
        ("loss", [key for key in _keys(lines) if key.startswith("loss_") or key == "chance"]),
        ("cosine similarity", ["positive_similarity", "negative_similarity"]),
        ("embedding rank", ["embedding_rank"]),
        ("accuracy", ["accuracy"]),
        ("AP on the validation split", ["AP", "AP50", "AP75"]),
    ]
    panels = [(title, [key for key in keys if any(key in line for line in lines)]) for title, keys in panels]
    panels = [(title, keys) for title, keys in panels if keys]
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for key, colour in zip(keys, _COLOURS, strict=False):
            points = _thin([(line["step"], line[key]) for line in lines if key in line])
            is_reference = key == "chance"
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color="#666666" if is_reference else colour,
                linestyle="--" if is_reference else "-",
                marker="o" if len(points) < 12 else None,
                markersize=3,
                label="loss by chance" if is_reference else key.removeprefix("loss_").replace("_", " "),
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0 if axes.get_ylim()[0] > 0 else None)  # cosines and their losses go below
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Software": None})


def _keys(lines: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for line in lines for key in line))


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[:: max(len(points) // _MAX_POINTS, 1)]
