"""Check a data set for problems before hours are spent on it."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import joblib
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.config import DataConfig
from aligndet_cli.data.assembly import assemble
from aligndet_cli.data.dataset import ImageSet, class_labels
from aligndet_cli.data.findings import Finding, Findings, counted
from aligndet_cli.data.format import SplitSource
from aligndet_cli.data.images import decode_image, other_size, read_bytes
from aligndet_cli.data.open import locate_data, read_labels
from aligndet_cli.data.splits import Purpose, choose_split
from aligndet_cli.data.stray import describe_stray_labels
from aligndet_cli.data.voc import VocSplit
from aligndet_cli.data.yolo import YoloSplit
from aligndet_cli.errors import DataError

# Seven of bccd's eight doubled boxes (shifted by two pixels) overlap by 0.91 or more, two snowboards or two people side
# by side on COCO by up to 0.89.
_DUPLICATE_IOU = 0.9
_IMBALANCE_RATIO = 100  # COCO itself reaches about 1,300
_FEW_BOXES = 10
_SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class ImageCheck:
    """Result of decoding one image file.

    Attributes:
        size_hw: height and width of the upright image in pixels; None if it cannot be decoded.
        digest: hash of the file's bytes; None if it cannot be read.
        error: reason why it cannot be decoded, else empty.
    """

    size_hw: tuple[int, int] | None
    digest: str | None
    error: str


@dataclass(frozen=True)
class DoctorReport:
    """The outcome of `check_data`: findings, gravest first, and a summary for people and programs."""

    findings: list[Finding]
    summary: dict[str, Any]

    def count(self, severity: str) -> int:
        """Return the number of findings (kinds of problem, not occurrences) of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        counts = {severity: self.count(severity) for severity in _SEVERITIES}
        return {"summary": self.summary, "counts": counts, "findings": [item.to_json() for item in self.findings]}


def check_data(data: DataConfig, *, num_threads: int = -1) -> DoctorReport:
    """Check the labels of a data set and decode all its images; problems are reported, never raised.

    Without `data.split` every split is checked, and images that occur in two splits are reported. Of VOC's lists only
    the default splits of the stages are checked, since trainval contains train and val. The report does not depend on
    the number of decoding threads; -1 means one per core.
    """
    findings = Findings(is_strict=False)
    summary: dict[str, Any] = {"format": None, "root": str(data.root or data.images or ""), "splits": {}}
    checked: list[tuple[ImageSet, list[ImageCheck]]] = []
    splits = _splits(data, findings)
    for split in splits:
        image_set = _read_split(data, split, findings)
        if image_set is None:
            continue
        checks = _check_files(image_set, num_threads)
        checked.append((image_set, checks))
        summary["format"] = image_set.format
        summary["splits"][image_set.split] = _summarise(image_set, checks)
        found = Findings(is_strict=False)
        _report_files(image_set, checks, found)
        _report_labels(image_set, found)
        if lack := image_set.lack_of_boxes():
            is_for_training = len(splits) == 1 or image_set.split.lower().startswith("train")
            (found.error if is_for_training else found.warn)("no-boxes", lack, count=len(image_set))
        _merge(findings, found, image_set.split)
    _report_duplicate_files(checked, findings)
    _report_category_gaps(checked, findings)
    ordered = sorted(findings.items, key=lambda item: _SEVERITIES.index(item.severity))
    return DoctorReport(ordered, summary)


def _splits(data: DataConfig, findings: Findings) -> list[str | None]:
    """Return the splits to check; None stands for the split that is read without a name."""
    if data.split is not None or data.annotations is not None or data.images is not None or data.root is None:
        return [data.split]
    try:
        root, kind, splits = locate_data(data.root, data.format)
    except DataError as error:
        findings.error("unreadable-data", str(error), example=str(data.root))
        return []
    if kind == "folder":
        return [None]
    may_overlap = any(isinstance(split, VocSplit) and split.is_listed for split in splits.values())
    names = _used_splits(root, list(splits)) if may_overlap else list(splits)
    try:
        choose_split(root, list(splits), None, "train")
    except DataError as error:
        findings.warn("no-training-split", f"finetune and proposals need --split: {error}")
    return [name for name in names if not _is_absent(name, splits[name], findings)]


