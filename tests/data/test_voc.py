import codecs
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.data.splits import Purpose, choose_split
from aligndet_cli.data.voc import VOC_CLASSES
from aligndet_cli.errors import DataError
from helpers.data_sets import make_voc, voc_xml


def open_root(root: Path, purpose: Purpose = "train", split: str | None = None) -> ImageSet:
    return open_images(DataConfig(root=root, split=split), purpose=purpose)


def test_coordinates_are_one_based_and_inclusive(tmp_path: Path) -> None:
    labels = {
        "b": voc_xml(("cell", (1, 1, 60, 40)), ("cell", (11, 21, 12, 22))),
        "a": voc_xml(),
    }
    make_voc(tmp_path, labels, {"train": ["b", "a"]})
    images = open_root(tmp_path)
    # A box from pixel 1 to pixel W covers the image of 60x40; pixels 11 and 12 are two wide.
    assert images.record(0).boxes.tolist() == [[0, 0, 60, 40], [10, 20, 12, 22]]
    assert images.problems == {}
    assert images.file_names == ["b.jpg", "a.jpg"]  # order of the list
    assert images.image_ids.tolist() == [1, 0]  # position among all images, sorted
    assert images.sizes_hw.tolist() == [[40, 60]] * 2


def test_difficult_objects_become_crowds_and_a_missing_size_is_read_from_the_image(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": voc_xml(("cat", (1.5, 2, 400.25, 30)), difficult=1, size_hw=None)}, {"train": ["a"]})
    images = open_root(tmp_path)
    assert images.is_crowd.tolist() == [True]
    assert images.record(0).size_hw == (40, 60)  # that of the file
    assert images.boxes.tolist() == [[0.5, 1, 60, 30]]


def test_boxes_without_area_are_dropped(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": voc_xml(("x", (5, 5, 5, 9)), ("x", (5, 9, 8, 9)), ("x", (5, 5, 6, 6)))}, {"train": ["a"]})
    images = open_root(tmp_path)
    assert images.boxes.tolist() == [[4, 4, 6, 6]] and images.problems == {"degenerate boxes": 2}


def test_standard_classes_keep_their_order(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": voc_xml(("dog", (1, 1, 9, 9)), ("aeroplane", (1, 1, 9, 9)))}, {"train": ["a"]})
    images = open_root(tmp_path)
    assert tuple(category.name for category in images.categories) == VOC_CLASSES
    assert len(VOC_CLASSES) == 20 and VOC_CLASSES[11] == "dog"
    assert images.class_ids.tolist() == [11, 0]
    assert [category.category_id for category in images.categories] == list(range(1, 21))


def test_own_classes_agree_between_splits(tmp_path: Path) -> None:
    labels = {"a": voc_xml(("zebra", (1, 1, 9, 9))), "b": voc_xml(("ant", (1, 1, 9, 9)))}
    make_voc(tmp_path, labels, {"train": ["a"], "val": ["b"]})
    train, val = open_root(tmp_path), open_root(tmp_path, "val")
    assert train.categories == val.categories
    assert [category.name for category in train.categories] == ["ant", "zebra"]
    assert train.class_ids.tolist() == [1] and val.class_ids.tolist() == [0]


def test_devkit_joins_the_years(tmp_path: Path) -> None:
    box = voc_xml(("cat", (1, 1, 9, 9)))
    make_voc(tmp_path / "VOCdevkit/VOC2007", {"1": box, "2": box}, {"trainval": ["1"], "test": ["2"]})
    # 2012: its test list has no annotations, and lists per class are not splits.
    lists = {"trainval": ["1"], "test": ["9"], "cat_train": ["1 -1"]}
    make_voc(tmp_path / "VOCdevkit/VOC2012", {"1": box}, lists)
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        train, test = open_root(root), open_root(root, "val")
        assert train.file_names == ["VOC2007/JPEGImages/1.jpg", "VOC2012/JPEGImages/1.jpg"]
        assert train.image_ids.tolist() == [0, 2] and test.image_ids.tolist() == [1]
        assert (train.split, test.split, test.file_names) == ("trainval", "test", ["VOC2007/JPEGImages/2.jpg"])
    with pytest.raises(DataError, match="no split 'cat_train'; did you mean|no split 'cat_train'; known: test, trainv"):
        open_root(tmp_path, split="cat_train")


def test_class_lists_select_names_only(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": voc_xml(), "b": voc_xml()}, {"train": ["a.jpg  1", "", "b -1", "b -1"]})
    assert open_root(tmp_path).file_names == ["a.jpg", "b.jpg"]


def test_without_image_lists_everything_is_one_split(tmp_path: Path) -> None:
    make_voc(tmp_path, {"b": voc_xml(("x", (1, 1, 9, 9))), "a": voc_xml()}, {})
    images = open_root(tmp_path)
    assert (images.split, images.file_names) == ("all", ["a.jpg", "b.jpg"])
    with pytest.raises(DataError, match="no val split; known: all"):
        open_root(tmp_path, "val")


@pytest.mark.parametrize(
    ("known", "train", "val"),
    [
        (["test", "train", "trainval", "val"], "trainval", "test"),
        (["train", "trainval", "val"], "train", "val"),  # never trained on what is validated on
        (["train", "val"], "train", "val"),
        (["test", "train"], "train", "test"),
        (["test", "trainval"], "trainval", "test"),
    ],
)
def test_no_default_split_is_both_trained_and_validated_on(
    tmp_path: Path, known: list[str], train: str, val: str
) -> None:
    assert choose_split(tmp_path, known, None, "train") == train
    assert choose_split(tmp_path, known, None, "val") == val


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "a.xml: not valid XML"),
        ("", "a.xml: not valid XML"),
        ("<annotation><object><name>x</name></object></annotation>", "a.xml: object 1 has no bndbox"),
        (voc_xml(("", (1, 1, 2, 2))), "a.xml: object 1 has no name"),
        (voc_xml(("x", (1, 1, 2, 2))).replace("<xmax>2<", "<xmax>two<"), "a.xml: object 1 has no bndbox"),
        (voc_xml(("x", (1, 1, float("nan"), 2))), "box of image a.jpg is NaN"),
    ],
)
def test_bad_xml_is_an_error_naming_the_file(tmp_path: Path, text: str, message: str) -> None:
    make_voc(tmp_path, {"a": text}, {"train": ["a"]})
    with pytest.raises(DataError, match=message):
        open_root(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": voc_xml(), "b": voc_xml()}, {"train": ["a", "b"]})
    (tmp_path / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DataError, match=r"JPEGImages/b\.jpg: image listed"):
        open_root(tmp_path)
    (tmp_path / "Annotations/b.xml").unlink()
    with pytest.raises(DataError, match=r"Annotations/b\.xml: annotation file"):
        open_root(tmp_path)


def test_bccd_has_the_counts_of_its_readme(shared_data: Path) -> None:
    # Counts: table of shared/data/bccd/README.md, less the 2 boxes without area it lists.
    root = shared_data / "bccd" / "BCCD"
    train, test = open_root(root), open_root(root, "val")
    assert (train.split, len(train), len(train.boxes)) == ("trainval", 292, 3943 - 2)
    assert train.problems == {"degenerate boxes": 2}
    assert (test.split, len(test), len(test.boxes), test.problems) == ("test", 72, 945, {})
    assert [category.name for category in train.categories] == ["Platelets", "RBC", "WBC"]
    assert np.bincount(train.class_ids).tolist() == [292, 3350 - 2, 301]
    assert not set(train.image_ids.tolist()) & set(test.image_ids.tolist())
    # Some boxes start at pixel 1 and some end at the last one: both borders are reached, none is crossed.
    assert train.boxes.min() == 0 and train.boxes[:, 2].max() == 640 and train.boxes[:, 3].max() == 480
    # The folder around it, as an archive leaves it, is the same data set.
    assert open_root(root.parent).fingerprint == train.fingerprint


XML = voc_xml(("Käfer", (5, 5, 30, 20)))


def one_image(root: Path, name: str = "a", **changes: bytes) -> Path:
    """A VOC root of one image, of 60 x 40 pixels, with one box of the class `Käfer`."""
    make_voc(root, {name: XML}, {"train": [name]})
    for file, content in changes.items():
        (root / {"xml": f"Annotations/{name}.xml", "list": "ImageSets/Main/train.txt"}[file]).write_bytes(content)
    return root


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + XML.encode(),
        XML.encode("utf-16"),
        ('<?xml version="1.0" encoding="UTF-16"?>' + XML).encode("utf-16"),
        b'<?xml version="1.0" encoding="latin-1"?>\n' + XML.encode("latin-1"),
        b"<?xml version='1.0' encoding='gb18030' ?>" + XML.encode("gb18030"),
        codecs.BOM_UTF8 + b'<?xml version="1.0" encoding="utf-8"?>' + XML.encode(),
        XML.replace("><", ">\r\n<").encode(),
        XML.replace("<annotation>", '<annotation xmlns="http://example.org/voc">').encode(),
    ],
)
def test_annotations_in_other_encodings_say_the_same(tmp_path: Path, content: bytes) -> None:
    clean = open_images(DataConfig(root=one_image(tmp_path / "clean")), purpose="train")
    odd = open_images(DataConfig(root=one_image(tmp_path / "odd", xml=content)), purpose="train")
    assert [category.name for category in odd.categories] == ["Käfer"]
    assert (odd.boxes.tolist(), odd.sizes_hw.tolist()) == (clean.boxes.tolist(), clean.sizes_hw.tolist())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'<?xml version="1.0" encoding="no-such"?>' + XML.encode(), "unknown encoding 'no-such'; save it as UTF-8"),
        (XML.encode("latin-1"), "not UTF-8 text"),
        (b'<?xml version="1.0" encoding="ascii"?>' + XML.encode(), "not valid XML"),
    ],
)
def test_annotations_that_are_no_text_are_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=f"a.xml: .*{said}"):
        open_images(DataConfig(root=one_image(tmp_path, xml=content)), purpose="train")


