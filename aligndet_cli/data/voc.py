"""Pascal VOC: `JPEGImages/ Annotations/ ImageSets/Main/`, alone or as years of a `VOCdevkit`.

Coordinates in the files are 1-based pixel indices with both ends inside the box. They become 0-based edges:
xmin - 1, ymin - 1, xmax, ymax, so that a box from 1 to W covers the whole image (detectron2 does the same,
mmdetection subtracts 1 from all four). A box whose ends coincide in the file counts as a box without area.
"""

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aligndet_cli.data.boxes import BoxRow, box_table
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.format import ALL, DataFormat, Labels
from aligndet_cli.data.images import is_image_file
from aligndet_cli.data.listing import is_file, list_images
from aligndet_cli.data.text import decode_text, read_lines
from aligndet_cli.errors import DataError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


_OF_BOTH = re.compile(r"^.+?\.\w+\s+(?:.*/)?Annotations/(.+)\.xml$")
_PRESENCE = re.compile(r"\s+(?:-1|0|1)$")  # the second column of VOC's per-class lists
_NAME = re.compile(rb"<name>([^<]*)</name>")
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
class VocYear:
    """A year of the devkit, or a whole data set: folders of images and annotations, with or without subfolders.

    Attributes:
        lists: the folder of the lists of images, which need not exist.
    """

    images: Path
    annotations: Path
    lists: Path

    @classmethod
    def of(cls, folder: Path, images: str = "JPEGImages", annotations: str = "Annotations") -> "VocYear":
        """Return the parts of a folder by their names."""
        sets = folder / "ImageSets"
        places = [place for place in (sets / "Main", sets, sets / "Segmentation") if any(place.glob("[!.]*.txt"))]
        return cls(folder / images, folder / annotations, (places or [sets / "Main"])[0])


