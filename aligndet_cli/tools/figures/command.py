"""`aligndet figures`: draw the paper's figures on the effect of pre-training, of the user's own runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from aligndet_cli.artifacts.starts import tell_apart
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_image
from aligndet_cli.data.loaders import evaluation_batches
from aligndet_cli.drawing import corners_of
from aligndet_cli.errors import AlignDetError, ConfigError, did_you_mean
from aligndet_cli.files import read_json
from aligndet_cli.logs import logger
from aligndet_cli.plotting import FORMATS, save_figure
from aligndet_cli.tools.figures import pretrained
from aligndet_cli.tools.figures.panels import (
    LETTER_SIZE,
    PANEL,
    draw_centres,
    draw_embeddings,
    draw_image_rows,
    for_print,
)
from aligndet_cli.tools.figures.pretrained import NUM_CENTRES, Stages
from aligndet_cli.tools.figures.runs import Evaluated, find_runs, open_evaluated
from aligndet_cli.tools.predict.annotate import annotate
from aligndet_cli.training.curves import draw_runs, read_log
from aligndet_cli.workspace import Workspace

NUM_IMAGES = 4
MIN_SCORE = 0.3  # of a detection that is shown, at most
DPI = 200  # of pixels, also of those in PDF and SVG


@dataclass(frozen=True)
class Drawn:
    """Result of drawing figures."""

    run: str
    compared_with: str
    files: tuple[Path, ...]
    not_drawn: tuple[str, ...]  # one line for each figure that is missing, with the reason

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "files": [str(file) for file in self.files], "not_drawn": list(self.not_drawn)}


@dataclass(frozen=True)
class Subject:
    """The runs to draw, and the images that both were evaluated on."""

    ours: Evaluated
    plain: Evaluated
    image_set: ImageSet
    indices: Sequence[int]  # of a few images with labels

    @property
    def colours(self) -> dict[str, str]:
        """Colours of the two runs by their names, the run without pre-training first."""
        return tell_apart([one.start for one in (self.plain, self.ours)])

    @property
    def by_name(self) -> dict[str, Evaluated]:
        """The two runs by their names, the run without pre-training first."""
        return dict(zip(self.colours, (self.plain, self.ours), strict=True))


def write_figures(
    workspace: Workspace,
    run: str | None = None,
    compare: str | None = None,
    folder: Path | None = None,
    *,
    form: str = "png",
) -> Drawn:
    """Draw figures 4, 5 (and 9), 7 and 10 of the paper, as wide as a page and with letters that can be read there.

    Args:
        run, compare: see `find_runs`.
        folder: None: `figures` in the workspace.
        form: `png`, `pdf` or `svg`.

    Raises:
        ConfigError: no runs to draw, no such form, or `folder` is a file.
        DataError: the images cannot be read.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: is not a choice{did_you_mean(form, list(FORMATS))}")
    folder = folder or workspace.root / "figures"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder}: is a file, name a folder")
    ours, plain = find_runs(workspace, run, compare)
    image_set = open_evaluated(ours, workspace)
    subject = Subject(ours, plain, image_set, _spread(image_set))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawings, reasons = _drawings(subject, workspace, device)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in drawings.items():
        try:
            with for_print():
                figure = draw()
        except Exception as error:  # the other figures are still drawn
            reasons.append(f"{name}: {error if isinstance(error, AlignDetError | ValueError) else repr(error)}")
            continue
        files.append(folder / f"{name}.{form}")
        save_figure(figure, files[-1], dpi=DPI)
    for reason in reasons:
        logger.warning(f"not drawn: {reason}")
    return Drawn(ours.run.name, plain.run.name, tuple(files), tuple(reasons))


def _drawings(subject: Subject, workspace: Workspace, device: str) -> tuple[dict[str, Callable[[], Figure]], list[str]]:
    """Return functions that draw the figures, by file, and reasons for figures that cannot be drawn."""
    drawings: dict[str, Callable[[], Figure]] = {
        "figure_5": partial(_tuned_centres, subject),
        "figure_7": partial(_losses, subject),
        "figure_10": partial(_detections, subject),
    }
    try:
        stages = _find_stages(subject, workspace, device)
    except AlignDetError as error:
        return drawings, [f"figure_4: {error}"]
    if pretrained.finds_without_classes(stages.after.online):
        drawings["figure_5"] = partial(_pretrained_centres, subject, stages, device)
    return {"figure_4": partial(_embeddings, subject, stages, device), **drawings}, []


