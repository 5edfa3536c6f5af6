"""The record of an oddity, and what the three formats' lists share: the pictures and what is to be seen in them."""

import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# What an oddity comes to, as the table of docs/labels.md says it. Except for the error, these are the names of clean
# twins: the oddity must give the same numbers as the data set in which that is written plainly.
AS_MEANT = "read as meant"
STOPS = "one line, exit code 3"

Change = Callable[[Path], None]  # edits a data set on disk


@dataclass(frozen=True)
class Oddity:
    """Something odd in a label file.

    Attributes:
        format: `coco`, `voc` or `yolo`.
        says: what stands in the label file, in Markdown.
        change: writes it into a clean data set, into the labels of both splits.
        twin: name of the clean twin that gives the same numbers, or `STOPS`.
        doctor: severity and code of what doctor finds, `warning degenerate-boxes`; "" if it finds nothing.
        detector: family that is trained; only `mask-rcnn` reads masks.
        topic: heading of its table.
        unread: stages that do not read the odd entry.
    """

    format: str
    says: str
    change: Change
    twin: str = AS_MEANT
    doctor: str = ""
    detector: str = "retinanet"
    topic: str = ""
    unread: tuple[str, ...] = ()

    @property
    def stops(self) -> bool:
        return self.twin == STOPS


def of_topic(topic: str, oddities: Iterable[Oddity], detector: str = "retinanet") -> Iterator[Oddity]:
    """Yield the oddities as those of a topic, to be tried with a detector."""
    return (replace(oddity, topic=topic, detector=detector) for oddity in oddities)


@dataclass(frozen=True)
class Thing:
    """An object in a picture; `box` is xyxy in pixels."""

    name: str
    box: tuple[int, int, int, int]
    is_crowd: bool = False


SIZE_HW = (64, 96)
NAMES = ("cat", "puppy")
# By split and picture. An oddity changes the first thing of the first picture of both splits.
THINGS: dict[str, dict[str, tuple[Thing, ...]]] = {
    "train": {
        "a": (Thing("cat", (8, 8, 40, 40)), Thing("puppy", (50, 20, 90, 60))),
        "b": (Thing("puppy", (10, 10, 60, 50)), Thing("puppy", (66, 4, 92, 30), is_crowd=True)),
        "c": (Thing("cat", (30, 16, 70, 56)),),
    },
    "val": {
        "d": (Thing("cat", (8, 8, 40, 40)), Thing("puppy", (52, 8, 88, 44))),
        "e": (Thing("puppy", (20, 20, 70, 60)), Thing("cat", (2, 2, 18, 18), is_crowd=True)),
    },
}
COLOURS = {"cat": (210, 60, 40), "puppy": (40, 90, 200)}


@functools.cache
def picture_of(split: str, name: str) -> bytes:
    """Return the JPEG of a picture: its things as ellipses and rectangles on a slope of grey."""
    grey = np.linspace(90 + 10 * ord(name) % 60, 160, SIZE_HW[1], dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(grey[None, :, None], (*SIZE_HW, 3)).copy())
    draw = ImageDraw.Draw(image)
    for thing in THINGS[split][name]:
        shape = draw.ellipse if thing.name == "cat" else draw.rectangle
        shape(thing.box, fill=COLOURS[thing.name])
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return file.getvalue()


def write_pictures(folder_of: Callable[[str], Path]) -> None:
    """Write all pictures, those of a split into the folder that `folder_of` returns."""
    for split, pictures in THINGS.items():
        folder_of(split).mkdir(parents=True, exist_ok=True)
        for name in pictures:
            (folder_of(split) / f"{name}.jpg").write_bytes(picture_of(split, name))


def rewrite(file: Path, change: Callable[[str], str]) -> None:
    """Change the text of a file; a change that changes nothing is a mistake in the list."""
    before = file.read_text(encoding="utf-8")
    after = change(before)
    assert after != before, f"{file.name}: nothing to change"
    file.write_bytes(after.encode("utf-8", "surrogateescape"))


def replacing(old: str, new: str) -> Callable[[str], str]:
    """Return a change of text that replaces the first `old`."""
    return lambda text: text.replace(old, new, 1)


def of_text(*kinds: str) -> Iterator[tuple[str, Callable[[str], bytes]]]:
    """Yield oddities that a text file of any format may have: a name, and a function from text to bytes."""
    known: dict[str, Callable[[str], bytes]] = {
        "a byte-order mark": lambda text: text.encode("utf-8-sig"),
        "UTF-16": lambda text: text.encode("utf-16"),
        "line ends of Windows": lambda text: text.replace("\n", "\r\n").encode(),
        "line ends of old Macs": lambda text: text.replace("\n", "\r").encode(),
        "blank lines at both ends": lambda text: f"\n\n{text}\n\n".encode(),
        "nothing at all": lambda _: b"",
        "bytes that are no text": lambda _: b"\xff\xd8\xff\xe0\x00\x10JFIF\x80",
        "its second half missing": lambda text: text[: len(text) // 2].encode(),
    }
    return ((kind, known[kind]) for kind in kinds)
