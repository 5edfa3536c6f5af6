"""VOC in other folders: Kaggle's `images/` and `annotations/`, or XML files beside the images (Roboflow, labelImg)."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from aligndet_cli.data.format import ALL, DataFormat
from aligndet_cli.data.listing import has_image_of, subfolders
from aligndet_cli.data.splits import split_folders, split_meaning
from aligndet_cli.data.voc import VocSplit, VocYear, annotated_stems, listed_splits, parse_xml
from aligndet_cli.errors import DataError

_IMAGES = ("JPEGImages", "images", "image", "imgs", "img", "data")  # in any case
_ANNOTATIONS = ("Annotations", "annotation", "annots", "labels", "xmls", "xml")
_MOST_LOOKED_AT = 20


def find_loose_voc_splits(root: Path) -> dict[str, VocSplit]:
    """Return the splits by the lists of a data set, else by its subfolders, else `all`; nothing if it is no VOC."""
    if not root.is_dir():
        return {}
    years = [year for year in _possible_years(root) if _holds_annotated_images(year)]
    if len(years) != 1:
        return {}
    names = listed_splits(years)
    if not names:
        folders = {stem.split("/", 1)[0] if "/" in stem else "" for stem in annotated_stems(years[0])}
        names = sorted(folders) if all(map(split_meaning, folders)) else [ALL]
    return {name: VocSplit(root, name, (years[0],)) for name in names}


LOOSE_VOC = DataFormat("voc", "VOC's .xml files beside their images", find_loose_voc_splits)


def _possible_years(root: Path) -> Iterator[VocYear]:
    folders = {child.name.lower(): child.name for child in subfolders(root)}
    images = [folders[name.lower()] for name in _IMAGES if name.lower() in folders]
    annotations = [folders[name.lower()] for name in _ANNOTATIONS if name.lower() in folders]
    annotations += [f"{name}/xmls" for name in annotations if (root / name / "xmls").is_dir()]
    for pair in itertools.product(images, annotations):
        yield VocYear.of(root, *pair)
    yield VocYear.of(root, "", "")
    for name in images:
        yield VocYear.of(root, name, name)


def _holds_annotated_images(year: VocYear) -> bool:
    """Return True if one of the first XML files is an annotation, and has an image of its name."""
    for folder in (year.annotations, *split_folders(year.annotations)):
        for file in itertools.islice(folder.glob("*.xml"), _MOST_LOOKED_AT):
            image = year.images / file.relative_to(year.annotations)
            if has_image_of(image) and _is_annotation(file):
                return True
    return False


def _is_annotation(file: Path) -> bool:
    try:
        return parse_xml(file.read_bytes(), file).tag == "annotation"
    except (DataError, OSError):
        return False
