"""Edits of label files that once gave a traceback or two answers."""

from helpers.mutations import ByteEdit, Edit, Encode, FileEdit, JsonEdit, WordEdit, XmlEdit

_INSTANCES = "annotations/instances_train.json"


def _replaced(*path: int | str, by: object) -> list[Edit]:
    return [JsonEdit(_INSTANCES, path, "replace", by)]


EXAMPLES: dict[str, list[list[Edit]]] = {
    "coco": [
        _replaced("images", 0, "height", by=10**400),
        _replaced("annotations", 1, "area", by=10**400),
        _replaced("annotations", 3, "bbox", 0, by=10**400),
        _replaced("annotations", 1, "iscrowd", by=-1),
        _replaced("annotations", 4, "iscrowd", by=2),
        _replaced("annotations", 2, "iscrowd", by=0.5),
        _replaced("images", 0, "file_name", by="\ud800"),
        _replaced("images", 0, "file_name", by="\n"),
        _replaced("categories", 1, "name", by="\ud800"),
        _replaced("annotations", 4, "segmentation", 0, 7, by=10**400),
        _replaced("annotations", 2, "segmentation", "counts", 0, by=float("-inf")),
        _replaced("annotations", 1, "segmentation", "size", by="\n"),
        _replaced("annotations", 1, "bbox", 1, by=1e308),
        _replaced("annotations", 4, "area", by=1e308),
        _replaced("annotations", 0, "bbox", 1, by=1e154),
        _replaced("images", 0, "file_name", by="@long"),
    ],
    "voc": [
        [XmlEdit("Annotations/a.xml", (3, 2, 1), "text", "-1e40")],
        [XmlEdit("Annotations/a.xml", (2, 2, 0), "text", "@digits")],
        [FileEdit("Annotations/a.xml", "folder")],
        [WordEdit("ImageSets/Main/train.txt", 1, 1, "replace", "@long")],
        [FileEdit("ImageSets/Main/train.txt", "folder")],
        [Encode("ImageSets/Main/train.txt", "utf-8", b"\0")],
        [WordEdit("ImageSets/Main/val.txt", 0, None, "insert", "@digits")],
        [Encode("Annotations/sub/c.xml", "utf-8", b"\n", "punycode")],
        [Encode("Annotations/sub/c.xml", "utf-8", b"", "undefined")],
    ],
    "yolo": [
        [ByteEdit("list.txt", "insert", 0, b"\0")],
        [ByteEdit("list.txt", "insert", 0, b"\xe0")],
        [WordEdit("labels/a.txt", 0, 1, "replace", "1e200")],
        [WordEdit("labels/a.txt", 1, 2, "replace", "1e308")],
        [WordEdit("labels/sub/c.txt", 0, 3, "replace", "1e308")],
        [ByteEdit("list.txt", "insert", 250, b"\xe0")],
        [WordEdit("list.txt", 1, 0, "insert", "@long")],
        [WordEdit("list.txt", 0, None, "insert", "//a.png")],
        [WordEdit("data.yaml", 0, 1, "replace", "9" * 400)],
        [WordEdit("data.yaml", 1, 1, "replace", "@digits")],
    ],
}

# Several edits of COCO that together ask for much memory.
HUGE: dict[str, list[Edit]] = {
    "a side of 2**31 - 1 and a corner of 1e9": [
        *_replaced("images", 0, "height", by=2**31 - 1),
        *_replaced("annotations", 0, "segmentation", 0, 4, by=1e9),
    ],
    "runs of more than 32 bits": [
        *_replaced("images", 0, "height", by=10**9),
        *_replaced("images", 0, "width", by=10**9),
        *_replaced("annotations", 0, "segmentation", by={"size": [10**9, 10**9], "counts": [10**18 - 5, 5]}),
    ],
    "a code that is a large number": _replaced(
        "annotations", 1, "segmentation", by={"size": [12, 16], "counts": 2**31}
    ),
    "10,000 polygons": _replaced("annotations", 0, "segmentation", by=[[1, 1, 9, 1, 9, 9]] * 10_000),
    "a polygon of 30,000 corners": _replaced(
        "annotations", 0, "segmentation", by=[[-150, -150, 150, 9, 9, 150] * 10_000]
    ),
    "a compressed code of 200,000 letters": _replaced(
        "annotations", 0, "segmentation", by={"size": [12, 16], "counts": "0" * 200_000}
    ),
}
