"""Edits of label files, and Hypothesis strategies that draw them. A label set is the bytes of its files by name.

Every edit is a value that prints as the call that makes it, so that a failing example can be pasted into a test. An
edit whose place is not there (any more) changes nothing.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol
from xml.etree import ElementTree

from hypothesis import strategies as st

LabelSet = dict[str, bytes | None]  # None stands for a folder of that name
Place = tuple[int | str, ...]

# Words in a text, and what is written to the file in their place: what no JSON or XML writer would write.
RAW = {
    "@deep-json": "[" * 20_000 + "]" * 20_000,
    "@digits": "9" * 5000,
    "@1e999": "1e999",
    "@twice": '{"id": 1, "id": 2}',
    "@deep-xml": "<a>" * 20_000 + "</a>" * 20_000,
    "@bomb": "&i;",
    "@long": "x" * 300_000,
}
BOMB = '<!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {name} "{f"&{last};" * 10}">' for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class Edit(Protocol):
    """A change of a label set."""

    def apply(self, files: LabelSet) -> LabelSet:
        """Return a changed copy."""


@dataclass(frozen=True)
class JsonEdit:
    """Replace, delete, double or rename the value at a path of a JSON file."""

    file: str
    path: Place
    action: str
    value: Any = None

    def apply(self, files: LabelSet) -> LabelSet:
        try:
            content = json.loads(files[self.file] or b"")
            content = _edit_json(content, self.path, self.action, self.value)
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            return files
        text = json.dumps(content)
        for word, raw in RAW.items():
            text = text.replace(f'"{word}"', f'"{raw}"' if word == "@long" else raw)
        return {**files, self.file: text.encode()}


def _edit_json(content: Any, path: Place, action: str, value: Any) -> Any:
    if not path:
        return value if action == "replace" else content
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    last = path[-1]
    old = parent[last]
    if action == "replace":
        parent[last] = value
    elif action == "delete":
        del parent[last]
    elif action == "double":
        parent.insert(last, json.loads(json.dumps(old))) if isinstance(parent, list) else parent.update({"twice": old})
    elif isinstance(parent, dict):
        parent[str(value)] = parent.pop(last)
    return content


def json_paths(value: Any, path: Place = ()) -> Iterator[Place]:
    """Yield the path of every value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from json_paths(child, (*path, key))


@dataclass(frozen=True)
class XmlEdit:
    """Change the text, tag or an attribute of an element, delete or double it; `path` holds positions of children."""

    file: str
    path: Place
    action: str
    value: str = ""

    def apply(self, files: LabelSet) -> LabelSet:
        try:
            root = element = ElementTree.fromstring(files[self.file] or b"")
            parents = [root]
            for step in self.path:
                parents.append(element)
                element = element[int(step)]
        except (LookupError, ValueError, ElementTree.ParseError):  # of the path, of the encoding, of an edit before
            return files
        if self.action in ("text", "tag"):
            setattr(element, self.action, self.value)
        elif self.action == "attribute":
            element.set(self.value, self.value)
        elif self.action == "delete" and self.path:
            parents[-1].remove(element)
        elif self.action == "double" and self.path:
            parents[-1].append(element)
        try:
            text = ElementTree.tostring(root, encoding="unicode")
        except (ValueError, RecursionError):  # a name such as "{", or what an edit before has nested
            return files
        if self.value == "@bomb":
            text = BOMB + "]>" + text
        for word, raw in RAW.items():
            text = text.replace(word, raw)
        return {**files, self.file: text.encode("utf-8", "surrogatepass")}


def xml_paths(element: ElementTree.Element, path: Place = ()) -> Iterator[Place]:
    """Yield the path of every element below an element, itself first."""
    yield path
    for number, child in enumerate(element):
        yield from xml_paths(child, (*path, number))


@dataclass(frozen=True)
class WordEdit:
    """Replace, delete or double a word of a line of a text, or insert a word before it; with `word` None the line."""

    file: str
    line: int
    word: int | None
    action: str
    value: str = ""

    def apply(self, files: LabelSet) -> LabelSet:
        try:
            lines: list[str] = (files[self.file] or b"").decode("utf-8", "surrogatepass").split("\n")
            items = lines if self.word is None else lines[self.line].split(" ")
            place = self.line if self.word is None else self.word
            old = items[place]
        except (KeyError, IndexError, ValueError):
            return files
        new = {"replace": [self.value], "delete": [], "double": [old, old], "insert": [self.value, old]}[self.action]
        items[place : place + 1] = new
        if self.word is not None:
            lines[self.line] = " ".join(items)
        text = "\n".join(lines)
        for word, raw in RAW.items():
            text = text.replace(word, raw)
        return {**files, self.file: text.encode("utf-8", "surrogatepass")}