def _is_absent(name: str, split: SplitSource, findings: Findings) -> bool:
    """Return True if nothing is there of a split of a YOLO yaml, and report it: exports name splits that are empty."""
    message = split.describe_absence() if isinstance(split, YoloSplit) else ""
    if message:
        report = {"train": findings.error, "val": findings.warn}.get(name, findings.info)
        report("missing-splits", message, example=name)
    return bool(message)


def _used_splits(root: Path, known: list[str]) -> list[str]:
    chosen = []
    for purpose in get_args(Purpose):
        try:
            chosen.append(choose_split(root, known, None, purpose))
        except DataError:  # for example no validation split, which only `evaluate` needs
            continue
    return list(dict.fromkeys(chosen)) or known


def _read_split(data: DataConfig, split: str | None, findings: Findings) -> ImageSet | None:
    found = Findings(is_strict=False)
    try:
        chosen = data.model_copy(update={"split": split})
        labels = read_labels(chosen, purpose="train", with_masks=True, findings=found)
        image_set = assemble(labels, limit=data.limit, findings=found)
    except DataError as error:
        found.error("unreadable-data", str(error), example=str(data.annotations or data.root or data.images))
        image_set = None
    _merge(findings, found, split)
    return image_set


def _merge(findings: Findings, found: Findings, split: str | None) -> None:
    """Add the findings of one split; findings of one kind (such as one per bad file) become one with their count."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for item in found.items:
        groups[item.code].append(item)
    prefix = f"{split}: " if split else ""
    for items in groups.values():
        first, count = items[0], sum(item.count for item in items)
        more = f" (and {len(items) - 1} more like it)" if len(items) > 1 else ""
        findings.items.append(
            Finding(first.severity, first.code, f"{prefix}{first.message}{more}", count, first.example)
        )


def _check_files(image_set: ImageSet, num_threads: int) -> list[ImageCheck]:
    """Decode every image; threads suffice, since Pillow and hashlib work without the interpreter lock."""
    paths = [image_set.images_dir / name for name in image_set.file_names]
    checks = joblib.Parallel(n_jobs=num_threads, prefer="threads")(joblib.delayed(check_file)(path) for path in paths)
    return list(checks)


def check_file(path: Path) -> ImageCheck:
    """Decode one image file and hash its bytes."""
    try:
        content = read_bytes(path)
    except DataError as error:
        return ImageCheck(None, None, str(error))
    digest = hashlib.sha256(content).hexdigest()
    try:
        height, width = decode_image(content, path).shape[:2]
    except DataError as error:
        return ImageCheck(None, digest, str(error))
    return ImageCheck((height, width), digest, "")


def _report_files(image_set: ImageSet, checks: list[ImageCheck], findings: Findings) -> None:
    broken = [check.error for check in checks if check.error]
    if broken:
        more = f" ({len(broken)} such images)" if len(broken) > 1 else ""
        example = next(name for name, check in zip(image_set.file_names, checks, strict=True) if check.error)
        findings.error("unreadable-images", f"{broken[0]}{more}", count=len(broken), example=example)
    mismatched = [
        (name, (int(said[0]), int(said[1])), check.size_hw)
        for name, said, check in zip(image_set.file_names, image_set.sizes_hw, checks, strict=True)
        if check.size_hw and said[0] and check.size_hw != (int(said[0]), int(said[1]))
    ]
    if mismatched:
        name, said_hw, size_hw = mismatched[0]
        findings.error(
            "size-mismatch",
            f"{image_set.images_dir / name}: {other_size(size_hw, said_hw)} ({counted(len(mismatched), 'such image')})",
            count=len(mismatched),
            example=name,
        )


def _report_labels(image_set: ImageSet, findings: Findings) -> None:
    if not image_set.has_labels:
        message = "no labels: good for proposals and pre-training only"
        if hint := describe_stray_labels(image_set.root):
            findings.warn("no-labels", f"{message}; {hint}", count=len(image_set))
        else:
            findings.info("no-labels", message, count=len(image_set))
        return
    empty = np.flatnonzero(np.diff(image_set.offsets) == 0)
    if len(empty):
        example = image_set.file_names[int(empty[0])]
        message = f"{counted(len(empty), 'image')} without boxes, first {example}; kept as negatives"
        findings.info("images-without-boxes", message, count=len(empty), example=example)
    count = int(image_set.is_crowd.sum()) - image_set.problems.get("ignored boxes", 0)
    if count > 0:
        boxes = counted(count, "crowd or difficult box", "crowd or difficult boxes")
        findings.info("crowds", f"{boxes}: not trained on, ignored in evaluation", count=count)
    _report_classes(image_set, findings)
    _report_duplicate_boxes(image_set, findings)
    without = 0 if image_set.segmentations is None else int(image_set.segmentations.is_missing.sum())
    # No polygon at all means a data set without masks, which is no finding.
    if 0 < without < len(image_set.boxes):
        message = f"no polygon at {without} of {len(image_set.boxes)} boxes; mask training and evaluation skip them"
        findings.info("boxes-without-polygons", message, count=without)


def _report_classes(image_set: ImageSet, findings: Findings) -> None:
    counts = _boxes_per_class(image_set)
    absent = [name for name, count in counts.items() if count == 0]
    rare = [name for name, count in counts.items() if 0 < count < _FEW_BOXES]
    for code, names, what in (("classes-without-boxes", absent, "no boxes"), ("rare-classes", rare, "few boxes")):
        if names:
            message = f"{what} of {len(names)} of {len(counts)} classes: {_listing(names)}"
            findings.info(code, message, count=len(names), example=names[0])
    present = {name: count for name, count in counts.items() if count}
    if len(present) > 1:
        most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        ratio = present[most] / present[least]
        if ratio >= _IMBALANCE_RATIO or present[most] > 0.8 * sum(present.values()):
            message = f"classes are unbalanced: {present[most]} boxes of {most}, {present[least]} of {least}"
            findings.info("class-imbalance", message, count=len(present), example=least)


def _report_duplicate_boxes(image_set: ImageSet, findings: Findings) -> None:
    pairs = []
    for index in range(len(image_set)):
        record = image_set.record(index)
        pairs.append(_duplicate_pairs(record.boxes[~record.is_crowd], record.class_ids[~record.is_crowd]))
    count = sum(pairs)
    if count:
        images = np.flatnonzero(pairs)
        example = image_set.file_names[int(images[0])]
        message = (
            f"{counted(count, 'pair')} of boxes of one class with an IoU above {_DUPLICATE_IOU} "
            f"in {counted(len(images), 'image')}, first {example}; probably labelled twice"
        )
        findings.warn("duplicate-boxes", message, count=count, example=example)


def _duplicate_pairs(boxes: NDArray[np.float32], class_ids: NDArray[np.int64]) -> int:
    """Return how many pairs of boxes (N, 4) xyxy of one image share a class (N,) and nearly coincide.

    Boxes that coincide so have left sides that are close, so that each is compared with few others.
    """
    num_pairs = 0
    for class_id in np.unique(class_ids):
        own = boxes[class_ids == class_id].astype(np.float64)
        own = own[np.argsort(own[:, 0], kind="stable")]
        lefts, areas = own[:, 0], (own[:, 2:] - own[:, :2]).prod(axis=1)
        # An IoU of t leaves (1 - t) of the width for a shift.
        ends = np.searchsorted(lefts, lefts + (1 - _DUPLICATE_IOU) * (own[:, 2] - lefts), side="right")
        for row in np.flatnonzero(ends > np.arange(1, len(own) + 1)).tolist():
            others = own[row + 1 : ends[row]]
            sides = np.minimum(own[row, 2:], others[:, 2:]) - np.maximum(own[row, :2], others[:, :2])
            overlap = np.clip(sides, 0, None).prod(axis=1)
            union = areas[row] + areas[row + 1 : ends[row]] - overlap
            num_pairs += int((overlap > _DUPLICATE_IOU * union).sum())
    return num_pairs


def _report_duplicate_files(checked: Iterable[tuple[ImageSet, list[ImageCheck]]], findings: Findings) -> None:
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)  # digest -> (split, file name)
    for image_set, checks in checked:
        for name, check in zip(image_set.file_names, checks, strict=True):
            if check.digest is not None:
                places[check.digest].append((image_set.split, name))
    leaks = [group for group in places.values() if len({split for split, _ in group}) > 1]
    if leaks:
        first = " and ".join(f"{split}/{name}" for split, name in leaks[0][:2])
        message = f"{counted(len(leaks), 'image')} in more than one split, first {first}; results would be too good"
        findings.error("images-in-two-splits", message, count=len(leaks), example=leaks[0][0][1])
    within = [group for group in places.values() if len(group) > len({split for split, _ in group})]
    if within:
        count = sum(len(group) - 1 for group in within)
        first = " and ".join(name for _, name in within[0][:2])
        message = f"{counted(count, 'exact copy', 'exact copies')} of another image in the split, first {first}"
        findings.warn("duplicate-images", message, count=count, example=within[0][0][1])


def _report_category_gaps(checked: Iterable[tuple[ImageSet, list[ImageCheck]]], findings: Findings) -> None:
    sets = [image_set for image_set, _ in checked if image_set.has_labels]
    if not sets:
        return
    ids = [category.category_id for category in sets[0].categories]
    gaps = ids[-1] - ids[0] + 1 - len(ids)
    if gaps:
        message = f"category ids {ids[0]}..{ids[-1]} have {counted(gaps, 'gap')}; the ids are kept in all predictions"
        findings.info("category-id-gaps", message, count=gaps)
    for other in sets[1:]:
        if other.categories != sets[0].categories:
            message = f"splits {sets[0].split} and {other.split} list different classes; make the lists equal"
            findings.error("different-classes", message, example=other.split)


def _summarise(image_set: ImageSet, checks: list[ImageCheck]) -> dict[str, Any]:
    """Return counts and sizes of one split."""
    sides = image_set.boxes[:, 2:] - image_set.boxes[:, :2]
    sizes_hw = np.array([check.size_hw for check in checks if check.size_hw], dtype=np.float64).reshape(-1, 2)
    return {
        "images": len(image_set),
        "images_without_boxes": int((np.diff(image_set.offsets) == 0).sum()) if image_set.has_labels else None,
        "boxes": len(image_set.boxes),
        "crowd_boxes": int(image_set.is_crowd.sum()),
        "classes": len(image_set.categories),
        "boxes_per_class": _boxes_per_class(image_set),
        "image_height": _spread(sizes_hw[:, 0]),
        "image_width": _spread(sizes_hw[:, 1]),
        "box_side": _spread(np.sqrt(sides.prod(axis=1))),
        "fingerprint": image_set.fingerprint,
    }


def _spread(values: NDArray[Any]) -> dict[str, float] | None:
    """Return the smallest, median and largest of values (N,), None if there are none."""
    if not len(values):
        return None
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}


def _boxes_per_class(image_set: ImageSet) -> dict[str, int]:
    """Return the number of boxes of each class by its label, see `class_labels`."""
    labels = class_labels({category.category_id: category.name for category in image_set.categories})
    counts = np.bincount(image_set.class_ids, minlength=len(image_set.categories)).tolist()
    return {labels[category.category_id]: count for category, count in zip(image_set.categories, counts, strict=True)}


def _listing(names: list[str], limit: int = 6) -> str:
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
