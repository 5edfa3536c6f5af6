"""Pictures of an evaluation: precision over recall, AP per class, kinds of errors, confusions, and images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from aligndet_cli.data.dataset import class_labels
from aligndet_cli.drawing import save_picture
from aligndet_cli.evaluate.analysis import PARTS
from aligndet_cli.evaluate.sheets import Drawing, draw_best_and_worst, draw_detections
from aligndet_cli.plotting import (
    COLOURS,
    DASHES,
    SMALL,
    finish_axes,
    never_failing,
    new_figure,
    save_figure,
    shorten,
    wrap,
)
from aligndet_cli.tables import percent

MAX_BARS = 40
_LONGEST_NAME, _LETTERS_PER_INCH = 30, 10  # letters in a line
MAX_CLASS_CURVES = len(COLOURS)
MAX_CONFUSION = 40  # classes; with more the picture cannot be read
MAX_NUMBERED = 16  # most classes for which the cells of the confusion matrix have numbers
CURVES = {"0.5": "IoU 0.5", "0.75": "IoU 0.75", "mean": "IoU 0.5 to 0.95"}
# In the order of `PARTS`; missed objects are grey.
_PART_COLOURS = (COLOURS[0], COLOURS[5], COLOURS[3], COLOURS[4], "#BBBBBB")


def draw_plots(folder: Path, drawing: Drawing) -> None:
    """Write the pictures; a failure is only a warning, since the numbers are saved already."""
    figures = {
        "precision_recall.png": draw_precision_recall,
        "per_class_ap.png": draw_per_class,
        "errors.png": draw_errors,
        "confusion.png": draw_confusion,
    }
    for name, draw in figures.items():
        with never_failing(folder / name):
            save_figure(draw(drawing), folder / name)
    sheets = {"detections.png": draw_detections, "best_and_worst.png": draw_best_and_worst}
    for name, draw_sheet in sheets.items():
        with never_failing(folder / name):
            save_picture(draw_sheet(drawing), folder / name)


def draw_precision_recall(drawing: Drawing) -> Figure:
    """Draw the mean curves on the left, and the most frequent classes at IoU 0.5 on the right."""
    evaluation, curves = drawing.evaluation, drawing.analysis["precision_recall"]
    figure = new_figure(11, 4.6)
    mean_axes, class_axes = figure.subplots(1, 2)
    for (key, name), colour, dash in zip(CURVES.items(), COLOURS, DASHES, strict=False):
        if curves[key]:
            label = f"{name}: AP {percent(float(np.mean(curves[key])))}"
            mean_axes.plot(curves["recall"], curves[key], dash, color=colour, linewidth=2, label=label)
    per_class = evaluation.metrics["per_class"]
    with_truth = [index for index, entry in enumerate(per_class) if entry["AP"] is not None]
    _finish_curves(mean_axes, f"Mean over {len(with_truth)} classes")
    names = _labels(per_class)
    places = {category.category_id: place for place, category in enumerate(drawing.image_set.categories)}
    curves_of: dict[str, Line2D] = {}
    frequent = sorted(with_truth, key=lambda index: -per_class[index]["ground_truths"])[:MAX_CLASS_CURVES]
    for position, index in enumerate(frequent):
        curve = evaluation.precision[0][:, index]  # at IoU 0.5
        label = f"{names[per_class[index]['category_id']]}: AP50 {percent(float(curve.mean()))}"
        if len(places) <= len(COLOURS):  # each class has a colour in pictures
            position = places[per_class[index]["category_id"]]
        x, style = evaluation.recall_thresholds, DASHES[position % len(DASHES)]
        curves_of[label] = class_axes.plot(x, curve, style, color=COLOURS[position], linewidth=1.8)[0]
    which = f"{len(frequent)} most frequent of {len(per_class)}" if len(frequent) < len(per_class) else "all"
    _finish_curves(class_axes, f"IoU 0.5, {which} classes")
    if curves_of:  # not by the labels of the lines, of which Matplotlib leaves out those that begin with "_"
        class_axes.legend(curves_of.values(), curves_of.keys(), fontsize=SMALL)
    _set_title(figure, f"Precision over recall - {drawing.title}")
    return figure


def draw_per_class(drawing: Drawing) -> Figure:
    """Draw bars of AP and AP50, best class first."""
    per_class = drawing.evaluation.metrics["per_class"]
    shown, left_out = _best_classes(per_class, "AP")
    figure = new_figure(8, 1.6 + 0.32 * max(len(shown), 2))
    axes = figure.subplots()
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, [entry["AP50"] for entry in shown], 0.38, color=COLOURS[5], label="AP50")
    axes.barh(rows + 0.2, [entry["AP"] for entry in shown], 0.38, color=COLOURS[0], label="AP")
    for row, entry in enumerate(shown):
        numbers = f"{percent(entry['AP'])} / {percent(entry['AP50'])}"
        axes.text(max(entry["AP"], entry["AP50"]) + 0.01, row, numbers, va="center", fontsize=SMALL)
    labels = _labels(per_class)
    names = [f"{labels[entry['category_id']]} ({entry['ground_truths']})" for entry in shown]
    _finish_bars(axes, names, 1.16)
    _count_in_percent(axes)
    axes.set_xlabel("AP / AP50 in percent; number of ground truths in brackets")
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)
    _set_title(figure, f"AP per class - {drawing.title}{left_out}")
    return figure


def draw_errors(drawing: Drawing) -> Figure:
    """Draw bars of length 1, split into AP50 and its errors, for all classes together and for each."""
    errors = drawing.analysis["errors"]
    shown, left_out = _best_classes(errors["per_class"], "AP50")
    rows = [("all classes", errors)] if shown else []
    labels = _labels(errors["per_class"], taken=("all classes",))
    rows += [(labels[entry["category_id"]], entry) for entry in shown]
    figure = new_figure(9, 1.9 + 0.34 * max(len(rows), 2))
    draw_error_bars(figure.subplots(), rows)
    _set_title(figure, f"What AP50 loses to which errors - {drawing.title}{left_out}")
    return figure


def _count_in_percent(axes: Axes) -> None:
    """Label the ticks of an axis from 0 to 1 as percent."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")