@dataclass(frozen=True)
class ByteEdit:
    """Flip bits of a byte, cut bytes out or insert some; `place` is in thousandths of the file."""

    file: str
    action: str
    place: int
    value: int | bytes

    def apply(self, files: LabelSet) -> LabelSet:
        old = files.get(self.file)
        if not old:
            return files
        place = self.place * len(old) // 1000
        if isinstance(self.value, bytes):
            return {**files, self.file: old[:place] + self.value + old[place:]}
        if self.action == "cut":
            return {**files, self.file: old[:place] + old[place + self.value :]}
        return {**files, self.file: old[:place] + bytes([old[place] ^ self.value & 255]) + old[place + 1 :]}


@dataclass(frozen=True)
class Encode:
    """Write the text of a file in another encoding, with a mark before it and, for XML, a declaration of `declared`."""

    file: str
    codec: str
    mark: bytes = b""
    declared: str = ""

    def apply(self, files: LabelSet) -> LabelSet:
        try:
            text = (files[self.file] or b"").decode("utf-8", "surrogatepass")
        except (KeyError, UnicodeDecodeError):
            return files
        if self.declared:
            text = f'<?xml version="1.0" encoding="{self.declared}"?>\n{text}'
        return {**files, self.file: self.mark + text.encode(self.codec, "replace")}


