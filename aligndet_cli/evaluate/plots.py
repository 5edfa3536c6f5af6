"""Pictures of an evaluation: precision over recall, AP of each class, and detections beside the ground truth.

Drawn without a display and without a date or a version in the files, so that the same numbers give the same bytes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_image
from aligndet_cli.detectors.metrics import CocoEvaluation
from aligndet_cli.training.logs import logger

# Okabe and Ito's colours, told apart with any kind of colour vision; yellow and black are left out as too faint on
# white and on photographs.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":")
MIN_SCORE = 0.3
MAX_BARS = 40
MAX_CLASS_CURVES = len(COLOURS)
NUM_SHEET_IMAGES = 6
MAX_BOXES_NAMED = 25
_DPI = 100


@dataclass(frozen=True)
class Drawing:
    """What the pictures show.

    Attributes:
        evaluation: boxes' numbers, with the curves.
        ground_truth: COCO json dict.
        predictions: COCO results.
        image_set: where the pixels are.
        title: run and split.
    """

    evaluation: CocoEvaluation
    ground_truth: Mapping[str, Any]
    predictions: Sequence[Mapping[str, Any]]
    image_set: ImageSet
    title: str


def draw_plots(folder: Path, drawing: Drawing) -> None:
    """Write `precision_recall.png`, `per_class_ap.png` and `detections.png`; a failure is a warning, never an error.

    The numbers are already safe when this runs: a font that lacks a class's letters must not cost them.
    """
    folder.mkdir(exist_ok=True)
    pictures: dict[str, Callable[[], Figure]] = {
        "precision_recall.png": partial(draw_precision_recall, drawing),
        "per_class_ap.png": partial(draw_per_class, drawing),
        "detections.png": partial(draw_detections, drawing),
    }
    for name, draw in pictures.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # e.g. a glyph missing from the font
                draw().savefig(folder / name, format="png", dpi=_DPI, metadata={"Software": None})
        except Exception as error:
            logger.warning("plots/%s was not drawn: %s: %s", name, type(error).__name__, error)


def draw_precision_recall(drawing: Drawing) -> Figure:
    """Mean curves at IoU 0.5, 0.75 and 0.9 on the left; the most frequent classes at 0.5 on the right."""
    evaluation = drawing.evaluation
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    mean_axes, class_axes = figure.subplots(1, 2)
    has_truth = (evaluation.precision > -1).all(axis=(0, 1))  # (K,)
    for threshold, colour, dash in zip((0.5, 0.75, 0.9), COLOURS, DASHES, strict=False):
        curves = evaluation.precision[_threshold_index(evaluation, threshold)][:, has_truth]  # (R, K')
        if curves.size:
            mean_curve = curves.mean(axis=1)
            label = f"IoU {threshold:g}: AP {mean_curve.mean():.3f}"
            mean_axes.plot(evaluation.recall_thresholds, mean_curve, dash, color=colour, linewidth=2, label=label)
    _finish_curves(mean_axes, f"Mean over {int(has_truth.sum())} classes")
    per_class = evaluation.metrics["per_class"]
    frequent = sorted(np.flatnonzero(has_truth), key=lambda k: -per_class[k]["ground_truths"])[:MAX_CLASS_CURVES]
    for position, index in enumerate(frequent):
        curve = evaluation.precision[_threshold_index(evaluation, 0.5)][:, index]
        label = f"{_short(per_class[index]['name'])}: {curve.mean():.3f}"
        style = DASHES[position % len(DASHES)]
        class_axes.plot(evaluation.recall_thresholds, curve, style, color=COLOURS[position], linewidth=1.8, label=label)
    _finish_curves(class_axes, f"IoU 0.5, {len(frequent)} most frequent of {len(per_class)} classes")
    figure.suptitle(f"Precision over recall - {drawing.title}")
    return figure


def draw_per_class(drawing: Drawing) -> Figure:
    """Bars of AP and AP50, best class first."""
    per_class = [entry for entry in drawing.evaluation.metrics["per_class"] if entry["AP"] is not None]
    ranked = sorted(per_class, key=lambda entry: (-entry["AP"], entry["name"]))
    shown = ranked[:MAX_BARS]
    figure = Figure(figsize=(8, 1.6 + 0.32 * max(len(shown), 2)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, [entry["AP50"] for entry in shown], 0.38, color=COLOURS[5], label="AP50")
    axes.barh(rows + 0.2, [entry["AP"] for entry in shown], 0.38, color=COLOURS[0], label="AP")
    for row, entry in enumerate(shown):
        numbers = f"{entry['AP']:.3f} / {entry['AP50']:.3f}"
        axes.text(max(entry["AP"], entry["AP50"]) + 0.01, row, numbers, va="center", fontsize=8)
    axes.set_yticks(rows, [f"{_short(entry['name'])} ({entry['ground_truths']})" for entry in shown])
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_xlim(0, 1.16)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("AP / AP50; number of ground truths in brackets")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=9)
    left_out = f", best {len(shown)} of {len(ranked)} classes" if len(ranked) > len(shown) else ""
    axes.set_title(f"AP per class - {drawing.title}{left_out}")
    return figure


def draw_detections(drawing: Drawing) -> Figure:
    """A few images, evenly spread over those with ground truth; of each pair, labels left and detections right."""
    category_ids = [category.category_id for category in drawing.image_set.categories]
    names = [category.name for category in drawing.image_set.categories]
    truths = _by_image(drawing.ground_truth["annotations"])
    found = _by_image([entry for entry in drawing.predictions if entry["score"] >= MIN_SCORE])
    chosen = _spread([index for index, image_id in enumerate(drawing.image_set.image_ids) if int(image_id) in truths])
    num_rows = max((len(chosen) + 1) // 2, 1)
    figure = Figure(figsize=(15, 3.1 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, 4, squeeze=False).reshape(-1, 2)  # one pair per image
    for pair in axes.reshape(-1):
        pair.set_axis_off()
    for (left, right), index in zip(axes, chosen, strict=False):
        record = drawing.image_set.record(index)
        pixels = read_image(record.path)
        for panel, entries in ((left, truths), (right, found)):
            owned = entries.get(record.image_id, [])
            panel.imshow(pixels)
            _draw_boxes(panel, owned, category_ids, names)
            what = "ground truth" if panel is left else f"detections, score >= {MIN_SCORE:g}"
            panel.set_title(f"{_short(record.file_name, 26)}: {len(owned)} {what}", fontsize=9)
    figure.suptitle(f"Ground truth beside detections - {drawing.title}")
    return figure


def _draw_boxes(
    axes: Axes, entries: Sequence[Mapping[str, Any]], category_ids: Sequence[int], names: Sequence[str]
) -> None:
    for position, entry in enumerate(sorted(entries, key=lambda entry: -entry.get("score", 1.0))):
        class_id = category_ids.index(entry["category_id"])
        colour = COLOURS[class_id % len(COLOURS)]
        left, top, width, height = entry["bbox"]
        # A dark rim keeps every colour visible on every background.
        rim: list[AbstractPathEffect] = [withStroke(linewidth=3.2, foreground="black", alpha=0.6)]
        style = ":" if entry.get("iscrowd") else "-"
        box = Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=1.6, linestyle=style)
        box.set_path_effects(rim)
        axes.add_patch(box)
        if position >= MAX_BOXES_NAMED:
            continue
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        # Above the box, or inside it where the image ends.
        place = "top" if top < 0.06 * axes.get_ylim()[0] else "bottom"
        label = axes.text(left, top, _short(names[class_id], 14) + score, fontsize=6.5, color="white", va=place)
        label.set_path_effects([withStroke(linewidth=1.8, foreground="black")])
        label.set_clip_on(True)


def _finish_curves(axes: Axes, title: str) -> None:
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(-0.02, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_lines():
        axes.legend(fontsize=8, loc="upper right")


def _threshold_index(evaluation: CocoEvaluation, threshold: float) -> int:
    return int(np.abs(evaluation.iou_thresholds - threshold).argmin())


def _by_image(entries: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped


def _spread(indices: Sequence[int]) -> list[int]:
    """At most `NUM_SHEET_IMAGES` of them, evenly spread from the first to the last."""
    positions: NDArray[np.int64] = np.linspace(0, len(indices) - 1, min(len(indices), NUM_SHEET_IMAGES)).astype(
        np.int64
    )
    return [indices[position] for position in positions]


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
