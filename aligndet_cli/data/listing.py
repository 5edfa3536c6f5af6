"""Files below a folder: images, and what is left out of them, which is counted and said."""

import heapq
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.images import IMAGE_SUFFIXES, is_image_file, is_unreadable_kind


def is_file(path: Path) -> bool:
    """Return True if a path that labels name is a file; False for names that no file can have.

    `Path.is_file` raises for names that are too long, up to Python 3.13.
    """
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Return True if a path that labels name is a folder, see `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def is_there(path: Path) -> bool:
    """Return True if a path that labels name leads to anything, see `is_file`."""
    return os.path.exists(path)  # noqa: PTH110


def list_images(folder: Path, findings: Findings | None = None) -> list[str]:
    """Return the relative names (with `/`) of all image files below a folder, sorted, without hidden ones.

    Linked folders are followed, see `_walk`. Images of other kinds, and links and folders that cannot be followed, are
    reported as warnings.
    """
    images: list[str] = []
    unreadable: list[str] = []
    unreachable: list[str] = []
    for content in _walk(folder):
        images += [content.prefix + name for name in content.files if is_image_file(name)]
        unreadable += [content.prefix + name for name in without_readable_twins(content.files)]
        unreachable += [content.prefix + name for name in content.unreachable]
    if findings is not None:
        report_unreadable_kinds([folder / name for name in unreadable], findings)
        _report_unreachable([folder / name for name in unreachable], findings)
    return sorted(images)


def has_images(folder: Path) -> bool:
    """Return True if any image file lies below a folder; stop at the first."""
    return any(is_image_file(name) for content in _walk(folder) for name in content.files)


def has_images_itself(folder: Path) -> bool:
    """Return True if any image file lies in a folder itself, not below it."""
    return any(is_image_file(child.name) for child in folder.iterdir())


def has_image_of(file: Path) -> bool:
    """Return True if an image lies where a file is, with the suffix of an image in place of the file's own."""
    return any(file.with_suffix(form).is_file() for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper()))


def subfolders(folder: Path) -> list[Path]:
    """Return the direct subfolders, sorted, without hidden ones; nothing if there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # knows folders without asking the disk about each of many files
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    return [folder / name for name in names if name != "__MACOSX"]  # lies beside the data in archives


def nothing_found(folder: Path, *, expected: str) -> str:
    """Return one line about a folder without images: what was left out, else what is expected there."""
    findings = Findings(is_strict=False)
    list_images(folder, findings)
    reason = "; ".join(item.message for item in findings.items) or f"expected {expected}"
    return f"{folder}: no images found in it; {reason}"


def distinct_subfolders(folder: Path) -> list[Path]:
    """Return the direct subfolders in which `list_images` looks by different names, without hidden ones.

    A link is left out if it leads to a folder above it, or into a subfolder that is there already.
    """
    above = {folder.resolve(), *folder.resolve().parents}
    found: set[Path] = set()
    children = [child for child in folder.glob("[!.]*") if child.is_dir()]
    for child in sorted(children, key=lambda child: (child.is_symlink(), child.name)):
        real = child.resolve()
        if real not in above and found.isdisjoint((real, *real.parents)):
            found.add(real)
    return sorted(found)


def without_readable_twins(names: Iterable[str]) -> list[str]:
    """Return the names (or paths) of images of unreadable kinds, unless a readable image has the same name.

    Cameras write a .jpg beside a .cr2, and ultralytics a .npy beside a .jpg.
    """
    names = list(names)
    unreadable = [name for name in names if is_unreadable_kind(name)]
    if not unreadable:
        return []
    images = {os.path.splitext(name)[0] for name in names if is_image_file(name)}  # noqa: PTH122  # of many names
    return [name for name in unreadable if os.path.splitext(name)[0] not in images]  # noqa: PTH122


def report_unreadable_kinds(files: Iterable[Path], findings: Findings) -> None:
    """Report files that hold images of unreadable kinds, counted by kind."""
    files = sorted(files)
    if files:
        kinds = Counter(file.suffix.lower() for file in files)
        listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
        message = f"{counted(len(files), 'file is', 'files are')} left out: {listed}, first {files[0]}"
        findings.warn("unreadable-kinds", f"{message}; convert them to JPEG", count=len(files), example=str(files[0]))


def _report_unreachable(paths: Iterable[Path], findings: Findings) -> None:
    paths = sorted(paths)
    if paths:
        what = counted(len(paths), "link or folder leads nowhere", "links or folders lead nowhere")
        message = f"{what} or may not be opened, first {paths[0]}; repair or remove them"
        findings.warn("unreachable-folders", message, count=len(paths), example=str(paths[0]))


class _Content(NamedTuple):
    """Content of one folder.

    Attributes:
        prefix: name relative to the folder that is walked through, with a `/` behind it; "" for that folder itself.
        files: names of files, and of links to no file that are named like an image.
        unreachable: names of folders that may not be opened, and of other links that lead nowhere.
    """

    prefix: str
    files: list[str]
    unreachable: list[str]


def _walk(folder: Path) -> Iterator[_Content]:
    """Yield the content of a folder and of all folders below it, without hidden ones.

    Linked folders are followed after all others, so that an image has the name without a link if it has one; the
    least deep link wins, then the first by name. No folder is entered twice, and no link to a folder above it.
    """
    base = os.path.realpath(folder)
    seen: set[str] = set()
    links = [(0, "", base)]  # depth, prefix and real path, a heap
    while links:
        _, prefix, target = heapq.heappop(links)
        todo = [(prefix, target)]
        while todo:
            prefix, path = todo.pop()
            if path in seen:
                continue
            seen.add(path)
            content = _Content(prefix, [], [])
            for entry in _entries(path, content):
                name = f"{prefix}{entry.name}/"
                if not entry.is_symlink():
                    todo.append((name, entry.path))
                elif not _is_above(real := os.path.realpath(entry.path), path) and not _is_above(real, base):
                    heapq.heappush(links, (name.count("/"), name, real))
            yield content


def _entries(path: str, content: _Content) -> list["os.DirEntry[str]"]:
    """Return the subfolders and links to folders in a folder, without hidden ones; add all others to the content."""
    folders = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders += [] if entry.name.startswith(".") else [entry]
                elif not entry.is_symlink() or is_image_file(entry.name) or os.path.exists(entry.path):  # noqa: PTH110
                    content.files.append(entry.name)
                elif not entry.name.startswith("."):
                    content.unreachable.append(entry.name)
    except OSError:
        content.unreachable.append("")
    return folders


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_above(folder: str, below: str) -> bool:
    """Return True if a folder is the other one, or holds it at any depth."""
    return below == folder or below.startswith(folder.rstrip(os.sep) + os.sep)
