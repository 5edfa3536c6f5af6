"""Every layout of every tool says the same as a clean one: layouts x names of images x forms of text."""

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.folds import SplitConfig, write_folds
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.errors import DataError
from helpers.data_sets import make_image, voc_xml

NAMES = ("a", "two words", "photo 1", "Käfer", "b.c", "x_jpg.rf.0a1b", "007", "deep/er/e")
BOX = (12, 8, 36, 24)  # xyxy in an image of 60 x 40
FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "with a byte-order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "with CRLF": lambda text: text.replace("\n", "\r\n").encode(),
}


@dataclass(frozen=True)
class Layout:
    """Places of the files of a tool; `{}` stands for the name of an image, SPLIT for that of a split.

    Attributes:
        labels: the label file of an image; for COCO, of a split.
        splits: names with a blank between them.
        written: for COCO, the name of an image in the json.
        others: other files with their text.
    """

    kind: str
    images: str
    labels: str
    splits: str = "all"
    written: str = "{}.jpg"
    others: Mapping[str, str] = field(default_factory=dict)

    def image(self, split: str, name: str) -> str:
        return self.images.replace("SPLIT", split).replace("{}", name)

    def label(self, split: str, name: str = "") -> str:
        return self.labels.replace("SPLIT", split).replace("{}", name)


def lines(pattern: str) -> str:
    return "\n".join(pattern.replace("{}", name) for name in NAMES)


NAMED = {"classes.txt": "cat\ndog\n"}
DARKNET = {"obj.names": "cat\ndog\n", "train.txt": lines("obj/{}.jpg")}
DARKNET_IN_DATA = {"data/obj.names": "cat\ndog\n", "data/train.txt": lines("data/obj/{}.jpg")}
CVAT = {"obj.names": "cat\ndog", "obj.data": "classes = 2\n", "train.txt": lines("data/obj_train_data/{}.jpg")}
MACOS = {"Annotations/._a.xml": "Mac OS X", "ImageSets/Main/._train.txt": "x", "ImageSets/Main/train.txt": lines("{}")}
LISTS = {"ImageSets/Main/Train.txt": lines("{}")}
LAYOUTS = {
    "mmdetection": Layout("coco", "SPLIT/{}.jpg", "annotations/SPLIT.json", "train val test"),
    "in images": Layout("coco", "images/SPLIT/{}.jpg", "annotations/SPLIT.json", "train valid"),
    "capital": Layout("coco", "images/SPLIT/{}.jpg", "Annotations/instances_SPLIT.json", "train val"),
    "labels": Layout("coco", "images/SPLIT/{}.jpg", "labels/SPLIT.json", "train val"),
    "years": Layout("coco", "SPLIT/{}.jpg", "annotations/SPLIT.json", "train2017"),
    "other spelling": Layout("coco", "validation/{}.jpg", "annotations/SPLIT.json", "val"),
    "one folder": Layout("coco", "images/{}.jpg", "SPLIT.json", "train"),
    "words": Layout("coco", "SPLIT/{}.jpg", "my_SPLIT-annotations.json", "train test"),
    "CVAT": Layout("coco", "images/SPLIT/{}.jpg", "annotations/instances_SPLIT.json", "Train Validation"),
    "FiftyOne": Layout("coco", "data/{}.jpg", "labels.json"),
    "FiftyOne by splits": Layout("coco", "SPLIT/data/{}.jpg", "SPLIT/labels.json", "train test"),
    "Label Studio": Layout("coco", "images/{}.jpg", "result.json", written="images/{}.jpg"),
    "Label Studio on Windows": Layout("coco", "images/{}.jpg", "result.json", written="images\\{}.jpg"),
    "labelme2coco": Layout("coco", "{}.jpg", "dataset.json"),
    "Roboflow": Layout("coco", "SPLIT/{}.jpg", "SPLIT/_annotations.coco.json", "train valid"),
    "a split of Roboflow": Layout("coco", "{}.jpg", "_annotations.coco.json", "data"),
    "an archive": Layout("coco", "archive/data/{}.jpg", "archive/labels.json", others={"__MACOSX/._archive": "x"}),
    "Kaggle": Layout("voc", "images/{}.jpg", "annotations/{}.xml"),
    "capitals": Layout("voc", "Images/{}.jpg", "Annotations/{}.xml"),
    "macOS": Layout("voc", "JPEGImages/{}.jpg", "Annotations/{}.xml", "train", others=MACOS),
    "short words": Layout("voc", "images/{}.jpg", "annots/{}.xml"),
    "pets": Layout("voc", "images/{}.jpg", "annotations/xmls/{}.xml"),
    "VOC in subfolders": Layout("voc", "images/SPLIT/{}.jpg", "annotations/SPLIT/{}.xml", "train val"),
    "VOC with lists": Layout("voc", "images/{}.jpg", "annotations/{}.xml", "Train", others=LISTS),
    "VOC of Roboflow": Layout("voc", "SPLIT/{}.jpg", "SPLIT/{}.xml", "train valid test"),
    "FiftyOne, VOC": Layout("voc", "data/{}.jpg", "labels/{}.xml"),
    "Label Studio, VOC": Layout("voc", "images/{}.jpg", "Annotations/{}.xml"),
    "labelImg, VOC": Layout("voc", "{}.jpg", "{}.xml"),
    "labelImg in images": Layout("voc", "images/{}.jpg", "images/{}.xml"),
    "an archive of VOC": Layout("voc", "archive/images/{}.jpg", "archive/annotations/{}.xml"),
    "YOLO": Layout("yolo", "images/{}.jpg", "labels/{}.txt", others=NAMED),
    "YOLO by splits": Layout("yolo", "images/SPLIT/{}.jpg", "labels/SPLIT/{}.txt", "train val", others=NAMED),
    "YOLO in splits": Layout("yolo", "SPLIT/images/{}.jpg", "SPLIT/labels/{}.txt", "train valid", others=NAMED),
    "YOLO beside in splits": Layout("yolo", "SPLIT/{}.jpg", "SPLIT/{}.txt", "train val", others=NAMED),
    "classes by labels": Layout("yolo", "images/{}.jpg", "labels/{}.txt", others={"labels/classes.txt": "cat\ndog"}),
    "labelImg, YOLO": Layout("yolo", "{}.jpg", "{}.txt", others=NAMED),
    "YOLO in images": Layout("yolo", "images/{}.jpg", "images/{}.txt", others={"images/classes.txt": "cat\ndog\n\n"}),
    "CVAT, YOLO 1.1": Layout("yolo", "obj_SPLIT_data/{}.jpg", "obj_SPLIT_data/{}.txt", "train", others=CVAT),
    "darknet in data": Layout("yolo", "data/obj/{}.jpg", "data/obj/{}.txt", "train", others=DARKNET_IN_DATA),
    "darknet": Layout("yolo", "obj/{}.jpg", "obj/{}.txt", "train", others=DARKNET),
}