def _find_stages(subject: Subject, workspace: Workspace, device: str) -> Stages:
    wanted = subject.ours.run.manifest["inputs"]["weights"]
    fitting = [found for found in workspace.artifacts("pretrain-box") if found.content_hash == wanted]
    if not fitting:
        raise ConfigError(f"{subject.ours.run.name}: the pretrain-box run it started from is not in the workspace")
    return pretrained.load_stages(fitting[0], workspace, device)


def _embeddings(subject: Subject, stages: Stages, device: str) -> Figure:
    """Draw figure 4."""
    before = "before pre-training" if stages.has_own_backbone else "before pre-training, but for the backbone"
    networks = {before: stages.before, "after pre-training": stages.after}
    by_title = {
        title: pretrained.embed_objects(pretext, stages.config, subject.image_set, device)
        for title, pretext in networks.items()
    }
    return draw_embeddings(by_title, f"Embeddings of labelled objects, {subject.image_set.split}", stages.config.seed)


def _pretrained_centres(subject: Subject, stages: Stages, device: str) -> Figure:
    """Draw figures 5 and 9, without any fine-tuning."""
    resolution = (max(stages.config.views.short_side), stages.config.views.long_side)
    batches = evaluation_batches(
        subject.image_set,
        indices=subject.indices,
        batch_size=1,
        resolution=resolution,
        num_workers=0,
        device=torch.device(device),
    )
    networks = {"before pre-training": stages.before, "after pre-training": stages.after}
    rows = []
    for [index], images, [size_hw] in batches:
        centres = {
            name: pretrained.class_free_centres(pretext.online, images, size_hw) for name, pretext in networks.items()
        }
        rows.append((_pixels(subject.image_set, index), centres))
    return draw_centres(rows, f"Centres of the {NUM_CENTRES} best boxes before any fine-tuning")


def _tuned_centres(subject: Subject) -> Figure:
    """Draw figures 5 and 9 for detectors that cannot tell objects from background before fine-tuning."""
    rows = []
    for index in subject.indices:
        image_id = int(subject.image_set.image_ids[index])
        centres = {}
        for name, one in subject.by_name.items():
            found = [entry for entry in one.predictions if entry["image_id"] == image_id]
            best = sorted(found, key=lambda entry: -entry["score"])[:NUM_CENTRES]
            centres[name] = pretrained.centres_of(torch.from_numpy(corners_of(best)))
        rows.append((_pixels(subject.image_set, index), centres))
    return draw_centres(rows, f"Centres of the {NUM_CENTRES} best boxes after fine-tuning")


def _losses(subject: Subject) -> Figure:
    """Draw figure 7, with AP if `--evaluate-every` measured it."""
    logs = {name: read_log(one.run.folder / "metrics.jsonl") for name, one in subject.by_name.items()}
    title, colours = f"Fine-tuning, {' against '.join(logs)}", list(subject.colours.values())
    return draw_runs(logs, limits={}, title=title, colours=colours, panel=PANEL)


def _detections(subject: Subject) -> Figure:
    """Draw figure 10; of detectors that are less sure, also detections of lower scores, as they are best cut there."""
    best = [one.best_threshold for one in subject.by_name.values()]
    least = min(MIN_SCORE, *best)
    entries = {"ground truth": read_json(subject.ours.evaluation.folder / "ground_truth.json")["annotations"]}
    for name, one in subject.by_name.items():
        entries[name] = [entry for entry in one.predictions if entry["score"] >= least]
    rows = []
    for index in subject.indices:
        image_id, pixels = int(subject.image_set.image_ids[index]), _pixels(subject.image_set, index)
        row = {}
        for name, of_all in entries.items():
            own = [_without_mask(entry) for entry in of_all if entry["image_id"] == image_id]
            row[f"{name}: {len(own)}"] = np.asarray(annotate(pixels, own, subject.image_set.categories, LETTER_SIZE))
        rows.append(row)
    return draw_image_rows(rows, f"Detections of score >= {least:.2g}, {subject.image_set.split}")


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry without its mask, which labels may have in another form than detections."""
    return {key: value for key, value in entry.items() if key != "segmentation"}


def _pixels(image_set: ImageSet, index: int) -> NDArray[np.uint8]:
    return np.asarray(read_image(image_set.record(index).path), dtype=np.uint8)


def _spread(image_set: ImageSet) -> list[int]:
    """Return indices of a few images with labels, evenly spread over all of them."""
    labelled = np.flatnonzero(np.diff(image_set.offsets) > 0)
    places = np.linspace(0, len(labelled) - 1, min(NUM_IMAGES, len(labelled))).round().astype(np.int64)
    return [int(index) for index in labelled[places]]