@dataclass(frozen=True)
class FileEdit:
    """Remove a file, put a folder in its place, or copy it to another name."""

    file: str
    action: str
    name: str = ""

    def apply(self, files: LabelSet) -> LabelSet:
        rest = {name: content for name, content in files.items() if name != self.file}
        if self.action == "folder":
            return {**rest, self.file: None}
        if self.action == "copy":
            return {**files, str(PurePosixPath(self.file).with_name(self.name)): files.get(self.file)}
        return rest


ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 1e9, 1e18, float("nan"), float("inf"), float("-inf")),
    *(2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, *RAW),
    *(
        "",
        " ",
        "0",
        "1",
        "12",
        "1.5",
        "nan",
        "N/A",
        "\ud800",
        "\0",
        "\n",
        "é",
        "../x.png",
        "/a.png",
        "b/c.png",
        "a.png",
    ),
    *([], {}, [[]], [None], [{}], {"a": 1}, [1, 2, 3, 4], ["1", "2", "3", "4"], [1, 2, 3], [0.1, 0.2, 0.3, 0.4]),
    *([[1, 2, 9, 9]], [1, 1, 9, 1, 9, 9], [[1, 1, 9, 1, 9]], [[1, 1, 9, 1, 9, "9"]], [[1, 1, 9, 1, 9, None]]),
    *([[1, 1, 9, 1, 9, 1e9]], [[1, 1, 9, 1, 9, 10**400]], [[1, 1, 9, 1, 9, 9], [1]], [[[1, 1, 9, 1, 9, 9]]]),
    {"size": [12, 16], "counts": [1, 2, 189]},
    {"size": [12, 16], "counts": [192, "0"]},
    {"size": [12, 16], "counts": [0.5, 191.5]},
    {"size": [12, 16], "counts": [10**400]},
    {"size": [12, 16], "counts": [-1, 193]},
    {"size": [12.0, "16"], "counts": [192]},
    {"size": 12, "counts": "n5k"},
    {"size": [10**9, 10**9], "counts": [10**18]},
    {"size": [12, 16], "counts": "é\ud800"},
    {"size": [12, 16], "counts": "o" * 400},
    {"counts": []},
    {"id": 10, "file_name": "a.png", "height": 2**31 - 1, "width": 2**31 - 1},
    {"id": 30, "image_id": 20, "category_id": 3, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 9, 1, 9, 9]]},
    [[0, 0, 1e6, 0, 1e6, 1e6, 0, 1e6]],
]
ODD_WORDS = [
    *("", " ", "0", "1", "-1", "2", "0.5", "1e9", "-1e9", "1e308", "1e999", "nan", "inf", "-inf", "1_0", "0x10", "1,5"),
    *("9" * 400, "99999999999999999999", *RAW, "\0", "\ud800", "\ufeff", "\n", "\x85", "\u2028", "\r", "\t", "é", "犬"),
    *("١", "true", "None", "../x", "/a", "a.png", "a.png.txt", "images", "person", "N/A", "%s", "{}", "\x1b[31m"),  # noqa: RUF001
    *("{", "[", "]", "- ", "&a [*a]", "*a", "&a", "<<: *a", "!!python/object:os.system", "~", "null", "no", "? ", "|"),
    *("names:", "nc:", "path:", "train:", "test:", "'", '"', "#", ":", "[cat, dog]", "{0: cat, 7: dog}", "{a: b}"),
]
CODECS = [
    *("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "latin-1", "cp1252", "gb2312", "shift-jis"),
    *("cp037", "hz"),
]
DECLARED = [
    *("", "UTF-8", "utf-16", "GB2312", "latin-1", "no-such", "hex", "rot13", "undefined", "idna", "punycode", "zlib"),
    *(
        "unicode_escape",
        "raw_unicode_escape",
        "mbcs",
        "base64",
        "utf-8-sig",
        "utf-32",
        "utf-7",
        "ascii",
        "utf_8;",
        "x:y",
    ),
]
MARKS = [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, b"\0", b"\n", b"\xff"]
FRAGMENTS = [
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b" ",
    b'"',
    b",",
    b"]",
    b"}",
    b"{",
    b"NaN",
]


def _weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose by weight; `one_of` gives every branch, also of its branches, the same."""
    numbers = [number for number, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(numbers).flatmap(lambda number: choices[number][1])


json_values = _weighted(
    (3, st.sampled_from(ODD_VALUES)),
    (
        1,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
    ),
)
words = _weighted(
    (3, st.sampled_from(ODD_WORDS)),
    (1, st.text(max_size=5) | st.floats().map(str) | st.integers().map(str)),
)


def changed(files: LabelSet, edits: Iterable[Edit]) -> LabelSet:
    """Return a copy to which all edits have been done."""
    for edit in edits:
        files = edit.apply(files)
    return files


def edits_of(files: LabelSet) -> st.SearchStrategy[list[Edit]]:
    """Return a strategy that draws one or two edits of a label set."""
    of_structure = [_structural(name, content) for name, content in files.items() if content is not None]
    one = _weighted((6, st.one_of(of_structure)), (1, _of_bytes(sorted(files))), (1, _of_files(sorted(files))))
    return st.lists(one, min_size=1, max_size=2)


def _structural(name: str, content: bytes) -> st.SearchStrategy[Edit]:
    if name.endswith(".json"):
        # Numbers of polygons are most of the paths: choose a kind of place first, then one of this kind.
        kinds: dict[Place, list[Place]] = {}
        for path in json_paths(json.loads(content)):
            kinds.setdefault(tuple("*" if isinstance(step, int) else step for step in path), []).append(path)
        paths = st.sampled_from(list(kinds.values())).flatmap(st.sampled_from)
        actions = st.sampled_from(["replace", "replace", "replace", "delete", "double", "rename"])
        return st.builds(JsonEdit, st.just(name), paths, actions, json_values)
    if name.endswith(".xml"):
        paths = st.sampled_from(list(xml_paths(ElementTree.fromstring(content))))
        actions = st.sampled_from(["text", "text", "text", "tag", "attribute", "delete", "double"])
        return st.builds(XmlEdit, st.just(name), paths, actions, words)
    lines = content.decode().split("\n")
    places = [(number, word) for number, line in enumerate(lines) for word in (None, *range(len(line.split(" "))))]
    actions = st.sampled_from(["replace", "replace", "delete", "double", "insert"])
    return st.builds(
        lambda place, action, value: WordEdit(name, *place, action, value), st.sampled_from(places), actions, words
    )


def _of_bytes(names: list[str]) -> st.SearchStrategy[Edit]:
    name, place = st.sampled_from(names), st.integers(0, 999)
    return st.one_of(
        st.builds(ByteEdit, name, st.just("flip"), place, st.integers(1, 255)),
        st.builds(ByteEdit, name, st.just("cut"), place, st.integers(1, 10_000)),
        st.builds(ByteEdit, name, st.just("insert"), place, st.sampled_from(FRAGMENTS) | st.binary(max_size=4)),
    )


def _of_files(names: list[str]) -> st.SearchStrategy[Edit]:
    name = st.sampled_from(names)
    return st.one_of(
        st.builds(Encode, name, st.sampled_from(CODECS), st.sampled_from(MARKS), st.sampled_from(DECLARED)),
        st.builds(FileEdit, name, st.sampled_from(["remove", "folder", "copy"]), words.filter(_is_name)),
    )


def _is_name(word: str) -> bool:
    return 0 < len(word) < 50 and not set(word) & set("/\0") and word not in (".", "..") and word.isprintable()