def _labels(per_class: Sequence[Mapping[str, Any]], taken: Sequence[str] = ()) -> dict[int, str]:
    """Return short labels of classes by category id, see `class_labels`."""
    return class_labels({entry["category_id"]: shorten(entry["name"]) for entry in per_class}, taken)


def _best_classes(per_class: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[Mapping[str, Any]], str]:
    """Return the best measured classes, as many as there is room for, and a remark if these are not all."""
    measured = [entry for entry in per_class if entry[metric] is not None]
    ranked = sorted(measured, key=lambda entry: (-entry[metric], entry["name"]))
    return ranked[:MAX_BARS], f", best {MAX_BARS} of {len(ranked)} classes" if len(ranked) > MAX_BARS else ""


def draw_error_bars(axes: Axes, rows: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Draw one stacked bar of `PARTS` per row."""
    for part, colour in zip(PARTS, _PART_COLOURS, strict=True):
        before = [sum(values[other] for other in PARTS[: PARTS.index(part)]) for _, values in rows]
        widths = [values[part] for _, values in rows]
        axes.barh(range(len(rows)), widths, 0.72, left=before, color=colour, edgecolor="white", label=part)
        for row, (start, width) in enumerate(zip(before, widths, strict=True)):
            if width >= 0.045:  # a number would be wider than a narrower bar
                ink = "white" if part == "AP50" else "black"
                place = (start + width / 2, row)
                axes.text(*place, f"{100 * width:.0f}", ha="center", va="center", fontsize=SMALL, color=ink)
    _finish_bars(axes, [name for name, _ in rows], 1.0)
    _count_in_percent(axes)
    axes.set_xlabel("AP at IoU 0.5 in percent, and what it gains when the errors of a kind do not count")
    handles, names = axes.get_legend_handles_labels()
    axes.figure.legend(handles, names, loc="outside lower center", ncols=len(PARTS), fontsize=SMALL)


def draw_confusion(drawing: Drawing) -> Figure:
    """Draw how often objects of a class (rows) were found as each class (columns), in percent of the row."""
    confusion, categories = drawing.analysis["confusion"], drawing.ground_truth["categories"]
    per_class = drawing.evaluation.metrics["per_class"]
    truths = {entry["category_id"]: entry["ground_truths"] for entry in per_class}
    kept = sorted((entry["id"] for entry in categories), key=lambda number: -truths[number])[:MAX_CONFUSION]
    shown = [entry for entry in categories if entry["id"] in kept]
    place = {entry["id"]: position for position, entry in enumerate(shown)}
    counts = np.zeros((len(shown) + 1, len(shown) + 1), dtype=np.int64)  # the last: background, missed
    for entry in confusion["counts"]:
        row, column = (len(shown) if entry[key] is None else place.get(entry[key]) for key in ("truth", "found"))
        if row is not None and column is not None:
            counts[row, column] += entry["count"]
    side = max((0.55 if len(shown) <= MAX_NUMBERED else 0.3) * len(counts), 3.4)  # inches
    figure = new_figure(side + 3.4, side + 2.2)
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, ax=axes, label="% of the row", fraction=0.03)
    labels = _labels(per_class, taken=("missed", "background"))
    names = [labels[entry["id"]] for entry in shown]
    axes.set_xticks(range(len(counts)), [*names, "missed"], rotation=90, fontsize=SMALL)
    axes.set_yticks(range(len(counts)), [*names, "background"], fontsize=SMALL)
    if len(shown) <= MAX_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[row, column] > 55 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set(xlabel="detected as", ylabel="ground truth")
    left_out = f"\n{len(shown)} most frequent of {len(categories)} classes" if len(shown) < len(categories) else ""
    thresholds = f"IoU {confusion['iou_threshold']:g}, score >= {confusion['score_threshold']:.2f}"
    _set_title(figure, f"Confusions - {drawing.title}\n{thresholds} (best F1: {confusion['f1']:.2f}){left_out}")
    return figure


def draw_comparison(analyses: Mapping[str, Mapping[str, Any]], title: str, colours: Sequence[str] = COLOURS) -> Figure:
    """Draw precision over recall and kinds of errors on the same axes, from the `analysis.json` of each run."""
    figure = new_figure(13, 4.6)
    curve_axes, error_axes = figure.subplots(1, 2, width_ratios=(5, 7))
    for (name, analysis), colour in zip(analyses.items(), colours, strict=False):
        curves = analysis["precision_recall"]
        for key, dash in (("0.5", DASHES[0]), ("mean", DASHES[1])):
            if curves[key]:
                label = f"{wrap(name, _LONGEST_NAME)}, {CURVES[key]}: {percent(float(np.mean(curves[key])))}"
                curve_axes.plot(curves["recall"], curves[key], dash, color=colour, linewidth=2, label=label)
    _finish_curves(curve_axes, "Precision over recall, mean over classes")
    rows = [(wrap(name, _LONGEST_NAME), analysis["errors"]) for name, analysis in analyses.items()]
    rows = [(name, errors) for name, errors in rows if errors["AP50"] is not None]
    draw_error_bars(error_axes, rows)
    error_axes.set_title("What AP50 loses to which errors")
    _set_title(figure, title)
    return figure


def _finish_curves(axes: Axes, title: str) -> None:
    """Set labels and limits for precision over recall."""
    finish_axes(axes, title=title, x="recall", y="precision")
    axes.set(xlim=(0, 1.01), ylim=(-0.02, 1.03))


def _set_title(figure: Figure, title: str) -> None:
    """Put a title above all axes, in lines that fit."""
    length = int(_LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle("\n".join(wrap(line, length) for line in title.split("\n")), fontsize=11)


def _finish_bars(axes: Axes, names: Sequence[str], right: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_xlim(0, right)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.spines[["top", "right"]].set_visible(False)