def write(root: Path, layout: Layout, form: str) -> None:
    """Write eight images to each split, with one box of the class `dog`."""
    files = dict(layout.others)
    for split in layout.splits.split():
        for name in NAMES:
            make_image(root / layout.image(split, name))
            if layout.kind != "coco":
                label = voc_xml(("dog", (13, 9, 36, 24))) if layout.kind == "voc" else "1 .4 .4 .4 .4\n"
                files[layout.label(split, name)] = label
        if layout.kind == "coco":
            files[layout.label(split)] = json.dumps(coco_labels(layout.written), indent=1)
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(FORMS[form](text))


def coco_labels(written: str) -> dict[str, Any]:
    x1, y1, x2, y2 = BOX
    names = [written.replace("{}", name) for name in NAMES]
    return {
        "info": {"contributor": 'with "images": here'},
        "images": [{"id": 7 + n, "file_name": name, "height": 40, "width": 60} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": 7 + n, "category_id": 4, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for n in range(len(names))
        ],
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_the_same(tmp_path: Path, name: str, form: str) -> None:
    layout, root = LAYOUTS[name], tmp_path / "data"
    write(root, layout, form)
    found = locate_data(root)
    assert (found.format, sorted(found.splits)) == (layout.kind, sorted(layout.splits.split()))
    for split in found.splits:
        images = open_images(DataConfig(root=root, split=split), purpose="train")
        pictures = {(images.images_dir / file).relative_to(root).as_posix() for file in images.file_names}
        assert pictures == {layout.image(split, picture) for picture in NAMES}
        assert len(set(images.image_ids.tolist())) == len(NAMES) and images.problems == {}
        np.testing.assert_allclose(images.boxes, [BOX] * len(NAMES), atol=1e-4)
        assert {images.categories[class_id].name for class_id in images.class_ids} == {"dog"}
    report = check_data(DataConfig(root=root), num_threads=1)
    assert sorted(report.summary["splits"]) == sorted(layout.splits.split())
    assert report.count("error") == (len(found.splits) > 1)  # the same pictures are in all splits


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_can_be_split_into_folds_that_are_read(tmp_path: Path, name: str) -> None:
    layout, root = LAYOUTS[name], tmp_path / "data"
    write(root, layout, "plain")
    data = DataConfig(root=root, split=layout.splits.split()[0])
    (fold,) = write_folds(SplitConfig(data=data, output=tmp_path / "folds", fractions=[50], folds=[1]))
    named = DataConfig(root=root, annotations=fold.file, images=open_images(data, purpose="train").images_dir)
    images = open_images(named, purpose="train")
    assert (len(images), images.boxes.round(3).tolist()) == (4, [list(BOX)] * 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fault_in_the_labels_is_the_same_line_in_doctor_and_in_a_stage(tmp_path: Path, name: str) -> None:
    layout, root = LAYOUTS[name], tmp_path / "data"
    write(root, layout, "plain")
    split = layout.splits.split()[0]
    if layout.kind == "coco":
        (root / layout.image(split, "a")).unlink()
    else:
        (root / layout.label(split, "a")).write_text("1 .4 .4\n")
    with pytest.raises(DataError, match="not on disk|not valid XML|3 numbers") as raised:
        open_images(DataConfig(root=root, split=split), purpose="train")
    said = [item.message for item in check_data(DataConfig(root=root), num_threads=1).findings]
    assert any(str(raised.value) in message for message in said)


def test_pictures_in_other_folders_are_no_part_of_labels_beside_images(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["labelImg, VOC"], "plain")
    before = open_images(DataConfig(root=tmp_path), purpose="train")
    make_image(tmp_path / "0-workspace/finetune/plot.png")
    after = open_images(DataConfig(root=tmp_path), purpose="train")
    assert after.image_ids.tolist() == before.image_ids.tolist() and after.problems == {}
