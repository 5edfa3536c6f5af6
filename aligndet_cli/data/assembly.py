"""Turn the labels of a reader into an `ImageSet`: the policies that all formats share.

Images without boxes are kept as negatives. Boxes are clipped to their image; boxes without area, before or after
clipping, are left out and counted. Non-finite boxes, missing files, and names that leave the image folder are errors.
"""

import dataclasses
import hashlib
import os
import stat
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.boxes import BoxTable, is_area, select_rows
from aligndet_cli.data.dataset import ImageSet, report_equal_names
from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.format import Labels
from aligndet_cli.data.images import read_missing_sizes
from aligndet_cli.data.mask_forms import are_misfits, misfit

# Annotation tools round to the next pixel: a box that reaches less than this beyond the border is not reported.
_CLIP_TOLERANCE_PX = 1.0

_CORRECTIONS = {  # one box, several boxes
    "degenerate-boxes": ("box without area was left out", "boxes without area were left out"),
    "boxes-outside-the-image": (
        "box wholly outside its image was left out",
        "boxes wholly outside their image were left out",
    ),
    "boxes-clipped-to-the-image": (
        "box reached beyond its image and was clipped",
        "boxes reached beyond their image and were clipped",
    ),
}


def assemble(labels: Labels, *, limit: int | None, findings: Findings, with_truths: bool = False) -> ImageSet:
    """Check and correct labels, keep the first `limit` images, and lay everything out in flat arrays.

    Sizes that the labels lack are read from the image files; an image that cannot be read keeps a size of 0.

    Args:
        with_truths: also keep the boxes of a COCO json as they are, see `ImageSet.truths`.

    Raises:
        DataError: (strict findings) no images, an image missing on disk, a file name that leaves the image
            folder, or a box that is not finite.
    """
    report_equal_names(labels.categories, findings)
    is_kept = inside_folder(labels.file_names, labels.source, findings)
    if limit is not None:
        is_kept &= np.cumsum(is_kept) <= limit
    file_sizes = _file_sizes(labels.images_dir, labels.file_names, is_kept)
    is_kept &= _exists(labels, file_sizes, is_kept, findings)
    images = np.flatnonzero(is_kept)
    if not len(images):
        findings.error("no-images", f"{labels.source}: no images in split '{labels.split}'; check the path")
    file_names = [labels.file_names[index] for index in images]
    sizes_hw = labels.sizes_hw[images]
    if labels.categories:  # boxes are clipped to their image, and batches put together by its shape
        sizes_hw = read_missing_sizes(labels.images_dir, file_names, sizes_hw)
    given = labels.table if is_kept.all() else _of_images(labels.table, is_kept)
    given = _without_bad_masks(given, file_names, sizes_hw, findings)
    _report_flags(given, findings)
    table = _valid_boxes(_by_image(given), file_names, sizes_hw, labels, findings)
    counts = np.bincount(table.image_index, minlength=len(images))
    return ImageSet(
        format=labels.format,
        root=labels.root,
        split=labels.split,
        images_dir=labels.images_dir,
        file_names=file_names,
        image_ids=labels.image_ids[images],
        sizes_hw=sizes_hw,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=table.boxes.astype(np.float32),
        class_ids=table.class_ids,
        areas=table.areas.astype(np.float32),
        is_crowd=table.is_crowd | table.is_ignored,
        segmentations=table.segmentations,
        categories=labels.categories,
        fingerprint=_fingerprint(labels.label_digest, file_names, file_sizes[images], limit),
        problems=findings.problem_counts(),
        annotations=labels.annotations,
        truths=given if with_truths and labels.annotations else None,
    )


def inside_folder(file_names: list[str], source: Path, findings: Findings) -> NDArray[np.bool_]:
    """Return True (B,) for file names that lie in the image folder; report the others.

    Args:
        source: label file or folder to name in the message.
    """
    bad = [index for index, name in enumerate(file_names) if _leaves_folder(name)]
    if bad:
        example = file_names[bad[0]]
        findings.error(
            "unsafe-file-names",
            f"{source}: file name {example!r} points outside the image folder; make it relative and without '..'",
            count=len(bad),
            example=example,
        )
    is_kept = np.ones(len(file_names), dtype=np.bool_)
    is_kept[bad] = False
    return is_kept


def _leaves_folder(name: str) -> bool:
    # Windows paths too: the labels may have been written on Windows.
    if not name or "\0" in name or name.startswith(("/", "\\")) or name[1:2] == ":":
        return True
    if not name.isascii() and not _is_encodable(name):
        return True
    return ".." in name and ".." in PurePosixPath(name.replace("\\", "/")).parts


def _is_encodable(name: str) -> bool:
    """Return False for half characters, which no file name can have."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _file_sizes(images_dir: Path, file_names: list[str], is_wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the bytes of each wanted file (B,) int64, -1 where missing or not wanted."""
    sizes = np.full(len(file_names), -1, dtype=np.int64)
    folder = os.fspath(images_dir)
    for index in np.flatnonzero(is_wanted).tolist():
        try:
            # `Path` would double the time, and there may be more than 100,000 files.
            status = os.stat(f"{folder}/{file_names[index]}")  # noqa: PTH116
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[index] = status.st_size
    return sizes


def _exists(
    labels: Labels, file_sizes: NDArray[np.int64], is_wanted: NDArray[np.bool_], findings: Findings
) -> NDArray[np.bool_]:
    is_there = file_sizes >= 0
    missing = np.flatnonzero(is_wanted & ~is_there)
    if len(missing):
        example = str(labels.images_dir / labels.file_names[missing[0]])
        what = "image listed in the labels" if labels.categories else "linked image"
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        findings.error(
            "missing-images",
            f"{example}: {what} is not on disk{others}; complete the download, or name the folder with --images",
            count=len(missing),
            example=example,
        )
    return is_there