@pytest.mark.parametrize("name", ["two words", "photo 1", "a.b", "deep/er/a", "deep/two words"])
@pytest.mark.parametrize("line", ["{}", "{}.jpg", "{}  1", "\ufeff{}\r"])
def test_lists_name_images_with_blanks_folders_and_a_second_column(tmp_path: Path, name: str, line: str) -> None:
    root = one_image(tmp_path, name, list=f"{line.format(name)}\n".encode())
    images = open_images(DataConfig(root=root, split="train"), purpose="train")
    assert (images.file_names, images.image_ids.tolist()) == ([f"{name}.jpg"], [0])


def test_images_in_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    names = ["b/1", "a/1", "a/2", "3"]
    make_voc(tmp_path, {name: voc_xml() for name in names}, {"train": names})
    images = open_images(DataConfig(root=tmp_path), purpose="train")
    assert dict(zip(images.file_names, images.image_ids.tolist(), strict=True)) == {
        "3.jpg": 0,
        "a/1.jpg": 1,
        "a/2.jpg": 2,
        "b/1.jpg": 3,
    }


def test_lists_of_one_class_are_no_splits_whatever_the_class(tmp_path: Path) -> None:
    make_voc(
        tmp_path,
        {"a": voc_xml(("rbc", (5, 5, 30, 20))), "b": voc_xml(("wbc", (5, 5, 30, 20)))},
        {"default": ["a", "b"]},
    )
    (tmp_path / "ImageSets/Main/rbc_default.txt").write_text("a  1\nb -1\n")
    (tmp_path / "ImageSets/Main/wbc_default.txt").write_text("a -1\nb  1\n")
    assert list(locate_data(tmp_path).splits) == ["default"]
    assert len(open_images(DataConfig(root=tmp_path), purpose="train")) == 2


