"""Draw what a study measured: photographs with the boxes that pre-training learns from, and the gain with error bars.

python examples/gain.py work                                  # the proposals and evaluations of a workspace
python examples/gain.py work --report report.json             # numbers of `aligndet report --json`, measured elsewhere
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from aligndet_cli.artifacts.open import open_proposals
from aligndet_cli.data.images import read_image
from aligndet_cli.drawing import draw_boxes, save_picture
from aligndet_cli.files import read_json
from aligndet_cli.plotting import COLOURS, finish_axes, new_figure, save_figure
from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.workspace import Workspace

NUM_BOXES = 12  # of a photograph; more hide it
SIZE, DPI = (10.0, 3.3), 160  # inches, pixels per inch
ENLARGED = 2  # times, so that boxes have smooth lines


def draw_gain(workspace: Workspace, report: dict[str, Any], metrics: Sequence[str], num_photos: int) -> Figure:
    """Draw photographs at the left, bars of the metrics at the right.

    Args:
        report: content of `aligndet report --json`.
    """
    figure = new_figure(*SIZE)
    *photos, bars = figure.subplots(1, num_photos + 1, width_ratios=[1.0] * num_photos + [1.15])
    for axes, photo in zip(photos, draw_photos(workspace, num_photos), strict=True):
        axes.imshow(photo)
        axes.set_axis_off()
    photos[0].set_title("without labels: boxes to learn from", fontsize=10, loc="left")
    draw_bars(bars, report["rows"], metrics)
    return figure


def draw_photos(workspace: Workspace, count: int) -> list[Image.Image]:
    """Return photographs, evenly spread over those with proposals, with their first proposals."""
    store, images, _ = open_proposals(workspace)
    row_of = {int(image_id): index for index, image_id in enumerate(images.image_ids)}
    with_boxes = np.flatnonzero(store.counts > 0)
    photos = []
    for place in np.linspace(0, len(with_boxes) - 1, count + 2).round().astype(int)[1:-1]:
        index = int(with_boxes[place])
        photo = Image.fromarray(read_image(images.record(row_of[int(store.image_ids[index])]).path))
        photo = photo.resize((photo.width * ENLARGED, photo.height * ENLARGED))
        boxes = store.boxes_of(index)[:NUM_BOXES] * ENLARGED
        draw_boxes(photo, boxes, (NUM_BOXES * COLOURS)[: len(boxes)])
        photos.append(photo)
    return photos


def draw_bars(axes: Axes, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Draw a group of bars for each setting and metric, a bar for each start, and its difference to the baseline.

    A bar's line is one standard deviation over runs to both sides; the difference is followed by its standard error.
    """
    names = names_of([row["setting"] for row in rows])
    settings = list(dict.fromkeys(names))
    groups = [(setting, metric) for setting in settings for metric in metrics]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = 0.8 / len(labels)
    for row, setting in zip(rows, names, strict=True):
        for metric in metrics:
            one = row["summaries"].get(metric)
            if one is None:
                continue
            place = groups.index((setting, metric)) + width * (labels.index(row["label"]) - (len(labels) - 1) / 2)
            height, spread = 100 * one["mean"], 100 * (one["std"] or 0.0)
            name = row["label"] if (setting, metric) == groups[0] else None
            axes.bar(place, height, 0.92 * width, color=row["colour"], label=name)
            if spread:
                axes.errorbar(place, height, spread, color="black", capsize=3, linewidth=1.2)
            if one["delta"] is not None:
                axes.annotate(
                    told(one["delta"]), (place, height + spread), (0, 3), textcoords="offset points", **CENTRED
                )
    ticks = [f"{metric}\n{setting}" if len(settings) > 1 else metric for setting, metric in groups]
    finish_axes(axes, y="percent")
    axes.set_xticks(range(len(groups)), ticks, fontsize=9 if len(settings) == 1 else 7)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper left", frameon=False)
    axes.set_title(f"then {settings[0]}" if len(settings) == 1 else "then with labels", fontsize=10, loc="left")


CENTRED: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9, "fontweight": "bold"}


def names_of(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return how many images had labels, in words, and below it what else differs between the settings."""
    keys = ("detector", "backbone", "schedule", "data", "evaluated")
    apart = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    return ["\n".join([f"{one['num_images']} images labelled", *(str(one[key]) for key in apart)]) for one in settings]


def told(delta: dict[str, Any]) -> str:
    """Return a difference in percent, and its standard error if it has one."""
    error = delta["standard_error"]
    return f"{100 * delta['mean']:+.1f}" + ("" if error is None else f"\n± {100 * error:.1f}")


def main() -> None:
    """Draw the picture of a workspace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--report", type=Path, help="numbers to draw (those of the workspace)")
    parser.add_argument("--metrics", nargs="+", default=["AP", "AP75"])
    parser.add_argument("--photos", type=int, default=2, help="number of photographs (2)")
    parser.add_argument("--output", type=Path, default=Path("gain.jpg"), help="JPEG or PNG to write (gain.jpg)")
    asked = parser.parse_args()
    workspace = Workspace(asked.workspace)
    report = read_json(asked.report) if asked.report else collect_report(workspace, metrics=asked.metrics).to_json()
    if not report["rows"]:
        parser.error("nothing was evaluated: run `aligndet study` first")
    figure = draw_gain(workspace, report, asked.metrics, asked.photos)
    with tempfile.TemporaryDirectory() as folder:
        save_figure(figure, Path(folder) / "gain.png", dpi=DPI)
        with Image.open(Path(folder) / "gain.png") as image:
            save_picture(image.convert("RGB"), asked.output)


if __name__ == "__main__":
    main()
