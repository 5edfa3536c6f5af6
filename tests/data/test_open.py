import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.layouts import FORMATS
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.errors import DataError
from helpers.data_sets import coco_content, make_coco, make_image, make_voc, make_yolo, voc_xml


def test_a_format_is_recognised_by_its_layout(tmp_path: Path) -> None:
    make_coco(tmp_path / "coco")
    make_voc(tmp_path / "voc", {"a": voc_xml()}, {"train": ["a"]})
    make_yolo(tmp_path / "yolo", {"train/a": ""})
    make_image(tmp_path / "folder/x/y.PNG")
    for name in ("coco", "voc", "yolo", "folder"):
        assert locate_data(tmp_path / name)[:2] == (tmp_path / name, name)
    assert locate_data(tmp_path / "yolo/data.yaml").format == "yolo"
    with pytest.raises(DataError, match=r"several data sets \(coco, voc, yolo\)"):
        locate_data(tmp_path)
    (tmp_path / "yolo/data.yaml").write_text("names: [a]\n")  # also where one of them is broken
    with pytest.raises(DataError, match=r"several data sets \(coco, voc, yolo\)"):
        locate_data(tmp_path)


def test_every_format_can_be_asked_for() -> None:
    asked = get_args(DataConfig.model_fields["format"].annotation)
    assert asked == ("auto", *(known.name for known in FORMATS), "folder")


