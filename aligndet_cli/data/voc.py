"""Pascal VOC: `JPEGImages/ Annotations/ ImageSets/Main/`, alone or as years of a `VOCdevkit`.

Coordinates in the files are 1-based pixel indices with both ends inside the box. They become 0-based edges:
xmin - 1, ymin - 1, xmax, ymax, so that a box from 1 to W covers the whole image (detectron2 does the same,
mmdetection subtracts 1 from all four). A box whose ends coincide in the file counts as a box without area.
"""

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aligndet_cli.data.boxes import BoxRow, box_table
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.format import ALL, DataFormat, Labels
from aligndet_cli.data.images import is_image_file
from aligndet_cli.data.listing import list_images
from aligndet_cli.data.text import decode_text, read_lines
from aligndet_cli.errors import DataError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


_PRESENCE = re.compile(r"\s+(?:-1|0|1)$")  # the second column of VOC's per-class lists
_ENCODING = re.compile(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*encoding\s*=\s*["'](?P<name>[\w.:-]+)["'][^>]*\?>""")


@dataclass(frozen=True)
class VocObject:
    """One labelled object; `box` is xyxy in pixels, 0-based as explained at the top of this file."""

    name: str
    box: tuple[float, float, float, float]
    is_difficult: bool


@dataclass(frozen=True)
class VocAnnotation:
    """Content of one XML file; `size_hw` is (0, 0) where the file does not tell."""

    size_hw: tuple[int, int]
    objects: list[VocObject]


@dataclass(frozen=True)
class VocSplit:
    """One split of all years together; each year is a folder with `JPEGImages/` and `Annotations/`."""

    root: Path
    name: str
    years: tuple[Path, ...]

    def read(self, findings: Findings, *, with_masks: bool, index_dir: Path | None) -> Labels:
        """See `SplitSource`. `difficult` becomes `is_crowd`.

        Classes are VOC's 20 if no other occurs, else all names found in the whole data set, sorted; category ids
        count from 1. Image ids are positions in the sorted list of all images, whatever their split.
        """
        images_dir, prefixes = _image_base(self.years)
        all_images = {
            prefix + stem: prefix + name
            for prefix, year in prefixes
            for stem, name in _images_of(year, findings).items()
        }
        positions = {key: index for index, key in enumerate(sorted(all_images, key=all_images.__getitem__))}
        annotations: dict[str, VocAnnotation] = {}
        digest = hashlib.sha256()
        used: set[Path] = set()
        for prefix, year in prefixes:
            for stem in _listed(year, self.name):
                file = year / "Annotations" / f"{stem}.xml"
                used.add(file)
                annotation = _read(file, findings, digest)
                if annotation is not None:
                    annotations[prefix + stem] = annotation
        names = {item.name for annotation in annotations.values() for item in annotation.objects}
        categories = _categories(names, self.years, used, findings)
        class_ids = {category.name: class_id for class_id, category in enumerate(categories)}
        return Labels(
            format="voc",
            root=self.root,
            split=self.name,
            images_dir=images_dir,
            # A listed image that is not on disk keeps a place and a likely name, so that it is reported as missing.
            file_names=[all_images.get(key, f"{key}.jpg") for key in annotations],
            image_ids=np.array([positions.get(key, -1) for key in annotations], dtype=np.int64),
            sizes_hw=np.array([annotation.size_hw for annotation in annotations.values()], dtype=np.int32).reshape(
                -1, 2
            ),
            table=box_table(
                [
                    BoxRow(index, item.box, class_ids[item.name], item.is_difficult)
                    for index, annotation in enumerate(annotations.values())
                    for item in annotation.objects
                ]
            ),
            categories=categories,
            label_digest=digest.hexdigest(),
        )


def find_voc_splits(root: Path) -> dict[str, VocSplit]:
    """Return the image lists of any year whose images are annotated, by name; `all` stands for a root without lists."""
    years = tuple(_find_years(root))
    names = {file.stem for year in years for file in _lists(year) if _is_annotated(year, file)}
    return {name: VocSplit(root, name, years) for name in sorted(names) or [ALL]} if years else {}


VOC = DataFormat("voc", "JPEGImages/ + Annotations/ (VOC)", find_voc_splits)


def _find_years(root: Path) -> list[Path]:
    """Return the folders with `JPEGImages/` and `Annotations/`: the root itself, or the years of a devkit."""
    candidates = [[root], sorted(root.glob("VOC[0-9]*")), sorted(root.glob("VOCdevkit/VOC[0-9]*"))]
    for folders in candidates:
        found = [year for year in folders if (year / "JPEGImages").is_dir() and (year / "Annotations").is_dir()]
        if found:
            return found
    return []


def parse_voc_annotation(content: bytes, file: Path) -> VocAnnotation:
    """Parse the content of an annotation file.

    Raises:
        DataError: not XML, or an object without name or box.
    """
    tree = _parse_xml(content, file)
    size = [_number(tree, f"size/{key}") for key in ("height", "width")]
    height, width = (int(value) if value is not None and 0 < value < 2**31 else 0 for value in size)
    objects = [_parse_object(element, number, file) for number, element in enumerate(tree.iter("object"), start=1)]
    return VocAnnotation((height, width) if height and width else (0, 0), objects)


def _parse_xml(content: bytes, file: Path) -> ElementTree.Element:
    """Return the root of an XML file in any encoding that Python knows, with namespaces left out."""
    declared = _ENCODING.match(content)
    try:
        if declared:  # the parser itself knows few encodings: not GB2312, for example
            text = content[declared.end() :].decode(declared["name"].decode("ascii"))
        else:
            text = decode_text(content, file)
        tree = ElementTree.fromstring(text)
    except LookupError:
        name = declared["name"].decode("ascii") if declared else ""
        raise DataError(f"{file}: is in an unknown encoding '{name}'; save it as UTF-8") from None
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid XML ({error}); repair or remove it") from None
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
    return tree


def _parse_object(element: ElementTree.Element, number: int, file: Path) -> VocObject:
    name = (element.findtext("name") or "").strip()
    ends = [_number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = (float("nan") if end is None else end for end in ends)
    if not name or None in ends:
        missing = "name" if not name else "bndbox with four numbers"
        raise DataError(f"{file}: object {number} has no {missing}; repair or remove it")
    has_extent = not (x2 <= x1 or y2 <= y1)  # a comparison that lets NaN pass, to be reported later
    box = (x1 - 1, y1 - 1, x2, y2) if has_extent else (x1, y1, x1, y1)
    return VocObject(name, box, is_difficult=_number(element, "difficult") == 1)


def _number(element: ElementTree.Element, path: str) -> float | None:
    try:
        return float(element.findtext(path) or "")
    except ValueError:
        return None


def _read(file: Path, findings: Findings, digest: "hashlib._Hash | None" = None) -> VocAnnotation | None:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        message = f"{file}: annotation file of a listed image is missing; complete the data or shorten the list"
        findings.error("missing-annotations", message, example=str(file))
        return None
    try:
        annotation = parse_voc_annotation(content, file)
    except DataError as error:
        findings.error("bad-annotations", str(error), example=str(file))
        return None
    if digest is not None:
        digest.update(f"{file.name}\0{len(content)}\n".encode() + content)
    return annotation


def _lists(year: Path) -> list[Path]:
    """Return the image lists of a year, without lists of one class (`cat_train.txt`), which have a second column."""
    files = sorted((year / "ImageSets" / "Main").glob("*.txt"))
    candidates = [file for file in files if "_" in file.stem]
    names = set(_annotated(year)) if candidates else set()
    return [file for file in files if file not in candidates or not _is_of_a_class(file, names)]


def _is_of_a_class(file: Path, names: set[str]) -> bool:
    """Return True if all lines have a second column and none is among the `names` of annotated images as a whole."""
    lines = read_lines(file)
    return bool(lines) and all(_PRESENCE.search(line) and line not in names for line in lines)


def _annotated(year: Path) -> list[str]:
    """Return the names of the annotated images of a year, sorted."""
    folder = year / "Annotations"
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.xml"))


def _is_annotated(year: Path, file: Path) -> bool:
    """Return True if one of the first images of a list is annotated: VOC2012 lists a test split without labels."""
    stems = _stems(file)
    return not stems or any((year / "Annotations" / f"{stem}.xml").is_file() for stem in stems[:20])


def _stems(file: Path) -> list[str]:
    """Return the names of a list of images. They may have blanks, a folder, a suffix, and a second column."""
    names = [line if _is_name(line, file) else _PRESENCE.sub("", line) for line in read_lines(file)]
    return [name.rsplit(".", 1)[0] if is_image_file(name) else name for name in names]


def _is_name(line: str, file: Path) -> bool:
    """Return True if a line of a list is a name only, with no second column after it."""
    return not _PRESENCE.search(line) or (file.parents[2] / "Annotations" / f"{line}.xml").is_file()


def _listed(year: Path, split: str) -> list[str]:
    if split == ALL and not _lists(year):
        return _annotated(year)
    file = year / "ImageSets" / "Main" / f"{split}.txt"
    return list(dict.fromkeys(_stems(file))) if file.is_file() and _is_annotated(year, file) else []


def _image_base(years: Sequence[Path]) -> tuple[Path, list[tuple[str, Path]]]:
    """Return the folder that file names are relative to, and for each year the prefix of its file names."""
    if len(years) == 1:
        return years[0] / "JPEGImages", [("", years[0])]
    return years[0].parent, [(f"{year.name}/JPEGImages/", year) for year in years]


def _images_of(year: Path, findings: Findings) -> dict[str, str]:
    """Return the files of the images of a year, by name without suffix; both may have folders (CVAT's tasks do).

    Of several files of one name the JPEG counts, else the first.
    """
    names = sorted(list_images(year / "JPEGImages", findings), reverse=True)
    names.sort(key=lambda name: name.lower().endswith((".jpg", ".jpeg")))
    return {name.rsplit(".", 1)[0]: name for name in names}


def _categories(names: set[str], years: Sequence[Path], used: set[Path], findings: Findings) -> tuple[Category, ...]:
    if not names <= set(VOC_CLASSES):
        # The data set has its own classes: collect them from every split, so that class ids agree between splits.
        for year in years:
            for file in sorted(set((year / "Annotations").glob("*.xml")) - used):
                annotation = _read(file, findings)
                names = names | {item.name for item in annotation.objects} if annotation else names
    classes: Iterable[str] = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    return tuple(Category(number, name) for number, name in enumerate(classes, start=1))
