"""Names of splits: the words that tools write for the same split, and the split that a stage uses."""

import re
from pathlib import Path
from typing import Literal

from aligndet_cli.data.listing import subfolders
from aligndet_cli.errors import DataError, did_you_mean

Purpose = Literal["train", "val"]

_MEANINGS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "trainval": "trainval",
}
_YEAR = re.compile(r"(?:19|20)\d\d$")


def meaning_of(name: str) -> str | None:
    """Return `train`, `val`, `test` or `trainval` for its spellings (`Train`, `valid`), None for any other name."""
    return _MEANINGS.get(name.lower())


def split_meaning(name: str) -> str | None:
    """Return the meaning of a name that may end in a year (`train2017`), None if it has none."""
    return meaning_of(_YEAR.sub("", name))


def split_folders(folder: Path) -> list[Path]:
    """Return the direct subfolders with the name of a split, sorted; nothing if there is no such folder."""
    return [child for child in subfolders(folder) if split_meaning(child.name)]


def as_split_name(text: str) -> str:
    """Return a text as a name of a split, after which artifacts are named; "" if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")


def choose_split(root: Path, known: list[str], asked: str | None, purpose: Purpose) -> str:
    """Return the split of the asked name, or the usual one for a purpose.

    `train` also finds `train2017`, and other spellings such as `Train`. VOC trains on trainval and validates on test.
    Without a test split it trains on train and validates on val, never on images it has trained on.

    Raises:
        DataError: there is no such split; the known ones are listed.
    """
    if asked is not None:
        found = find_split(known, asked)
        if found is None:
            raise DataError(f"{root}: no split '{asked}'{did_you_mean(asked, known)}")
        return found
    known = sorted(known, key=lambda name: (name != meaning_of(name), name))  # `val` goes before `valid`
    by_meaning = {meaning_of(name) or "": name for name in reversed(known)}
    if purpose == "train":
        takes_all = "test" in by_meaning or "val" not in by_meaning
        usual = [by_meaning.get("trainval", "") if takes_all else "", "train2017", by_meaning.get("train", "")]
        prefix, last = "train", ""
    else:
        usual = [by_meaning.get("test", "") if "trainval" in by_meaning else "", "val2017", by_meaning.get("val", "")]
        prefix, last = "val", by_meaning.get("test", "")
    for name in [*usual, *(name for name in sorted(known) if name.lower().startswith(prefix)), last]:
        if name in known:
            return name
    # A single split with a name of its own (CVAT's `default`, `all`) is trained on.
    if purpose == "train" and len(known) == 1 and not known[0].lower().startswith(("val", "test")):
        return known[0]
    raise DataError(f"{root}: no {prefix} split; known: {', '.join(sorted(known))}; choose one with --split")


def find_split(known: list[str], asked: str) -> str | None:
    """Return the split of a name in any spelling; None if there is none, or several in other spellings."""
    for name in (asked, f"{asked}2017"):
        if name in known:
            return name
    same = [name for name in known if name.lower() == asked.lower()]
    same = same or [name for name in known if meaning_of(name) and meaning_of(name) == meaning_of(asked)]
    return same[0] if len(same) == 1 else None
