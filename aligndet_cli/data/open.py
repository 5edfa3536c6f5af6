"""Find a data set, choose a split and read it: the one way into `data/`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from aligndet_cli.config import DataConfig, did_you_mean
from aligndet_cli.data.assembly import assemble
from aligndet_cli.data.coco import COCO, CocoSplit, image_dirs
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.folder import FolderSplit, choose_folder, find_subfolder
from aligndet_cli.data.format import ALL, Labels, SplitSource
from aligndet_cli.data.listing import has_images, nothing_found
from aligndet_cli.data.voc import VOC
from aligndet_cli.data.yolo import YOLO
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger

Purpose = Literal["train", "val"]

FORMATS = (COCO, VOC, YOLO)  # the first that recognises a folder wins; images without labels are the format `folder`
_LAYOUTS = f"{', '.join(known.layout for known in FORMATS)}, or images"
_MAX_NESTED = 10  # a folder with more subfolders is not an unpacked archive, but holds images sorted by class


class FoundData(NamedTuple):
    """A data set on disk: its folder (or YOLO yaml), the name of its format, and its splits by name."""

    root: Path
    format: str
    splits: Mapping[str, SplitSource]


def open_images(
    data: DataConfig,
    *,
    purpose: Purpose,
    with_masks: bool = False,
    with_truths: bool = False,
    index_dir: Path | None = None,
) -> ImageSet:
    """Read one split of a data set: labels checked, images listed but not opened.

    Args:
        data: `root`, or `annotations` and/or `images`, must be set.
        purpose: picks the split when `data.split` is None.
        with_truths: also keep the boxes as evaluation needs them, see `ImageSet.truths`.
        index_dir: folder in which large label files are kept parsed, see `data/index.py`.

    Raises:
        DataError: something is missing or wrong; one line naming the file and what to do.
    """
    findings = Findings(is_strict=True)
    labels = read_labels(data, purpose=purpose, with_masks=with_masks, findings=findings, index_dir=index_dir)
    image_set = assemble(labels, limit=data.limit, findings=findings, with_truths=with_truths)
    for item in findings.items:
        if item.severity == "warning":
            logger.warning(f"{labels.source}: {item.message}; `aligndet doctor` tells more")
    return image_set


def read_labels(
    data: DataConfig, *, purpose: Purpose, with_masks: bool, findings: Findings, index_dir: Path | None = None
) -> Labels:
    """Read one split as `open_images` does, without the checks that all formats share.

    Raises:
        DataError: the split cannot be read at all; with strict findings, any error.
    """
    return _choose_source(data, purpose).read(findings, with_masks=with_masks, index_dir=index_dir)


def locate_data(root: Path, kind: str = "auto") -> FoundData:
    """Return the data set in a folder: in the folder itself, or in its only subfolder with labels.

    Archives often unpack into one folder more. A folder of images without labels is a data set too if `kind` allows.

    Args:
        root: a folder, or the yaml of a YOLO data set.
        kind: `auto`, `folder`, or the name of one of `FORMATS`.

    Raises:
        DataError: nothing there, nothing of that kind in it, or several data sets.
    """
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; check the path")
    plain = FoundData(root, "folder", {ALL: choose_folder(root, None)})
    if kind == "folder" and root.is_dir():
        return plain
    found = _recognise(root, kind)
    if found:
        return found
    if root.is_file():
        hint = "use --annotations FILE --images DIR" if root.suffix == ".json" else f"give a folder with {_LAYOUTS}"
        raise DataError(f"{root}: is a file, not a data set; {hint}")
    nested = _nested_data(root, kind)
    if len(nested) == 1:
        (only,) = nested.values()
        if isinstance(only, DataError):
            raise only
        return only
    if nested:
        names = ", ".join(nested)
        raise DataError(f"{root}: holds several data sets ({names}); name one of these folders")
    if kind != "auto":
        raise DataError(f"{root}: no {kind} data set; expected {_LAYOUTS}; or leave --format out")
    if not has_images(root):
        raise DataError(nothing_found(root, expected=_LAYOUTS))
    return plain


def _recognise(root: Path, kind: str) -> FoundData | None:
    for known in FORMATS:
        splits = known.find(root) if kind in ("auto", known.name) else {}
        if splits:
            return FoundData(root, known.name, splits)
    return None


def _nested_data(root: Path, kind: str) -> dict[str, FoundData | DataError]:
    """Return the data sets with labels in direct subfolders, or why they are broken; none if it is no archive."""
    nested: dict[str, FoundData | DataError] = {}
    children = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    for child in children if len(children) <= _MAX_NESTED else ():
        try:
            if found := _recognise(child, kind):
                nested[child.name] = found
        except DataError as error:
            nested[child.name] = error
    return nested


def choose_split(root: Path, known: list[str], asked: str | None, purpose: Purpose) -> str:
    """Return the split of the asked name (`train` also finds `train2017`), or the usual one for a purpose.

    VOC trains on trainval and validates on test. Without a test split it trains on train and validates on val,
    never on images it has trained on.

    Raises:
        DataError: there is no such split; the known ones are listed.
    """
    if asked is not None:
        for name in (asked, f"{asked}2017"):
            if name in known:
                return name
        raise DataError(f"{root}: no split '{asked}'{did_you_mean(asked, known)}")
    has_test = "test" in known
    if purpose == "train":
        exact = ["trainval" if has_test or "val" not in known else "", "train2017", "train"]
        prefix, last = "train", []
    else:
        exact = ["test" if "trainval" in known else "", "val2017", "val"]
        prefix, last = "val", ["test"]
    for name in [*exact, *(name for name in sorted(known) if name.startswith(prefix)), *last]:
        if name in known:
            return name
    # A single split with a name of its own (CVAT's `default`, `all`) is trained on.
    if purpose == "train" and len(known) == 1 and not known[0].startswith(("val", "test")):
        return known[0]
    raise DataError(f"{root}: no {prefix} split; known: {', '.join(sorted(known))}; choose one with --split")


def _choose_source(data: DataConfig, purpose: Purpose) -> SplitSource:
    if data.annotations is not None:
        return _named_coco(data, data.annotations)
    if data.images is not None:
        return FolderSplit(data.root or data.images, data.split or ALL, data.images)
    if data.root is None:
        raise DataError("no data set given: name its folder, or use --annotations FILE --images DIR")
    root, kind, splits = locate_data(data.root, data.format)
    if kind == "folder":
        return choose_folder(root, data.split)
    names = {data.split, f"{data.split}2017"}
    if data.split is not None and kind == "coco" and data.format == "auto" and not names & splits.keys():
        # A folder of images beside the splits, such as `unlabeled2017`, is a split without labels.
        folder = find_subfolder(root, data.split)
        if folder is not None and has_images(folder.images_dir):
            return folder
    return splits[choose_split(root, list(splits), data.split, purpose)]


def _named_coco(data: DataConfig, annotations: Path) -> CocoSplit:
    """Return the split whose label file the user named outright, perhaps with its image folder."""
    stem = annotations.stem.removeprefix("instances_")
    # Artifacts are named after the split: keep to what `--name` allows.
    name = data.split or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or ALL
    if data.images is None:
        folders = (*image_dirs(data.root or annotations.parent.parent, stem), annotations.parent)
    elif data.images.is_dir():
        folders = (data.images,)
    else:
        raise DataError(f"{data.images}: no such image folder; check --images")
    return CocoSplit(data.root or folders[0], name, annotations, folders)
