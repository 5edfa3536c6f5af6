"""Pictures as text, embedded in a page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from aligndet_cli.workspace import Workspace

BUDGET = 7_000_000  # characters of all pictures of a page, which must stay below 10 MB
_MAX_WIDTH = 1400  # pixels: two columns of a wide screen
_AS_IT_IS = 120_000  # bytes; smaller files are embedded unchanged
_QUALITY = 80
_WHITE = 0.5  # least share of white pixels of a plot
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_TITLES = {
    "proposals/sheet": "Images with their proposals, coloured by size.",
    "proposals/count": "How many proposals the images have.",
    "proposals/size": "How large the proposals are.",
    "proposals/aspect": "How wide the proposals are for their height.",
    "proposals/recall": "How many labelled objects the proposals cover, by number of proposals and size of the object.",
    "cluster/sheet": "The largest clusters, each with the proposals nearest its centre.",
    "cluster/sizes": "How many proposals each cluster has.",
    "pretrain-box/views": "The two views of the first images, matching proposals in matching colours.",
    "pretrain-box/curves": "Losses, contrast accuracy, similarity and rank of the embeddings over the steps.",
    "pretrain-image/curves": "Losses and accuracies of the backbone's own training over the steps.",
    "finetune/curves": "Losses over the steps, and AP where it was measured on the way.",
    "evaluate/precision_recall": "Precision over recall, mean and most frequent classes.",
    "evaluate/per_class_ap": "AP and AP50 of each class.",
    "evaluate/errors": "Which errors cost how much AP50, over all and for each class.",
    "evaluate/confusion": "Which classes were found as which others, missed, or found where nothing is.",
    "evaluate/detections": "Ground truth beside detections.",
    "evaluate/best_and_worst": "The best and the worst images, ground truth beside detections.",
    "evaluate/compare": "Precision over recall and errors: {this} against {other}.",
    "evaluate/compare-training": "Fine-tuning losses, and AP where it was measured on the way: {this} against {other}.",
    "/views": "The two views of a few images as pretrain-box sees them, matching proposals in matching colours.",
    "figures/figure_4": "Embeddings of labelled objects before and after pre-training (t-SNE).",
    "figures/figure_5": "Centres of predicted boxes with and without pre-training.",
    "figures/figure_7": "Fine-tuning losses, and AP where it was measured on the way, with and without pre-training.",
    "figures/figure_10": "Detections with and without pre-training.",
}


@dataclass(frozen=True)
class Picture:
    """A picture to embed.

    Attributes:
        file: path relative to the workspace.
        title: caption, which also stands in place of a missing picture.
    """

    path: Path
    file: str
    title: str


@dataclass(frozen=True)
class Embedded:
    """An embedded picture: `data:` address, and size in pixels of the image in it.

    Attributes:
        is_plot: True if most of it is white, so that it can be shown light on dark.
    """

    picture: Picture
    address: str
    width: int
    height: int
    is_plot: bool


def find_pictures(
    workspace: Workspace, folder: Path, stage: str, labels: Mapping[str, str] | None = None
) -> list[Picture]:
    """Return the pictures of an artifact, or of another folder of the workspace, sheets first.

    Args:
        labels: starts of evaluations, by name.
    """
    found = [
        file
        for place in (folder, folder / "plots")
        for file in sorted(place.glob("*"), key=_in_order)
        if file.suffix in _KINDS
    ]
    return [
        Picture(file, str(file.relative_to(workspace.root)), _title(stage, file, folder.name, labels or {}))
        for file in found
    ]


def _in_order(file: Path) -> tuple[str, int]:
    """Return a sort key by name that puts `figure_10` after `figure_4`."""
    words = file.stem.rstrip("0123456789")
    return words, int(file.stem[len(words) :] or 0)


def embed_all(groups: Sequence[Sequence[Picture]]) -> tuple[dict[Path, Embedded], list[Picture]]:
    """Embed what fits into the budget: the first pictures of all groups, then the second ones, and so on.

    Args:
        groups: pictures, the most important group first.

    Returns:
        embedded pictures by path, and pictures that do not fit or cannot be read.
    """
    embedded: dict[Path, Embedded] = {}
    left_out: list[Picture] = []
    num_left = BUDGET
    for place in range(max(map(len, groups), default=0)):
        for picture in (group[place] for group in groups if place < len(group)):
            found = _embed(picture)
            if found is None or len(found.address) > num_left:
                left_out.append(picture)
                continue
            embedded[picture.path] = found
            num_left -= len(found.address)
    return embedded, left_out


def _embed(picture: Picture) -> Embedded | None:
    """Return the picture, as a smaller WebP if its file is large; None if it cannot be read."""
    try:
        content = picture.path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            is_plot = image.convert("L").histogram()[-1] > _WHITE * width * height
            kind = _KINDS[picture.path.suffix]
            if len(content) > _AS_IT_IS:
                scale = min(_MAX_WIDTH / width, 1)
                width, height = round(width * scale), max(round(height * scale), 1)
                small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "WEBP", quality=_QUALITY)
                content, kind = min((content, kind), (buffer.getvalue(), "image/webp"), key=lambda pair: len(pair[0]))
    except (OSError, UnidentifiedImageError):
        return None
    return Embedded(picture, f"data:{kind};base64,{base64.b64encode(content).decode()}", width, height, is_plot)


def _title(stage: str, file: Path, run: str, labels: Mapping[str, str]) -> str:
    if stage == "evaluate" and file.stem.startswith("compare-"):
        other = file.stem.removeprefix("compare-")
        is_training = other not in labels and other.endswith("-training")
        other = other.removesuffix("-training") if is_training else other
        this, that = labels.get(run, run), labels.get(other, other)
        names = (this, that) if this != that else (run, other)
        title = _TITLES["evaluate/compare-training" if is_training else "evaluate/compare"]
        return title.format(this=names[0], other=names[1])
    words = file.stem.replace("_", " ").replace("-", " ")
    return _TITLES.get(f"{stage}/{file.stem}", f"{words[:1].upper()}{words[1:]}.")
