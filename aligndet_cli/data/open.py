"""Find a data set, choose a split and read it: the one way into `data/`."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from aligndet_cli.config import DataConfig
from aligndet_cli.data.assembly import assemble
from aligndet_cli.data.coco import CocoSplit, image_dirs
from aligndet_cli.data.coco_layouts import image_folders
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.folder import FolderSplit, choose_folder, find_subfolder
from aligndet_cli.data.format import ALL, Labels, SplitSource
from aligndet_cli.data.layouts import FORMATS, find_loose_splits
from aligndet_cli.data.listing import has_images, has_images_itself, nothing_found, subfolders
from aligndet_cli.data.splits import Purpose, as_split_name, choose_split, find_split
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger

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


def has_split_for(purpose: Purpose, data: DataConfig) -> bool:
    """Return True if the data has images that are used for a purpose where no split is named."""
    try:
        _choose_source(data.model_copy(update={"split": None}), purpose)
    except DataError:
        return False
    return True


def locate_data(root: Path, kind: str = "auto") -> FoundData:
    """Return the data set in a folder: in the folder itself, or in its only subfolder with labels.

    Archives often unpack into one folder more. Loose formats count where no other is found. A folder of images without
    labels is a data set too if `kind` allows.

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
    if found is None and root.is_file():
        hint = "use --annotations FILE --images DIR" if root.suffix == ".json" else f"give a folder with {_LAYOUTS}"
        raise DataError(f"{root}: is a file, not a data set; {hint}")
    found = found or _recognise_deeper(root, kind)
    if found:
        return found
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


def _recognise_deeper(root: Path, kind: str) -> FoundData | None:
    """Return the data set in the only subfolder with one, or one in a loose format, in the root or its only subfolder.

    Raises:
        DataError: the subfolders have several data sets, or the only one is broken.
    """
    nested = _nested_data(root, kind)
    if len(nested) == 1:
        (only,) = nested.values()
        if isinstance(only, DataError):
            raise only
        return only
    children = subfolders(root)
    is_wrapping = len(children) == 1 and not has_images_itself(root)
    for folder in (root, *children) if is_wrapping else (root,):
        loose = find_loose_splits(folder, kind)
        if len(loose) == 1:
            ((name, splits),) = loose.items()
            return FoundData(folder, name, splits)
    if nested:
        raise DataError(f"{root}: holds several data sets ({', '.join(nested)}); name one of these folders")
    return None


def _nested_data(root: Path, kind: str) -> dict[str, FoundData | DataError]:
    """Return the data sets with labels in direct subfolders, or why they are broken; none if it is no archive."""
    nested: dict[str, FoundData | DataError] = {}
    children = subfolders(root)
    for child in children if len(children) <= _MAX_NESTED else ():
        try:
            if found := _recognise(child, kind):
                nested[child.name] = found
        except DataError as error:
            nested[child.name] = error
    return nested


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
    if data.split is not None and kind == "coco" and data.format == "auto" and not find_split([*splits], data.split):
        # A folder of images beside the splits, such as `unlabeled2017`, is a split without labels.
        folder = find_subfolder(root, data.split)
        if folder is not None and has_images(folder.images_dir):
            return folder
    return splits[choose_split(root, list(splits), data.split, purpose)]


def _named_coco(data: DataConfig, annotations: Path) -> CocoSplit:
    """Return the split whose label file the user named outright, perhaps with its image folder."""
    stem = annotations.stem.removeprefix("instances_")
    name = data.split or as_split_name(stem) or ALL
    if data.images is None:
        root = data.root or annotations.parent.parent
        usual = itertools.chain(*image_folders(root, annotations, stem))
        folders = tuple(dict.fromkeys((*image_dirs(root, stem), annotations.parent, *usual)))
    elif data.images.is_dir():
        folders = (data.images,)
    else:
        raise DataError(f"{data.images}: no such image folder; check --images")
    return CocoSplit(data.root or folders[0], name, annotations, folders)