@dataclass(frozen=True)
class VocSplit:
    """One split of all years together.

    A split without a list is the whole set (`all`), or the subfolder of its name.
    """

    root: Path
    name: str
    years: tuple[VocYear, ...]

    @property
    def is_listed(self) -> bool:
        """True if a list of images names this split."""
        return any((year.lists / f"{self.name}.txt").is_file() for year in self.years)

    def read(self, findings: Findings, *, with_masks: bool, index_dir: Path | None) -> Labels:
        """See `SplitSource`. `difficult` becomes `is_crowd`.

        Classes are VOC's 20 if the whole data set has no other, else all names found in it, sorted; category ids
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
        used: dict[Path, str] = {}
        for prefix, year in prefixes:
            for stem in _listed(year, self.name):
                file = year.annotations / f"{stem}.xml"
                used[file] = prefix + stem
                annotation = _read(file, findings, digest)
                if annotation is not None:
                    annotations[prefix + stem] = annotation
        if not self.is_listed:
            _report_left_out(self, all_images, set(used.values()), findings)
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
    return {name: VocSplit(root, name, years) for name in listed_splits(years) or [ALL]} if years else {}


def listed_splits(years: Sequence[VocYear]) -> list[str]:
    """Return the names of the lists of images that are annotated, sorted."""
    return sorted({file.stem for year in years for file in _lists(year) if _is_annotated(year, file)})


VOC = DataFormat("voc", "JPEGImages/ + Annotations/ (VOC)", find_voc_splits)


def _find_years(root: Path) -> list[VocYear]:
    """Return the folders with `JPEGImages/` and `Annotations/`: the root itself, or the years of a devkit."""
    candidates = [[root], sorted(root.glob("VOC[0-9]*")), sorted(root.glob("VOCdevkit/VOC[0-9]*"))]
    for folders in candidates:
        years = [VocYear.of(folder) for folder in folders]
        found = [year for year in years if year.images.is_dir() and year.annotations.is_dir()]
        if found:
            return found
    return []


def parse_voc_annotation(content: bytes, file: Path) -> VocAnnotation:
    """Parse the content of an annotation file.

    Raises:
        DataError: not XML of VOC, an object without name or box, or a size or flag of no certain meaning.
    """
    tree = parse_xml(content, file)
    if tree.tag != "annotation":
        raise DataError(f"{file}: begins with <{tree.tag[:40]}>, expected <annotation>; repair or remove it")
    height, width = (_side(tree, key, file) for key in ("height", "width"))
    objects = [_parse_object(element, number, file) for number, element in enumerate(tree.iter("object"), start=1)]
    return VocAnnotation((height, width) if height and width else (0, 0), objects)


def parse_xml(content: bytes, file: Path) -> ElementTree.Element:
    """Return the root of an XML file in any encoding that Python knows, with namespaces left out.

    Raises:
        DataError: not XML, or in an unknown encoding.
    """
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
    except (ElementTree.ParseError, UnicodeError) as error:
        raise DataError(f"{file}: not valid XML ({error}); repair or remove it") from None
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]
    return tree


def _side(tree: ElementTree.Element, key: str, file: Path) -> int:
    """Return height or width of the image in pixels, 0 where the file does not tell."""
    text = (tree.findtext(f"size/{key}") or "").strip()
    side = _number(tree, f"size/{key}") if text else 0.0
    if side is None or not side.is_integer() or not 0 <= side < 2**31:
        raise DataError(f"{file}: {key} {text[:40]!r} is no number of pixels; correct or remove it")
    return int(side)


_FLAGS = {"": 0, "false": 0, "unspecified": 0, "true": 1}


def _is_difficult(element: ElementTree.Element, number: int, file: Path) -> bool:
    text = (element.findtext("difficult") or "").strip()
    flag = _FLAGS.get(text.lower(), _number(element, "difficult"))
    if flag not in (0, 1):
        message = f"{file}: object {number} has {text[:40]!r} for 'difficult', expected 0 or 1"
        raise DataError(f"{message}; correct or remove it")
    return flag == 1


def _parse_object(element: ElementTree.Element, number: int, file: Path) -> VocObject:
    name = (element.findtext("name") or "").strip()
    ends = [_number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = (float("nan") if end is None else end for end in ends)
    if not name or None in ends:
        missing = "name" if not name else "bndbox with four numbers"
        raise DataError(f"{file}: object {number} has no {missing}; repair or remove it")
    has_extent = not (x2 <= x1 or y2 <= y1)  # a comparison that lets NaN pass, to be reported later
    box = (x1 - 1, y1 - 1, x2, y2) if has_extent else (x1, y1, x1, y1)
    return VocObject(name, box, is_difficult=_is_difficult(element, number, file))


def _number(element: ElementTree.Element, path: str) -> float | None:
    try:
        return float(element.findtext(path) or "")
    except ValueError:
        return None


def _read(file: Path, findings: Findings, digest: "hashlib._Hash | None" = None) -> VocAnnotation | None:
    try:
        content = file.read_bytes()
    except (FileNotFoundError, ValueError):  # a ValueError: a name that no file can have
        message = f"{file}: annotation file of a listed image is missing; complete the data or shorten the list"
        findings.error("missing-annotations", message, example=str(file))
        return None
    except OSError as error:
        message = f"{file}: cannot be read ({error.strerror or error}); check its permissions"
        findings.error("bad-annotations", message, example=str(file))
        return None
    try:
        annotation = parse_voc_annotation(content, file)
    except DataError as error:
        findings.error("bad-annotations", str(error), example=str(file))
        return None
    if digest is not None:
        digest.update(f"{file.name}\0{len(content)}\n".encode() + content)
    return annotation


def _report_left_out(split: VocSplit, all_images: Mapping[str, str], annotated: set[str], findings: Findings) -> None:
    """Warn of images of a split without a list that have no annotations; images are named without suffix."""
    start = "" if split.name == ALL else f"{split.name}/"
    left_out = [name for stem, name in all_images.items() if stem.startswith(start) and stem not in annotated]
    if left_out:
        what = counted(len(left_out), "image without an .xml file is", "images without an .xml file are")
        message = f"{what} left out, first {left_out[0]}"
        findings.warn("images-without-annotations", message, count=len(left_out), example=left_out[0])


def _lists(year: VocYear) -> list[Path]:
    """Return the image lists of a year, without lists of one class (`cat_train.txt`), which have a second column."""
    files = sorted(file for file in year.lists.glob("*.txt") if not file.name.startswith(".") and file.is_file())
    candidates = [file for file in files if "_" in file.stem]
    names = set(annotated_stems(year)) if candidates else set()
    whole = [file.stem for file in files if file not in candidates]
    return [file for file in files if file not in candidates or not _is_of_a_class(file, names, whole)]


def _is_of_a_class(file: Path, names: set[str], whole: Sequence[str]) -> bool:
    """Return True if all lines have a second column and none is among the `names` of annotated images as a whole.

    An empty list is one of a class if it is named after one of the `whole` lists.
    """
    lines = read_lines(file)
    if not lines:
        return any(file.stem.endswith(f"_{name}") for name in whole)
    return all(_PRESENCE.search(line) and line not in names for line in lines)


def annotated_stems(year: VocYear) -> list[str]:
    """Return the names of the annotated images of a year, with their subfolders, sorted."""
    folder = year.annotations
    files = (file for file in folder.rglob("*.xml") if not file.name.startswith(".") and file.is_file())
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


def _is_annotated(year: VocYear, file: Path) -> bool:
    """Return True if one of the first images of a list is annotated: VOC2012 lists a test split without labels."""
    stems = _stems(year, file)
    return not stems or any(is_file(year.annotations / f"{stem}.xml") for stem in stems[:20])


def _stems(year: VocYear, file: Path) -> list[str]:
    """Return the names of a list of images. They may have blanks, a folder, a suffix, and a second column.

    Lines of PaddleDetection, `JPEGImages/a.jpg Annotations/a.xml`, name the image by its annotation.
    """
    lines = [_OF_BOTH.sub(lambda found: found[1], line) for line in read_lines(file)]
    names = [line if _is_name(year, line) else _PRESENCE.sub("", line) for line in lines]
    return [name.rsplit(".", 1)[0] if is_image_file(name) else name for name in names]


def _is_name(year: VocYear, line: str) -> bool:
    """Return True if a line of a list is a name only, with no second column after it."""
    return not _PRESENCE.search(line) or is_file(year.annotations / f"{line}.xml")


def _listed(year: VocYear, split: str) -> list[str]:
    """Return the names of the images of a split: from its list, else those of the whole year or of a subfolder."""
    file = year.lists / f"{split}.txt"
    if file.is_file():
        return list(dict.fromkeys(_stems(year, file))) if _is_annotated(year, file) else []
    if split == ALL:
        return [] if _lists(year) else annotated_stems(year)
    if any(year.lists.glob("*.txt")):
        return []
    return [stem for stem in annotated_stems(year) if stem.startswith(f"{split}/")]


def _image_base(years: Sequence[VocYear]) -> tuple[Path, list[tuple[str, VocYear]]]:
    """Return the folder that file names are relative to, and for each year the prefix of its file names."""
    if len(years) == 1:
        return years[0].images, [("", years[0])]
    base = years[0].images.parents[1]
    return base, [(f"{year.images.relative_to(base).as_posix()}/", year) for year in years]


def _images_of(year: VocYear, findings: Findings) -> dict[str, str]:
    """Return the files of the images of a year, by name without suffix; both may have folders (CVAT's tasks do).

    Of several files of one name the JPEG counts, else the first.
    """
    names = sorted(list_images(year.images, findings), reverse=True)
    names.sort(key=lambda name: name.lower().endswith((".jpg", ".jpeg")))
    if year.images == year.annotations:  # other folders there may be anything, such as a workspace
        folders = {stem.rpartition("/")[0] for stem in annotated_stems(year)}
        names = [name for name in names if name.rpartition("/")[0] in folders]
    return {name.rsplit(".", 1)[0]: name for name in names}


def _categories(
    names: set[str], years: Sequence[VocYear], used: Collection[Path], findings: Findings
) -> tuple[Category, ...]:
    """Return the classes of the whole data set, so that class ids agree between splits."""
    known = {name.encode(): name for name in (*VOC_CLASSES, *names)}
    found = set(names)
    for year in years:
        for stem in annotated_stems(year):
            file = year.annotations / f"{stem}.xml"
            new = set() if file in used else _names_in(file, known, findings)
            known |= {name.encode(): name for name in new}
            found |= new
    classes: Iterable[str] = VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)
    return tuple(Category(number, name) for number, name in enumerate(classes, start=1))


def _names_in(file: Path, known: Mapping[bytes, str], findings: Findings) -> set[str]:
    """Return the class names in a file; one with `known` names only is not parsed, which takes most of the time."""
    written = set(_NAME.findall(file.read_bytes())) if file.is_file() else set()
    if written and written <= known.keys():
        return {known[name] for name in written}
    annotation = _read(file, findings)
    return {item.name for item in annotation.objects} if annotation else set()