@pytest.mark.parametrize("folder", ["", "cam0/"])
@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ({"train": "cat", "val": "dog"}, VOC_CLASSES),
        ({"train": "cat", "val": "zebra"}, ("cat", "zebra")),
        ({"train": "zebra", "val": "cat"}, ("cat", "zebra")),
        ({"train": "ant", "val": "zebra"}, ("ant", "zebra")),
        ({"train": "cat", "val": ""}, VOC_CLASSES),
        ({"train": "cat", "val": "dog", "unlisted": "ant"}, ("ant", "cat", "dog")),
        ({"train": "cat", "val": "dog", "unlisted": "Käfer"}, ("Käfer", "cat", "dog")),
        ({"train": "cat", "val": "a &amp; b"}, ("a & b", "cat")),
        ({"train": "cat", "val": "\n  zebra "}, ("cat", "zebra")),
    ],
)
def test_the_whole_set_decides_on_the_classes(
    tmp_path: Path, folder: str, names: dict[str, str], classes: tuple[str, ...]
) -> None:
    labels = {f"{folder}{split}": voc_xml((name, (1, 1, 9, 9))) if name else voc_xml() for split, name in names.items()}
    make_voc(tmp_path, labels, {split: [f"{folder}{split}"] for split in names if split != "unlisted"})
    train, val = open_root(tmp_path), open_root(tmp_path, "val")
    assert train.categories == val.categories and tuple(item.name for item in train.categories) == classes
    report = check_data(DataConfig(root=tmp_path), num_threads=1)
    assert "different-classes" not in {item.code for item in report.findings}


def test_the_parts_of_a_person_are_no_classes(tmp_path: Path) -> None:
    person = voc_xml(("person", (1, 1, 9, 9))).replace("</object>", "<part><name>head</name></part></object>")
    make_voc(tmp_path, {"a": voc_xml(("cat", (1, 1, 9, 9))), "b": person}, {"train": ["a"], "val": ["b"]})
    assert tuple(category.name for category in open_root(tmp_path).categories) == VOC_CLASSES


@pytest.mark.parametrize("subset", ["default", "train", "Train"])
@pytest.mark.parametrize("lines", ["a  1\nb -1\n", "a 1\n", "", "\n\ufeff"])
def test_lists_of_one_class_are_none_even_if_they_are_empty(tmp_path: Path, subset: str, lines: str) -> None:
    make_voc(tmp_path, {"a": voc_xml(("rbc", (5, 5, 30, 20))), "b": voc_xml()}, {subset: ["a", "b"]})
    (tmp_path / f"ImageSets/Main/rbc_{subset}.txt").write_text("a  1\nb -1\n")
    (tmp_path / f"ImageSets/Main/red wbc_{subset}.txt").write_text(lines)
    assert list(locate_data(tmp_path).splits) == [subset]
    assert len(open_root(tmp_path)) == 2


def test_images_that_no_list_and_no_annotation_names_are_counted(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": voc_xml(("x", (1, 1, 9, 9))), "b": voc_xml()}, {})
    (tmp_path / "Annotations/b.xml").unlink()
    images = open_root(tmp_path)
    assert (images.file_names, images.problems) == (["a.jpg"], {"images without annotations": 1})
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")  # a list says what belongs to a split
    assert open_root(tmp_path).problems == {}