def test_nothing_to_read_is_an_error_naming_the_place(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").touch()
    file = make_coco(tmp_path / "coco")
    cases = {
        tmp_path / "no": "no such file or folder",
        tmp_path / "empty": "no images found",
        file: "use --annotations FILE --images DIR",
    }
    for root, message in cases.items():
        with pytest.raises(DataError, match=message) as error:
            open_images(DataConfig(root=root), purpose="train")
        assert str(root) in str(error.value)
    with pytest.raises(DataError, match="no voc data set"):
        open_images(DataConfig(root=tmp_path / "coco", format="voc"), purpose="train")
    with pytest.raises(DataError, match="no data set given"):
        open_images(DataConfig(), purpose="train")
    with pytest.raises(DataError, match="no images found"):
        open_images(DataConfig(root=tmp_path / "empty", format="folder"), purpose="train")


def test_coco_splits_are_found_by_purpose_or_name(tmp_path: Path) -> None:
    for split in ("train2017", "val2017", "minival"):
        make_coco(tmp_path, split=split)
    assert open_images(DataConfig(root=tmp_path), purpose="train").split == "train2017"
    assert open_images(DataConfig(root=tmp_path), purpose="val").split == "val2017"
    assert open_images(DataConfig(root=tmp_path, split="train"), purpose="val").split == "train2017"
    assert open_images(DataConfig(root=tmp_path, split="minival"), purpose="train").split == "minival"
    with pytest.raises(DataError, match="no split 'mini-val'; did you mean 'minival'"):
        open_images(DataConfig(root=tmp_path, split="mini-val"), purpose="train")


def test_a_single_split_with_its_own_name_is_trained_on(tmp_path: Path) -> None:
    make_coco(tmp_path, split="default")
    assert open_images(DataConfig(root=tmp_path), purpose="train").split == "default"
    with pytest.raises(DataError, match="no val split; known: default"):
        open_images(DataConfig(root=tmp_path), purpose="val")


def test_images_beside_coco_splits_are_a_split_without_labels(tmp_path: Path) -> None:
    make_coco(tmp_path)
    make_image(tmp_path / "unlabeled2017/u.jpg")
    images = open_images(DataConfig(root=tmp_path, split="unlabeled2017"), purpose="train")
    assert (images.format, images.split, images.file_names, images.has_labels) == (
        "folder",
        "unlabeled2017",
        ["u.jpg"],
        False,
    )
    with pytest.raises(DataError, match="no split 'unlabeled2017'"):
        open_images(DataConfig(root=tmp_path, split="unlabeled2017", format="coco"), purpose="train")


def test_plain_folder_is_recursive_and_sorted(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/z.png", "a/B.JPG", ".hidden/x.jpg", "._b.jpg"):
        make_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.png").rename(tmp_path / name)
    (tmp_path / "readme.md").touch()
    images = open_images(DataConfig(root=tmp_path), purpose="train")
    assert images.file_names == ["a/B.JPG", "a/z.png", "b.jpg"]
    assert images.image_ids.tolist() == [0, 1, 2] and images.split == "all"
    assert not images.has_labels and images.record(0).size_hw is None and images.boxes.shape == (0, 4)
    assert open_images(DataConfig(root=tmp_path, split="a"), purpose="train").file_names == ["B.JPG", "z.png"]
    with pytest.raises(DataError, match="no split '../x'"):
        open_images(DataConfig(root=tmp_path, split="../x"), purpose="train")


def test_annotations_and_images_may_be_named(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "made")
    labels = tmp_path / "my labels (v2).json"
    shutil.move(file, labels)
    shutil.move(tmp_path / "made/train2017", tmp_path / "pictures")
    explicit = DataConfig(annotations=labels, images=tmp_path / "pictures")
    images = open_images(explicit, purpose="train")
    assert (images.format, len(images), images.annotations) == ("coco", 3, labels)
    assert images.split == "my-labels-v2-"  # a name that a folder can have
    assert open_images(DataConfig(images=tmp_path / "pictures"), purpose="train").format == "folder"
    with pytest.raises(DataError, match="check --images"):
        open_images(DataConfig(annotations=labels, images=tmp_path / "no"), purpose="train")
    with pytest.raises(DataError, match="no such file; check --annotations"):
        open_images(DataConfig(annotations=tmp_path / "no.json", images=tmp_path / "pictures"), purpose="train")


def test_annotations_alone_find_their_images(tmp_path: Path) -> None:
    file = make_coco(tmp_path)
    images = open_images(DataConfig(annotations=file), purpose="train")
    assert (images.images_dir, images.split) == (tmp_path / "train2017", "train2017")


def test_limit_takes_the_first_images(tmp_path: Path) -> None:
    make_coco(tmp_path)
    images = open_images(DataConfig(root=tmp_path, limit=2), purpose="train")
    assert images.file_names == ["c.jpg", "a.jpg"] and images.offsets.tolist() == [0, 2, 2]
    assert len(open_images(DataConfig(root=tmp_path, limit=99), purpose="train")) == 3


def test_the_fingerprint_follows_the_data_not_its_place(tmp_path: Path) -> None:
    make_coco(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def fingerprint(root: Path, limit: int | None = None) -> str:
        return open_images(DataConfig(root=root, limit=limit), purpose="train").fingerprint

    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    moved = DataConfig(
        annotations=tmp_path / "two/annotations/instances_train2017.json", images=tmp_path / "two/train2017"
    )
    assert open_images(moved, purpose="train").fingerprint == first
    assert fingerprint(tmp_path / "one", limit=3) != first
    content = coco_content()
    content["annotations"][0]["bbox"][0] += 1
    make_coco(tmp_path / "two", content)
    assert fingerprint(tmp_path / "two") != first
    make_image(tmp_path / "one/train2017/a.jpg", (80, 90))
    assert fingerprint(tmp_path / "one") != first


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_the_fingerprint_covers_labels(tmp_path: Path, kind: str) -> None:
    if kind == "voc":
        make_voc(tmp_path, {"a": voc_xml(("x", (1, 1, 9, 9)))}, {"train": ["a"]})
        file, old, new = tmp_path / "Annotations/a.xml", "<xmax>9<", "<xmax>8<"
    else:
        make_yolo(tmp_path, {"train/a": "0 .5 .5 .1 .1"})
        file, old, new = tmp_path / "labels/train/a.txt", "0 .5", "1 .5"
    before = open_images(DataConfig(root=tmp_path), purpose="train").fingerprint
    file.write_text(file.read_text().replace(old, new))
    assert open_images(DataConfig(root=tmp_path), purpose="train").fingerprint != before


def test_importing_the_readers_does_not_import_torch() -> None:
    modules = "open, doctor, toy, images, coco, voc, yolo, folder".replace(", ", ", aligndet_cli.data.")
    code = f"import sys, aligndet_cli.data.{modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