def _of_images(table: BoxTable, is_kept: NDArray[np.bool_]) -> BoxTable:
    """Return the boxes of kept images in the same order; `image_index` counts kept images only."""
    selected = select_rows(table, np.flatnonzero(is_kept[table.image_index]))
    selected.image_index = (np.cumsum(is_kept) - 1)[selected.image_index].astype(np.int64)
    return selected


def _by_image(table: BoxTable) -> BoxTable:
    """Return the boxes sorted by image (stable)."""
    return select_rows(table, np.argsort(table.image_index, kind="stable"))


def _without_bad_masks(
    table: BoxTable, file_names: list[str], sizes_hw: NDArray[np.int32], findings: Findings
) -> BoxTable:
    """Return the boxes, without masks that cannot be drawn on their image; report these."""
    masks = table.segmentations
    if masks is None or not len(masks):
        return table
    is_bad = are_misfits(masks.reach, masks.code_hw, sizes_hw[table.image_index])
    if not is_bad.any():
        return table
    row = int(np.argmax(is_bad))
    index = int(table.image_index[row])
    size_hw, code_hw = tuple(sizes_hw[index].tolist()), tuple(masks.code_hw[row].tolist())
    reason = "" if np.isinf(masks.reach[row]) else misfit(float(masks.reach[row]), code_hw, size_hw)
    reason = reason or "neither a run-length code nor polygons of three corners with finite numbers"
    count = int(is_bad.sum())
    what = counted(count, "mask that cannot be drawn is", "masks that cannot be drawn are")
    message = f"{what} left out (the boxes stay), first in {file_names[index]}: {reason}"
    findings.warn("bad-masks", message, count=count, example=file_names[index])
    return dataclasses.replace(table, segmentations=masks.without(is_bad))


def _report_flags(table: BoxTable, findings: Findings) -> None:
    """Report flags and areas that change what is trained on or measured."""
    count = int((~is_area(table.areas) & ~np.isnan(table.areas)).sum())
    if count:
        areas = counted(count, "'area' is", "'area's are")
        findings.warn("odd-areas", f"{areas} below 0 or above 1e10: taken from the box instead", count=count)
    count = int(table.is_ignored.sum())
    if count:
        boxes = counted(count, "box has", "boxes have")
        message = f"{boxes} 'ignore': 1: not trained on, but evaluation counts them, as pycocotools does"
        findings.warn("ignored-boxes", message, count=count)


def _valid_boxes(
    table: BoxTable, file_names: list[str], sizes_hw: NDArray[np.int32], labels: Labels, findings: Findings
) -> BoxTable:
    """Return the boxes that have an area inside their image, clipped to it; report all corrections."""

    def first(mask: NDArray[np.bool_]) -> str:
        return file_names[int(table.image_index[int(np.argmax(mask))])]

    boxes = table.boxes
    is_finite = np.asarray(np.isfinite(boxes).all(axis=1))
    if not is_finite.all():
        is_bad = np.logical_not(is_finite)
        count, example = int(is_bad.sum()), first(is_bad)
        findings.error(
            "non-finite-boxes",
            f"{labels.source}: box of image {example} is NaN or infinite ({count} in all); repair or remove it",
            count=count,
            example=example,
        )
    if len(boxes) and (np.abs(boxes) <= 1).all():
        count, example = len(boxes), file_names[int(table.image_index[0])]
        message = (
            f"{counted(count, 'box', 'boxes')}, all within one pixel: relative to the image? They must be in pixels"
        )
        findings.warn("relative-boxes", message, count=count, example=example)
    limits = np.where(sizes_hw > 0, sizes_hw, np.inf)[table.image_index]  # an unknown size (0) clips at 0 only
    clipped = np.clip(boxes, 0.0, limits[:, [1, 0, 1, 0]])
    is_degenerate = is_finite & ~_has_area(boxes)
    is_outside = is_finite & ~is_degenerate & ~_has_area(clipped)
    is_kept = is_finite & ~is_degenerate & ~is_outside
    is_clipped = is_kept & (np.abs(boxes - clipped) > _CLIP_TOLERANCE_PX).any(axis=1)
    for (code, words), mask in zip(_CORRECTIONS.items(), (is_degenerate, is_outside, is_clipped), strict=True):
        if mask.any():
            count = int(mask.sum())
            findings.warn(code, f"{counted(count, *words)}, first in {first(mask)}", count=count, example=first(mask))
    table.boxes = clipped
    areas = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    table.areas = np.where(is_area(table.areas), table.areas, areas)
    return table if is_kept.all() else select_rows(table, np.flatnonzero(is_kept))


def _has_area(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    # In float32, as boxes are stored: a box whose side vanishes when rounded must go.
    with np.errstate(over="ignore"):
        stored = boxes.astype(np.float32)
    return (stored[:, 2] > stored[:, 0]) & (stored[:, 3] > stored[:, 1])


def _fingerprint(label_digest: str, file_names: list[str], file_sizes: NDArray[np.int64], limit: int | None) -> str:
    """Return a hash of the label files' bytes and of the images' names and sizes, wherever they lie."""
    digest = hashlib.sha256(f"labels {label_digest} limit {limit}\n".encode())
    for name, size in sorted(zip(file_names, file_sizes.tolist(), strict=True)):
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
