"""Pascal VOC: the clean data set, its twins, and the oddities."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from helpers.oddities.oddity import (
    AS_MEANT,
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
AT_BORDER = "the box ends at the border"
CROWD = "the box is difficult"
TWICE = "the box is there twice"
NEGATIVE = "the image has no boxes"

_OBJECT = """\
\t<object>
\t\t<name>{name}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>0</truncated>
\t\t<difficult>{difficult}</difficult>
\t\t<bndbox>
\t\t\t<xmin>{x1}</xmin>
\t\t\t<ymin>{y1}</ymin>
\t\t\t<xmax>{x2}</xmax>
\t\t\t<ymax>{y2}</ymax>
\t\t</bndbox>
\t</object>
"""
_IMAGE = """\
<annotation>
\t<folder>VOC</folder>
\t<filename>{name}.jpg</filename>
\t<size>
\t\t<width>{width}</width>
\t\t<height>{height}</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>0</segmented>
{objects}</annotation>
"""


def write_voc(root: Path) -> None:
    """Write the clean data set."""
    write_pictures(lambda split: root / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, pictures in THINGS.items():
        for name, things in pictures.items():
            objects = ""
            for thing in things:
                x1, y1, x2, y2 = thing.box  # VOC counts pixels from 1, and the last one is in the box
                corners = {"x1": x1 + 1, "y1": y1 + 1, "x2": x2, "y2": y2}
                objects += _OBJECT.format(name=thing.name, difficult=int(thing.is_crowd), **corners)
            text = _IMAGE.format(name=name, width=WIDTH, height=HEIGHT, objects=objects)
            (root / "Annotations" / f"{name}.xml").write_text(text)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in pictures))


def _xml(edit: Callable[[str], str]) -> Change:
    """Return a change of the text of the first annotation file of both splits."""

    def change(root: Path) -> None:
        for pictures in THINGS.values():
            rewrite(root / "Annotations" / f"{next(iter(pictures))}.xml", edit)

    return change


def _xml_bytes(edit: Callable[[str], bytes]) -> Change:
    def change(root: Path) -> None:
        for pictures in THINGS.values():
            file = root / "Annotations" / f"{next(iter(pictures))}.xml"
            file.write_bytes(edit(file.read_text()))

    return change


def _list(edit: Callable[[str], bytes]) -> Change:
    """Return a change of the text of the list of images of both splits."""

    def change(root: Path) -> None:
        for split in THINGS:
            file = root / "ImageSets" / "Main" / f"{split}.txt"
            file.write_bytes(edit(file.read_text()))

    return change


def _everywhere(old: str, new: str) -> Change:
    """Return a change of a text in all annotation files."""

    def change(root: Path) -> None:
        for file in sorted((root / "Annotations").glob("*.xml")):
            file.write_text(file.read_text().replace(old, new))

    return change


def _without_objects(text: str) -> str:
    return text[: text.index("\t<object>")] + "</annotation>\n"


def _object_twice(text: str) -> str:
    start, end = text.index("\t<object>"), text.index("</object>\n") + len("</object>\n")
    return text[:end] + text[start:end] + text[end:]


def _renamed(name: str) -> Change:
    """Return a change of the name of the first image of both splits, on the disk, in the list, and of its labels."""

    def change(root: Path) -> None:
        for split, pictures in THINGS.items():
            old, new = next(iter(pictures)), name.format(next(iter(pictures)))
            for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
                target = root / folder / (new + suffix)
                target.parent.mkdir(parents=True, exist_ok=True)
                (root / folder / (old + suffix)).rename(target)
            rewrite(root / "ImageSets" / "Main" / f"{split}.txt", replacing(f"{old}\n", f"{new}\n"))

    return change


TWINS: dict[str, Change] = {
    AS_MEANT: lambda root: None,
    LEFT_OUT: _xml(lambda text: text[: text.index("\t<object>")] + text[text.index("</object>\n") + 10 :]),
    CLIPPED: _xml(replacing("<xmax>40<", f"<xmax>{WIDTH}<")),
    AT_BORDER: _xml(replacing("<xmin>9<", "<xmin>1<")),
    CROWD: _xml(replacing("<difficult>0<", "<difficult>1<")),
    TWICE: _xml(_object_twice),
    NEGATIVE: _xml(_without_objects),
}


def _oddity(says: str, change: Change, twin: str = AS_MEANT, doctor: str = "") -> Oddity:
    return Oddity("voc", says, change, STOPS if doctor.startswith("error") else twin, doctor)


def _value(key: str, old: str, *values: str | None, twin: str = AS_MEANT, doctor: str = "") -> Iterator[Oddity]:
    """Yield oddities of the first element of that name; None leaves it out."""
    for value in values:
        new = "" if value is None else f"<{key}>{value}</{key}>"
        says = f"no `<{key}>`" if value is None else f"`{new}`"
        change = _xml(replacing(f"<{key}>{old}</{key}>", new))
        yield _oddity(says.replace("\n", "\\n").replace("\t", "\\t"), change, twin, doctor)


def _noted(text: str) -> Callable[[str], str]:
    return replacing("<size>", f"<note>{text}</note><size>")


def _texts() -> Iterator[Oddity]:
    bad = "error bad-annotations"
    for name, edit in of_text("a byte-order mark", "line ends of Windows", "line ends of old Macs"):
        yield _oddity(f"{name} in an XML file", _xml_bytes(edit))
    for name, edit in of_text("nothing at all", "bytes that are no text", "its second half missing"):
        yield _oddity(f"{name} in an XML file", _xml_bytes(edit), doctor=bad)
    for encoding in ("UTF-8", "utf-16", "GB2312", "ISO-8859-1", "windows-1252"):
        head = f'<?xml version="1.0" encoding="{encoding}"?>\n'
        edit = lambda text, head=head, encoding=encoding: (head + text).encode(encoding)  # noqa: E731
        yield _oddity(f"an XML file in {encoding}, which it declares", _xml_bytes(edit))
    unknown = '<?xml version="1.0" encoding="x-unknown"?>\n'
    yield _oddity("an XML file in an encoding that nobody knows", _xml(lambda text: unknown + text), doctor=bad)
    space = replacing("<annotation>", '<annotation xmlns="http://example.org/voc">')
    yield _oddity("an XML file with a namespace", _xml(space))
    prefix = lambda text: text.replace("</", "</v:").replace("<", "<v:").replace("<v:/v:", "</v:")  # noqa: E731
    named = lambda text: prefix(text).replace("<v:annotation>", '<v:annotation xmlns:v="http://e.org">')  # noqa: E731
    yield _oddity("an XML file with a namespace of a prefix", _xml(named))
    yield _oddity("an XML file with a comment", _xml(replacing("<size>", "<!-- 1 < 2 --><size>")))
    yield _oddity("an XML file without line ends", _xml(lambda text: text.replace("\n", "").replace("\t", "")))
    bomb = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 10}">' for n in range(10))
    entities = replacing("<annotation>", f"<!DOCTYPE annotation [{bomb}]><annotation><note>&e9;</note>")
    yield _oddity("entities that become ten thousand million letters", _xml(entities), doctor=bad)
    for text in ("&nbsp;", "a & b", "\x00"):
        yield _oddity(f"`<note>{text}</note>`".replace("\x00", "\\0"), _xml(_noted(text)), doctor=bad)
    yield _oddity("a page of HTML instead of labels", _xml(lambda _: "<html><body>404</body></html>"), doctor=bad)


def _objects() -> Iterator[Oddity]:
    bad = "error bad-annotations"
    yield from _value("xmin", "9", " 9 ", "\n9\n", "9.0", "09", "9e0")
    yield from _value("xmin", "9", "9,5", "", "nine", None, doctor=bad)
    yield from _value("xmin", "9", "nan", "inf", doctor="error non-finite-boxes")
    yield from _value("xmin", "9", "60", "40", twin=LEFT_OUT, doctor="warning degenerate-boxes")
    turned = lambda text: text.replace("<xmin>9<", "<xmin>900<", 1).replace("<xmax>40<", "<xmax>950<", 1)  # noqa: E731
    yield _oddity("a box outside its image", _xml(turned), LEFT_OUT, "warning boxes-outside-the-image")
    yield from _value("xmax", "40", "900", twin=CLIPPED, doctor="warning boxes-clipped-to-the-image")
    yield from _value("xmin", "9", "0", "1", twin=AT_BORDER)
    yield _oddity("an object written twice", _xml(_object_twice), TWICE, "warning duplicate-boxes")
    yield from _value("name", "cat", " cat ", "\n\t\tcat\n\t\t")
    yield from _value("name", "cat", "", None, " ", doctor=bad)
    for name in ("cat in a box", "N/A", "Größe 木", "a&amp;b", "7"):
        yield _oddity(f"a class called `{name}`", _everywhere("<name>cat</name>", f"<name>{name}</name>"))
    yield from _value("difficult", "0", None, "", "0.0", " 0 ", "false", "False", "Unspecified")
    yield from _value("difficult", "0", "1", "1.0", "true", "True", twin=CROWD)
    yield from _value("difficult", "0", "2", "-1", doctor=bad)
    boxless = lambda text: text[: text.index("\t\t<bndbox>")] + text[text.index("</bndbox>\n") + 10 :]  # noqa: E731
    yield _oddity("an object without `<bndbox>`", _xml(boxless), doctor=bad)
    outline = "<polygon><x1>9</x1><y1>9</y1><x2>40</x2><y2>9</y2><x3>40</x3><y3>40</y3></polygon>"
    yield _oddity("an object with `<polygon>` too", _xml(replacing("<bndbox>", f"{outline}<bndbox>")))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    yield _oddity("an object with a `<part>`", _xml(replacing("</bndbox>\n", f"</bndbox>{part}\n")))
    yield _oddity("an image without objects", _xml(_without_objects), NEGATIVE, "info images-without-boxes")


def _sizes() -> Iterator[Oddity]:
    bad = "error bad-annotations"
    sizeless = lambda text: text[: text.index("\t<size>")] + text[text.index("</size>\n") + 8 :]  # noqa: E731
    yield _oddity("no `<size>`", _xml(sizeless))
    yield from _value("width", str(WIDTH), "0", "", None, f"{WIDTH}.0", f" {WIDTH} ")
    yield from _value("width", str(WIDTH), "96px", "-96", "96.5", "nan", doctor=bad)
    wrong = [*_value("width", str(WIDTH), "97", doctor="error size-mismatch")]
    turned = lambda text: text.replace(">96<", ">x<").replace(">64<", ">96<").replace(">x<", ">64<")  # noqa: E731
    wrong += [_oddity("height and width in each other's place", _xml(turned), doctor="error size-mismatch")]
    yield from (replace(oddity, unread=("split",)) for oddity in wrong)
    yield from _value("depth", "3", None, "1")
    yield _oddity(
        "`<filename>` of another image", _xml(lambda text: text.replace("a.jpg<", "b.jpg<").replace("d.jpg<", "e.jpg<"))
    )
    yield _oddity(
        "no `<filename>`",
        _xml(lambda text: text.replace("<filename>a.jpg</filename>", "").replace("<filename>d.jpg</filename>", "")),
    )


def _lists() -> Iterator[Oddity]:
    for name, edit in of_text("a byte-order mark", "UTF-16", "line ends of Windows", "blank lines at both ends"):
        yield _oddity(f"{name} in a list of images", _list(edit))
    edits: dict[str, Callable[[str], str]] = {
        "blanks at the ends of lines": lambda text: text.replace("\n", " \t\n"),
        "names with `.jpg`": lambda text: text.replace("\n", ".jpg\n"),
        "a line twice": lambda text: text + text[:2],
        "no line end at its end": lambda text: text.rstrip("\n"),
        "a second column of `1`": lambda text: text.replace("\n", "  1\n"),
    }
    for name, change in edits.items():
        yield _oddity(f"{name} in a list of images", _list(lambda text, change=change: change(text).encode()))
    gone = _list(lambda text: f"{text}gone\n".encode())
    yield _oddity("a list that names an image without labels", gone, doctor="error missing-annotations")
    yield _oddity("labels of a listed image that is gone", _without_image, doctor="error missing-images")
    for name in ("{} x", "{}/x", "{}.x", "{}ö", "{} 1"):
        yield _oddity(f"an image called `{name.format('a')}.jpg`", _renamed(name))


def _without_image(root: Path) -> None:
    for pictures in THINGS.values():
        (root / "JPEGImages" / f"{next(iter(pictures))}.jpg").unlink()


VOC: tuple[Oddity, ...] = (
    *of_topic("XML", _texts()),
    *of_topic("objects", _objects()),
    *of_topic("sizes", _sizes()),
    *of_topic("lists of images", _lists()),
)
