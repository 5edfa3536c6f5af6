"""Finding out what a data set is, which split is meant, and reading it: the one way into `data/`."""

import re
from pathlib import Path
from typing import Literal

from aligndet_cli.config import DataConfig, did_you_mean
from aligndet_cli.data.assembly import Labels, assemble
from aligndet_cli.data.coco import CocoSplit, find_coco_splits, image_dirs, read_coco
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.folder import has_images, read_folder
from aligndet_cli.data.voc import ALL, find_voc_roots, find_voc_splits, read_voc
from aligndet_cli.data.yolo import find_yolo_file, read_yolo, read_yolo_config
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger

Purpose = Literal["train", "val"]
Format = Literal["coco", "voc", "yolo", "folder"]

_LAYOUTS = "annotations/instances_*.json (COCO), JPEGImages/ + Annotations/ (VOC), data.yaml (YOLO), or images"
_MAX_NESTED = 10  # more subfolders than this are not an archive's, but a folder of images sorted by class


def open_images(
    data: DataConfig, *, purpose: Purpose, with_masks: bool = False, index_dir: Path | None = None
) -> ImageSet:
    """Read one split of a data set: labels checked, images listed but not opened.

    Args:
        data: `root`, or `annotations` and/or `images`, must be set.
        purpose: picks the split when `data.split` is None.
        with_masks: also keep segmentations.
        index_dir: folder in which large label files are kept parsed, see `data/index.py`.

    Raises:
        DataError: something is missing or wrong; one line naming the file and what to do.
    """
    findings = Findings(is_strict=True)
    labels = read_labels(data, purpose=purpose, with_masks=with_masks, findings=findings, index_dir=index_dir)
    image_set = assemble(labels, limit=data.limit, findings=findings)
    for item in findings.items:
        if item.severity == "warning":
            logger.warning(f"{labels.source}: {item.message}; `aligndet doctor` tells more")
    return image_set


def read_labels(
    data: DataConfig, *, purpose: Purpose, with_masks: bool, findings: Findings, index_dir: Path | None = None
) -> Labels:
    """`open_images` before the checks that all formats share.

    Raises:
        DataError: what is needed for reading on is missing; with strict findings, any error.
    """
    if data.annotations is not None or data.images is not None:
        return _read_explicit(data, with_masks, findings, index_dir)
    root, kind = locate_data(_root(data), data.format)
    if kind == "coco":
        splits = find_coco_splits(root)
        if data.format == "auto" and _is_unlabelled_folder(root, data.split, list(splits)):
            return read_folder(root, root / str(data.split), str(data.split))
        split = choose_split(root, list(splits), data.split, purpose)
        return read_coco(splits[split], root, with_masks=with_masks, findings=findings, index_dir=index_dir)
    if kind == "voc":
        return read_voc(root, choose_split(root, find_voc_splits(root), data.split, purpose), findings)
    file = find_yolo_file(root) if kind == "yolo" else None
    if file is not None:
        config = read_yolo_config(file)
        split = choose_split(root, list(config.splits), data.split, purpose)
        return read_yolo(config, root, split, with_masks=with_masks, findings=findings)
    return _read_plain_folder(root, data.split)


def detect_format(root: Path) -> Format:
    """Which of the four layouts a folder (or a YOLO yaml) has; see `locate_data`."""
    return locate_data(root)[1]


def locate_data(root: Path, kind: Literal["auto", "coco", "voc", "yolo", "folder"] = "auto") -> tuple[Path, Format]:
    """The folder in which a data set lies, and its format.

    That is the root itself, or its only subfolder with labels (archives often unpack into one folder more);
    without labels a folder of images is a data set too, if `kind` leaves that open.

    Raises:
        DataError: nothing there, nothing of that kind in it, or several data sets.
    """
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; check the path")
    if root.is_file():
        return _yolo_file(root, kind)
    if kind == "folder":
        return root, "folder"
    found = _labelled_layout(root, kind)
    if found:
        return root, found
    nested = _nested_data(root, kind)
    if len(nested) == 1:
        return nested[0]
    if nested:
        names = ", ".join(child.name for child, _ in nested)
        raise DataError(f"{root}: holds several data sets ({names}); name one of these folders")
    if kind == "auto" and has_images(root):
        return root, "folder"
    if kind == "auto":
        raise DataError(f"{root}: no images found in it; expected {_LAYOUTS}")
    raise DataError(f"{root}: no {kind} data set; expected {_LAYOUTS}; or leave --format out")


