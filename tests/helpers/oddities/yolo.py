"""YOLO: the clean data set, its twins, and the oddities."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from helpers.oddities.oddity import (
    AS_MEANT,
    NAMES,
    SIZE_HW,
    STOPS,
    THINGS,
    Change,
    Oddity,
    of_text,
    of_topic,
    replacing,
    rewrite,
    write_pictures,
)

HEIGHT, WIDTH = SIZE_HW
LEFT_OUT = "the box is left out"
CLIPPED = "the box is clipped to its image"
TWICE = "the box is there twice"
NEGATIVE = "the image has no boxes"

CONFIG = "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n"
# The first line of the first label file of both splits: cat, (8, 8, 40, 40) in 96 x 64.
CX, CY, W, H = "0.25", "0.375", repr(32 / 96), "0.5"
LINE = f"0 {CX} {CY} {W} {H}"


def write_yolo(root: Path) -> None:
    """Write the clean data set; crowds are boxes like others here."""
    write_pictures(lambda split: root / "images" / split)
    for split, pictures in THINGS.items():
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        for name, things in pictures.items():
            lines = []
            for thing in things:
                x1, y1, x2, y2 = thing.box
                values = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
                lines.append(" ".join(map(repr, (NAMES.index(thing.name), *values))) + "\n")
            (root / "labels" / split / f"{name}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text(CONFIG)


def _files(root: Path) -> Iterator[Path]:
    """Yield the first label file of both splits."""
    for split, pictures in THINGS.items():
        yield root / "labels" / split / f"{next(iter(pictures))}.txt"


def _text(edit: Callable[[str], str]) -> Change:
    def change(root: Path) -> None:
        for file in _files(root):
            rewrite(file, edit)

    return change


def _bytes(edit: Callable[[str], bytes]) -> Change:
    def change(root: Path) -> None:
        for file in _files(root):
            file.write_bytes(edit(file.read_text()))

    return change


def _line(new: str) -> Change:
    return _text(replacing(LINE, new))


def _yaml(old: str, new: str) -> Change:
    return lambda root: rewrite(root / "data.yaml", replacing(old, new))


def _yaml_bytes(edit: Callable[[str], bytes]) -> Change:
    return lambda root: (root / "data.yaml").write_bytes(edit(CONFIG)) and None


def _without_files(root: Path) -> None:
    for file in _files(root):
        file.unlink()


def _orphans(root: Path) -> None:
    for file in _files(root):
        file.with_name("zzz.txt").write_text(f"{LINE}\n")


TWINS: dict[str, Change] = {
    AS_MEANT: lambda root: None,
    LEFT_OUT: _text(lambda text: text.split("\n", 1)[1]),
    CLIPPED: _line(f"0 {(8 + 96) / 2 / 96} {CY} {88 / 96} {H}"),
    TWICE: _text(lambda text: f"{LINE}\n{text}"),
    NEGATIVE: _text(lambda _: ""),
}


def _oddity(says: str, change: Change, twin: str = AS_MEANT, doctor: str = "") -> Oddity:
    return Oddity("yolo", says, change, STOPS if doctor.startswith("error") else twin, doctor)


def _texts() -> Iterator[Oddity]:
    good = ("a byte-order mark", "UTF-16", "line ends of Windows", "line ends of old Macs", "blank lines at both ends")
    for name, edit in of_text(*good):
        yield _oddity(f"{name} in a label file", _bytes(edit))
    yield _oddity("tabs in a label file", _text(lambda text: text.replace(" ", "\t")))
    yield _oddity("many blanks in a label file", _text(lambda text: text.replace(" ", "   ").replace("\n", "  \n")))
    none = "info images-without-boxes"
    yield _oddity("nothing at all in a label file", _text(lambda _: ""), NEGATIVE, none)
    yield _oddity("no label file of an image", _without_files, NEGATIVE, none)
    yield _oddity("a label file of no image", _orphans)
    bad = "error bad-label-lines"
    yield _oddity(
        "bytes that are no text in a label file", _bytes(lambda _: b"\xff\xd8\xff\xe0\x00\x10JFIF\x80"), doctor=bad
    )
    yield _oddity("a line of headings in a label file", _text(lambda text: f"class x y w h\n{text}"), doctor=bad)
    yield _oddity("a comment in a label file", _text(lambda text: f"# labels\n{text}"), doctor=bad)
    yield _oddity("a line twice in a label file", TWINS[TWICE], TWICE, "warning duplicate-boxes")


def _lines() -> Iterator[Oddity]:
    for line in (f"0.0 {CX} {CY} {W} {H}", f"0 2.5e-01 .375 {W} +0.5", f"00 {CX} {CY} {W} {H}"):
        yield _oddity(f"`{line}`", _line(line))
    x1, y1, x2, y2 = 8 / 96, 8 / 64, 40 / 96, 40 / 64
    yield _oddity("a polygon of four corners", _line(f"0 {x1} {y1} {x2} {y1} {x2} {y2} {x1} {y2}"))
    yield _oddity("a polygon of three corners", _line(f"0 {x1} {y1} {x2} {y1} {x2} {y2}"))
    bad = "error bad-label-lines"
    lines = [f"-1 {CX} {CY} {W} {H}", f"7 {CX} {CY} {W} {H}", f"{2**70} {CX} {CY} {W} {H}"]
    for line in lines:
        yield _oddity(f"`{line}`", _line(line), doctor="error unknown-category-ids")
    lines = [f"nan {CX} {CY} {W} {H}", f"0.5 {CX} {CY} {W} {H}", f"cat {CX} {CY} {W} {H}", f"0 nan {CY} {W} {H}"]
    lines += [f"0 inf {CY} {W} {H}", f"0 {CX} {CY} {W}", f"0 {CX}", "0", f"0 {CX} {CY} {W} {H} 0.9"]
    lines += [
        LINE.replace(" ", ","),
        LINE.replace(".", ","),
        LINE.replace(" ", ", "),
        f"0 {CX} {CY} {W} x",
        f"0 {CX} {CY} {W} 1e999",
    ]
    lines += [f"0 {CX} {CY} {W} {H} 0.1 0.2 0.3"]
    for line in lines:
        yield _oddity(f"`{line}`", _line(line), doctor=bad)
    flat, outside = "warning degenerate-boxes", "warning boxes-outside-the-image"
    for line in (f"0 {CX} {CY} -0.5 {H}", f"0 {CX} {CY} 0 {H}", f"0 {CX} {CY} {W} 1e-12"):
        yield _oddity(f"`{line}`", _line(line), LEFT_OUT, flat)
    yield _oddity("a box in pixels: `0 24 24 32 32`", _line("0 24 24 32 32"), doctor=bad)
    yield _oddity(f"`0 -0.9 {CY} {W} {H}`", _line(f"0 -0.9 {CY} {W} {H}"), LEFT_OUT, outside)
    wide = f"0 {8 / 96 + 0.9} {CY} 1.8 {H}"  # from 8 to 180.8 pixels
    yield _oddity(f"`{wide}`", _line(wide), CLIPPED, "warning boxes-clipped-to-the-image")


def _configs() -> Iterator[Oddity]:
    names = "names: [cat, dog]"
    same = (
        "names:\n- cat\n- dog",
        "names: {0: cat, 1: dog}",
        "names:\n  '0': cat\n  '1': dog",
        "names: ['cat', \"dog\"]",
    )
    more = (
        "names: {1: dog, 0: cat}",
        "names: [cat, 'traffic: light']",
        "names: [N/A, no]",
        "names: [1, 2]",
        "names: [' cat ', dog]",
    )
    for text in (*same, *more):
        yield _oddity(f"`{text}`".replace("\n", "\\n"), _yaml(names, text))
    yield _oddity("no `names` but `nc`", _yaml(f"{names}\n", ""))
    yield _oddity("`names:` without a name, and `nc`", _yaml(names, "names:"))
    yield _oddity("no `nc`", _yaml("nc: 2\n", ""))
    yield _oddity("two classes of one name", _yaml(names, "names: [cat, cat]"), doctor="warning equal-class-names")
    broken = "error unreadable-data"
    for text in (
        "names: [cat]",
        "names: [cat, dog, cow]",
        "names: cat, dog",
        "names: [[cat], dog]",
        "names: {a: cat, b: dog}",
        "names: {-1: cat, 0: dog}",
        "names: [cat, dog",
        "names: *cats",
        "names: !!python/object/apply:os.getcwd []",
    ):
        yield _oddity(f"`{text}` with `nc: 2`", _yaml(names, text), doctor=broken)
    yield _oddity(
        "`names: {0: cat, 2: dog}`", _yaml(names, "names: {0: cat, 2: dog}"), doctor="error unknown-category-ids"
    )
    for name, edit in of_text("a byte-order mark", "UTF-16", "line ends of Windows", "line ends of old Macs"):
        yield _oddity(f"{name} in `data.yaml`", _yaml_bytes(edit))
    for name, edit in of_text("bytes that are no text"):
        yield _oddity(f"{name} in `data.yaml`", _yaml_bytes(edit), doctor=broken)
    for old, new in (
        ("path: .", "path: ../datasets/elsewhere"),
        ("images/train", "../images/train"),
        ("images/train", "./images/train/"),
        ("train: images/train", "train: [images/train]"),
    ):
        yield _oddity(f"`{new}`", _yaml(old, new))
    gone = _oddity("`train: gone`", _yaml("images/train", "gone"), doctor="error missing-splits")
    yield replace(gone, unread=("evaluate",))
    yield _oddity(
        "`test: ../test/images`, which is not there",
        _yaml("nc: 2", "test: ../test/images\nnc: 2"),
        doctor="info missing-splits",
    )
    for shape, point in (("[1, 2]", "0.2 0.3"), ("[1, 3]", "0.2 0.3 2")):
        yield _oddity(f"a key point behind the box, with `kpt_shape: {shape}`", _with_pose(shape, point))


def _with_pose(shape: str, point: str) -> Change:
    def change(root: Path) -> None:
        for file in sorted((root / "labels").rglob("*.txt")):
            rewrite(file, lambda text: text.replace("\n", f" {point}\n"))
        rewrite(root / "data.yaml", replacing("nc: 2", f"kpt_shape: {shape}\nnc: 2"))

    return change


YOLO: tuple[Oddity, ...] = (
    *of_topic("label files", _texts()),
    *of_topic("lines", _lines()),
    *of_topic("data.yaml", _configs()),
)
