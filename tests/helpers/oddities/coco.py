"""COCO: the oddities, field by field."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from helpers.oddities.coco_data import (
    CLIPPED,
    COPY,
    CROWD,
    HEIGHT,
    HUGE,
    INF,
    LEFT_OUT,
    MISSING,
    NAN,
    NO_MASK,
    TINY,
    TWICE,
    WIDTH,
    add,
    add_image,
    copying_first_image,
    editing,
    first_annotation,
    for_all,
    in_all_images,
    moving,
    relative,
    renumbering,
    retyped,
    rewriting,
    setting,
    with_list,
    with_text_ids,
    without_ids,
)
from helpers.oddities.oddity import (
    AS_MEANT,
    SIZE_HW,
    STOPS,
    Change,
    Oddity,
    of_text,
    of_topic,
)


def _of(kind: str, key: str, *values: Any, twin: str = AS_MEANT, doctor: str = "") -> Iterator[Oddity]:
    for value in values:
        yield _oddity(_saying(kind, key, value), setting(kind, key, value), twin, doctor)


def _saying(kind: str, key: str, value: Any) -> str:
    article = "an" if kind[0] in "aeiou" else "a"
    if value is MISSING:
        return f"{article} {kind} without `{key}`"
    return f"{article} {kind} with `{key}` {_shown(value)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii="\ud800" in str(value))
    text = text if len(text) < 60 else f"{text[:50]} ..."
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _oddity(says: str, change: Change, twin: str = AS_MEANT, doctor: str = "") -> Oddity:
    return Oddity("coco", says, change, STOPS if doctor.startswith("error") else twin, doctor)


def _images() -> Iterator[Oddity]:
    bad, huge = "error malformed-entries", "error unreadable-data"
    for said, kind in (("7.0", float), ('"7"', str)):
        yield _oddity(f"an image with `id` `{said}`, whose annotations say `7`", retyped("images", kind))
    yield from _of("image", "id", MISSING, None, "a1b2", True, 7.5, [7], doctor=bad)
    # In their order: by it pycocotools ranks detections of one score.
    for number, position in ((0, 0), (-5, 0), (2**53 + 1, -1)):
        yield _oddity(f"an image with `id` `{number}`", renumbering("image", number, position))
    yield _oddity("ids of images that are texts of digits, everywhere", editing(with_text_ids))
    yield _oddity("an image with an `id` of more than 64 bits", renumbering("image", 2**63), doctor=huge)
    yield _oddity(
        "two images of one `id`",
        editing(lambda content: content["images"][1].update(id=content["images"][0]["id"])),
        doctor="error duplicate-image-ids",
    )
    yield from _of("image", "file_name", MISSING, None, 12, doctor=bad)
    yield from _of(
        "image",
        "file_name",
        "",
        "../x.jpg",
        "/x.jpg",
        "C:\\x.jpg",
        "\0",
        "\ud800.jpg",
        doctor="error unsafe-file-names",
    )
    gone = "error missing-images"
    missing = [*_of("image", "file_name", "gone.jpg", "https://example.org/x.jpg", "A.JPG", "x" * 5000, doctor=gone)]
    missing += [_oddity("a file name with blank ends that the file lacks", moving(" x.jpg ", "x.jpg"), doctor=gone)]
    yield from (replace(oddity, unread=("split",)) for oddity in missing)
    yield _oddity("a file name with backslashes where the file has folders", moving("s\\x.jpg", "s/x.jpg"))
    for name in (" x y.jpg", "s/x.jpg", "./s/x.jpg", "größe 木.jpg", "x.y.jpg", "x.JPG", "100%#?.jpg", "-x.jpg"):
        yield _oddity(f"an image called `{name}`", moving(name))
    yield _oddity(
        "one file listed as two images, with the boxes of both",
        editing(lambda content: add_image(content, content["images"][0]["file_name"])),
        COPY,
        "warning duplicate-images",
    )
    yield _oddity("a copy of an image under another name", copying_first_image, COPY, "warning duplicate-images")


def _sizes() -> Iterator[Oddity]:
    yield from _of("image", "height", float(HEIGHT), str(HEIGHT), f"{HEIGHT}.0", None, 0, MISSING, "")
    yield _oddity("no image with `height`", in_all_images("height", None))
    bad = "error malformed-sizes"
    yield from _of("image", "height", -HEIGHT, 64.5, "64px", True, [64], NAN, 2**31, {}, HUGE, doctor=bad)
    other = "error size-mismatch"
    turned = editing(lambda content: content["images"][0].update(height=WIDTH, width=HEIGHT))
    wrong = [*_of("image", "width", WIDTH + 1, doctor=other)]
    wrong += [_oddity("height and width of an image in each other's place", turned, doctor=other)]
    yield from (replace(oddity, unread=("split",)) for oddity in wrong)


def _ids() -> Iterator[Oddity]:
    values = (MISSING, 0, -1, "6f9619ff-8b86-d011", 2**53 + 1, 2**64, 2, 1.0, 1.5, None, True, [1], NAN)
    yield from _of("annotation", "id", *values)
    yield _oddity("annotations of one `id`, all of them", for_all("id", lambda _: 1))
    yield _oddity("annotations without `id`, all of them", editing(without_ids))
    bad = "error malformed-entries"
    for kind in ("image", "category"):
        key = f"{kind}_id"
        yield _oddity(f"`{key}` as texts of digits", for_all(key, str))
        yield _oddity(f"`{key}` as `7.0`", for_all(key, float))
        yield from _of("annotation", key, 4711, doctor=f"error unknown-{kind}-ids")
        yield from _of("annotation", key, MISSING, None, "x", True, 1.5, [1], NAN, doctor=bad)
        yield from _of("annotation", key, 2**64, doctor="error unreadable-data")


def _categories() -> Iterator[Oddity]:
    bad = "error malformed-entries"
    for number in (0, -1):
        yield _oddity(f"a category with `id` `{number}`", renumbering("category", number))
    for number in (90, 2**53 + 1):
        change = renumbering("category", number, -1)
        yield _oddity(f"a category with `id` `{number}`", change, doctor="info category-id-gaps")
    for said, kind in (("1.0", float), ('"1"', str)):
        yield _oddity(f"a category with `id` `{said}`, whose annotations say `1`", retyped("categories", kind))
    yield from _of("category", "id", MISSING, None, "x", True, 1.5, doctor=bad)
    yield _oddity(
        "two categories of one `id`",
        editing(lambda content: content["categories"][1].update(id=1)),
        doctor="error duplicate-category-ids",
    )
    yield from _of("category", "supercategory", MISSING, None, 3)
    yield from _of("category", "name", "N/A", "traffic light", " cat ", "Größe 木", 5, "", MISSING, None)
    yield from _of("category", "name", "cat\ndog", "\ud800", "c" * 5000)
    yield _oddity(
        "two categories of one `name`",
        editing(lambda content: content["categories"][1].update(name="cat")),
        doctor="warning equal-class-names",
    )
    yield _oddity("categories in another order", editing(lambda content: content["categories"].reverse()))


def _boxes() -> Iterator[Oddity]:
    x, y, w, h = 8, 8, 32, 32
    yield from _of("annotation", "bbox", [8.0, 8.0, 32.0, 32.0], ["8", "8", "32", "32.0"], [8, "8", 32.0, 32])
    bad = "error malformed-boxes"
    values = ([x, y, w, None], [x, y, w, h, 1], [x, y, w], [], ["a", y, w, h], [True, y, w, h], [[x, y, w, h]])
    yield from _of(
        "annotation", "bbox", *values, [x, y, NAN, h], [x, y, INF, h], ["nan", y, w, h], [HUGE, y, w, h], doctor=bad
    )
    values = ({"x": 8, "y": 8, "w": 32, "h": 32}, "8 8 32 32", None, MISSING)
    yield from _of("annotation", "bbox", *values, doctor="error malformed-entries")
    flat = "warning degenerate-boxes"
    values = ([x, y, -w, h], [x, y, 0, h], [x, y, w, 1e-9], [0, 0, 0, 0])
    yield from _of("annotation", "bbox", *values, twin=LEFT_OUT, doctor=flat)
    outside = "warning boxes-outside-the-image"
    yield from _of("annotation", "bbox", [200, y, w, h], [x, -90, w, h], [1e6, y, w, h], twin=LEFT_OUT, doctor=outside)
    beyond = "warning boxes-clipped-to-the-image"
    yield from _of("annotation", "bbox", [x, y, 900, h], twin=CLIPPED, doctor=beyond)
    yield from _of("annotation", "bbox", [x, y, WIDTH - 7.5, h], twin=CLIPPED)
    yield _oddity("all boxes relative, in 0..1", for_all("bbox", relative), TINY, "warning relative-boxes")
    again = editing(lambda content: content["annotations"].insert(1, {**first_annotation(content), "id": 99}))
    yield _oddity("an annotation written twice", again, TWICE, "warning duplicate-boxes")


def _flags() -> Iterator[Oddity]:
    yield from _of("annotation", "area", None, MISSING, "1024", "1024.0", 1024.0, NAN)
    yield from _of("annotation", "area", "large", [1024], {}, True, INF, HUGE, doctor="error malformed-area")
    yield from _of("annotation", "area", -1, doctor="warning odd-areas")
    yield from _of("annotation", "iscrowd", None, MISSING, False, "0", 0.0, NAN)
    yield from _of("annotation", "iscrowd", 1, True, "1", 1.0, twin=CROWD)
    yield from _of("annotation", "iscrowd", 2, "yes", "", [], -1, 0.5, doctor="error malformed-iscrowd")
    yield from _of("annotation", "ignore", 1, True, "1", twin=LEFT_OUT, doctor="warning ignored-boxes")
    yield from _of("annotation", "ignore", 0, False, None, "0")


def _segmentations() -> Iterator[Oddity]:
    corners = [8, 8, 40, 8, 40, 40, 8, 40]
    code = coco_mask.merge(coco_mask.frPyObjects([corners], *SIZE_HW))
    text = {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}
    flat = coco_mask.decode(code).ravel(order="F").astype(int)
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    key = "segmentation"
    yield from _of("annotation", key, corners, [corners, []], [[str(value) for value in corners]])
    yield from _of("annotation", key, [[float(value) for value in corners]])
    yield _oddity(
        "a mask as a run-length code with a list of counts", setting("annotation", key, {**text, "counts": runs})
    )
    yield _oddity("a mask as a compressed run-length code", setting("annotation", key, text))
    yield from _of("annotation", key, MISSING, None, [], {}, "", twin=NO_MASK, doctor="info boxes-without-polygons")
    lists = ([[]], [[8, 8, 40, 40]], [8, 8, 40, 40], [corners[:-1]])
    yield from _of("annotation", key, *lists, twin=NO_MASK, doctor="warning bad-masks")
    bad = "warning bad-masks"
    ends: tuple[Any, ...] = (NAN, 1e9, None, "x")
    yield from _of("annotation", key, *([[*corners[:-1], end]] for end in ends), twin=NO_MASK, doctor=bad)
    codes = ({**text, "size": [WIDTH, HEIGHT]}, {"counts": text["counts"]}, {**text, "counts": "no code"})
    more = ({**text, "counts": [5, 5]}, {**text, "counts": [-5, HEIGHT * WIDTH + 5]}, {**text, "counts": 7})
    yield from _of("annotation", key, *codes, *more, "polygon", 5, True, twin=NO_MASK, doctor=bad)


def _files() -> Iterator[Oddity]:
    for name, edit in of_text("a byte-order mark", "UTF-16", "line ends of Windows", "blank lines at both ends"):
        yield _oddity(f"{name} in the label file", rewriting(edit))
    broken = "error unreadable-data"
    for name, edit in of_text("nothing at all", "bytes that are no text", "its second half missing"):
        yield _oddity(f"{name} in the label file", rewriting(edit), doctor=broken)
    yield _oddity("brackets a hundred thousand deep", rewriting(lambda _: b"[" * 100_000), doctor=broken)
    yield _oddity("more after the end of the json", rewriting(lambda text: f"{text}\n}}".encode()), doctor=broken)
    for key in ("info", "licenses"):
        yield _oddity(f"a label file without `{key}`", editing(lambda content, key=key: content.pop(key) and None))
    unknown = {"type": "instances", "extra": NAN, "videos": None}
    yield _oddity("keys that nobody knows", editing(lambda content: content.update(unknown)))
    known = editing(
        lambda content: first_annotation(content).update(attributes={"bbox": None}, score=0.5, keypoints=[1, 2, 2])
    )
    yield _oddity("an annotation with keys that nobody knows", known)
    yield _oddity("`annotations` before `images`", editing(lambda content: dict(reversed(content.items()))))
    for key in ("images", "annotations", "categories"):
        for value in (MISSING, None, {}, "x"):
            said = "missing" if value is MISSING else _shown(value)
            yield _oddity(f"`{key}` is {said}", editing(with_list(key, value)), doctor=broken)
        for value in (None, 5, []):
            put = editing(lambda content, key=key, value=value: add(content[key], value))
            yield _oddity(f"{_shown(value)} in the list `{key}`", put, doctor="error malformed-entries")
    yield _oddity("a list at the top level", editing(lambda content: [content]), doctor=broken)
    none = _oddity("`annotations` is `[]`", editing(with_list("annotations", [])), doctor="error no-boxes")
    yield replace(none, unread=("proposals", "pretrain-box", "finetune --evaluate-every", "evaluate", "split"))
    yield _oddity("`images` is `[]`", editing(with_list("images", [])), doctor="error unknown-image-ids")
    yield _oddity("`categories` is `[]`", editing(with_list("categories", [])), doctor="error unknown-category-ids")


COCO: tuple[Oddity, ...] = (
    *of_topic("files", _files()),
    *of_topic("images", _images()),
    *of_topic("sizes", _sizes()),
    *of_topic("ids", _ids()),
    *of_topic("categories", _categories()),
    *of_topic("boxes", _boxes()),
    *of_topic("areas and flags", _flags()),
    *of_topic("masks", _segmentations(), "mask-rcnn"),
)