def _yolo_file(root: Path, kind: str) -> tuple[Path, Format]:
    if kind in ("auto", "yolo") and find_yolo_file(root):
        return root, "yolo"
    hint = "use --annotations FILE --images DIR" if root.suffix == ".json" else f"give a folder with {_LAYOUTS}"
    raise DataError(f"{root}: is a file, not a data set; {hint}")


def _nested_data(root: Path, kind: str) -> list[tuple[Path, Format]]:
    """Labelled data sets in direct subfolders; none where there are too many of these to be an archive's."""
    children = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(children) > _MAX_NESTED:
        return []
    return [(child, layout) for child in children if (layout := _labelled_layout(child, kind))]


def _labelled_layout(folder: Path, kind: str) -> Format | None:
    if kind in ("auto", "coco") and find_coco_splits(folder):
        return "coco"
    if kind in ("auto", "voc") and find_voc_roots(folder):
        return "voc"
    return "yolo" if kind in ("auto", "yolo") and find_yolo_file(folder) else None


def known_splits(root: Path, kind: Format) -> list[str]:
    """Names of the splits of a data set; a plain folder has only `all`."""
    if kind == "coco":
        return list(find_coco_splits(root))
    if kind == "voc":
        return find_voc_splits(root)
    file = find_yolo_file(root) if kind == "yolo" else None
    return list(read_yolo_config(file).splits) if file else [ALL]


def choose_split(root: Path, known: list[str], asked: str | None, purpose: Purpose) -> str:
    """The split of that name (`train` also finds `train2017`), or the usual one for a purpose.

    VOC trains on trainval and validates on test. Without a test split it trains on train and validates on val,
    never on images it has trained on.

    Raises:
        DataError: there is no such split; the known ones are listed.
    """
    if asked is not None:
        for name in (asked, f"{asked}2017"):
            if name in known:
                return name
        raise DataError(f"{root}: no split '{asked}'{did_you_mean(asked, known) if known else ''}")
    has_test = "test" in known
    if purpose == "train":
        exact = ["trainval" if has_test or "val" not in known else "", "train2017", "train"]
        prefix = "train"
    else:
        exact = ["test" if "trainval" in known else "", "val2017", "val"]
        prefix = "val"
    for name in [*exact, *(name for name in sorted(known) if name.startswith(prefix)), "test" * (purpose == "val")]:
        if name in known:
            return name
    # A single split with a name of its own (CVAT's `default`, `all`) is what there is to train on.
    if purpose == "train" and len(known) == 1 and not known[0].startswith(("val", "test")):
        return known[0]
    if not known:
        raise DataError(f"{root}: no labels found; expected {_LAYOUTS}")
    raise DataError(f"{root}: no {prefix} split; known: {', '.join(sorted(known))}; choose one with --split")


def _root(data: DataConfig) -> Path:
    if data.root is None:
        raise DataError("no data set given: name its folder, or use --annotations FILE --images DIR")
    return data.root


def _read_explicit(data: DataConfig, with_masks: bool, findings: Findings, index_dir: Path | None) -> Labels:
    """Labels and image folder that the user named outright."""
    if data.annotations is None:
        images_dir = Path(str(data.images))
        return read_folder(data.root or images_dir, images_dir, data.split or ALL)
    stem = data.annotations.stem.removeprefix("instances_")
    # Artifacts are named after the split: keep to what `--name` allows.
    name = data.split or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or ALL
    if data.images is not None:
        if not data.images.is_dir():
            raise DataError(f"{data.images}: no such image folder; check --images")
        folders: tuple[Path, ...] = (data.images,)
    else:
        base = data.root or data.annotations.parent.parent
        folders = (*image_dirs(base, stem), data.annotations.parent)
    split = CocoSplit(name, data.annotations, folders)
    return read_coco(split, data.root or folders[0], with_masks=with_masks, findings=findings, index_dir=index_dir)


def _is_unlabelled_folder(root: Path, split: str | None, known: list[str]) -> bool:
    """Whether a split without json of a COCO root is a folder of images, such as `unlabeled2017`."""
    if split is None or split in known or f"{split}2017" in known or not re.fullmatch(r"[\w.-]+", split):
        return False
    return (root / split).is_dir() and has_images(root / split)


def _read_plain_folder(root: Path, split: str | None) -> Labels:
    if split is None or split == ALL:
        return read_folder(root, root, ALL)
    if re.fullmatch(r"[\w-][\w.-]*", split) and (root / split).is_dir():
        return read_folder(root, root / split, split)
    raise DataError(f"{root}: a plain folder has no split '{split}'; leave --split out or name a subfolder")
