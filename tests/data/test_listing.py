"""Images below a folder are found once; what is left out is counted and said."""

import logging
import os
from pathlib import Path

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.folder import class_tree_splits, folder_classes
from aligndet_cli.data.images import UNREADABLE_SUFFIXES
from aligndet_cli.data.listing import distinct_subfolders, has_images, list_images
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import DataError
from helpers.data_sets import make_image, make_voc, make_yolo, voc_xml


def touch(root: Path, *names: str) -> None:
    """Make empty files: nothing is read here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def link(root: Path, name: str, target: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(target)


def warnings_of(folder: Path) -> dict[str, tuple[int, str]]:
    findings = Findings(is_strict=True)
    list_images(folder, findings)
    assert all(item.severity == "warning" and "\n" not in item.message for item in findings.items)
    return {item.code: (item.count, item.message.replace(str(folder), "")) for item in findings.items}


# Files, links, and the images that are found in `data`.
LINKS: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "a linked folder": (["data/a.jpg", "far/b.jpg"], {"data/more": "../far"}, ["a.jpg", "more/b.jpg"]),
    "an absolute link": (["data/a.jpg", "far/b.jpg"], {"data/more": "{}/far"}, ["a.jpg", "more/b.jpg"]),
    "a link to itself": (["data/a.jpg"], {"data/me": "me"}, ["a.jpg"]),
    "a link to its folder": (["data/x/a.jpg"], {"data/x/loop": "."}, ["x/a.jpg"]),
    "a link to the root": (["data/x/a.jpg"], {"data/x/loop": ".."}, ["x/a.jpg"]),
    "a link above the root": (["data/x/a.jpg", "b.jpg"], {"data/x/up": "../.."}, ["x/a.jpg"]),
    "a link to the root of all": (["data/a.jpg"], {"data/all": "/"}, ["a.jpg"]),
    "links to each other": (
        ["data/x/a.jpg", "data/y/b.jpg"],
        {"data/x/y": "../y", "data/y/x": "../x"},
        ["x/a.jpg", "y/b.jpg"],
    ),
    "a loop by a linked folder": (["far/a.jpg"], {"data/more": "../far", "far/back": "../data"}, ["more/a.jpg"]),
    "a loop in a linked folder": (["far/x/a.jpg"], {"data/more": "../far", "far/x/up": ".."}, ["more/x/a.jpg"]),
    "two links to one folder": (["far/a.jpg"], {"data/z": "../far", "data/b": "../far"}, ["b/a.jpg"]),
    "the least deep link": (
        ["far/a.jpg", "data/a/x.jpg"],
        {"data/a/b": "../../far", "data/z": "../far"},
        ["a/x.jpg", "z/a.jpg"],
    ),
    "a real folder and a link": (["data/z/a.jpg"], {"data/b": "z"}, ["z/a.jpg"]),
    "a link to a part": (
        ["far/x/a.jpg", "far/b.jpg"],
        {"data/a": "../far/x", "data/b": "../far"},
        ["a/a.jpg", "b/b.jpg"],
    ),
    "a chain of links": (["far/a.jpg"], {"data/b": "../one", "one": "two", "two": "far"}, ["b/a.jpg"]),
    "a linked image": (["far/a.jpg", "data/b.jpg"], {"data/a.jpg": "../far/a.jpg"}, ["a.jpg", "b.jpg"]),
    "a hidden link": (["far/a.jpg", "data/b.jpg"], {"data/.more": "../far"}, ["b.jpg"]),
    "a link to a hidden folder": (["data/.far/a.jpg"], {"data/more": ".far"}, ["more/a.jpg"]),
    "no image behind a link": (["far/a.txt", "data/b.jpg"], {"data/more": "../far"}, ["b.jpg"]),
}


@pytest.mark.parametrize("case", LINKS)
def test_linked_folders_are_followed_once(tmp_path: Path, case: str) -> None:
    files, links, expected = LINKS[case]
    touch(tmp_path, *files)
    for name, target in links.items():
        link(tmp_path, name, target.format(tmp_path))
    data = tmp_path / "data"
    assert list_images(data) == expected and has_images(data)
    link(tmp_path, "link", "data")
    assert list_images(tmp_path / "link") == expected  # the root may be a link itself
    folders = {data / name.split("/")[0] for name in expected if "/" in name}
    assert set(distinct_subfolders(data)) >= {folder.resolve() for folder in folders}
    assert sum(has_images(folder) for folder in distinct_subfolders(data)) == len(folders)


def test_a_class_tree_of_links_is_recognised(tmp_path: Path) -> None:
    touch(tmp_path, *(f"all/{name}/{number}.jpg" for name in ("cat", "dog") for number in range(2)))
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            link(tmp_path, f"tree/{split}/{name}", f"../../all/{name}")
    assert class_tree_splits(tmp_path / "tree") == ("train", "val")
    found = folder_classes(list_images(tmp_path / "tree/train"))
    assert found is not None and found.names == ("cat", "dog") and found.class_ids.tolist() == [0, 0, 1, 1]
    # Two names of one folder are one class, for both.
    (tmp_path / "tree/val/dog").unlink()
    link(tmp_path, "tree/val/dog", "cat")
    assert class_tree_splits(tmp_path / "tree") is None and folder_classes(list_images(tmp_path / "tree/val")) is None


def test_hidden_images_make_no_folder_of_images(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden/a.jpg", "x/.b.jpg", "x/.cache/c.jpg")
    assert list_images(tmp_path) == [] and not has_images(tmp_path)


def test_unreadable_kinds_are_counted_by_kind(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.HEIC", "x/c.heic", "d.svg", ".e.heic", ".x/f.heic", "notes.txt")
    message = "3 files are left out: .heic (2), .svg (1), first /b.HEIC; convert them to JPEG"
    assert warnings_of(tmp_path) == {"unreadable-kinds": (3, message)}
    touch(tmp_path / "all", *(f"{number}{suffix}" for number, suffix in enumerate(sorted(UNREADABLE_SUFFIXES))))
    assert warnings_of(tmp_path / "all")["unreadable-kinds"][0] == len(UNREADABLE_SUFFIXES)


def test_a_file_beside_a_readable_image_of_its_name_is_not_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.npy", "b.CR2", "b.JPG", "c.npy", "x/c.jpg")
    assert warnings_of(tmp_path)["unreadable-kinds"] == (
        1,
        "1 file is left out: .npy (1), first /c.npy; convert them to JPEG",
    )


def test_links_that_lead_nowhere_are_said(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    for name in ("b.jpg", "folder", "x/folder", ".hidden"):
        link(tmp_path, name, "gone")
    message = "2 links or folders lead nowhere or may not be opened, first /folder; repair or remove them"
    assert warnings_of(tmp_path) == {"unreachable-folders": (2, message)}
    # A link to an image is an image that is missing, as in all formats.
    assert list_images(tmp_path) == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match=r"b\.jpg: .*not on disk"):
        open_images(DataConfig(root=tmp_path), purpose="train")
    assert {item.code for item in check_data(DataConfig(root=tmp_path)).findings} >= {"missing-images"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_folders_that_may_not_be_opened_are_said(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "x/b.jpg")
    (tmp_path / "x").chmod(0)
    assert warnings_of(tmp_path)["unreachable-folders"][0] == 1
    (tmp_path / "x").chmod(0o755)


@pytest.mark.parametrize("layout", ["folder", "voc", "yolo"])
def test_every_layout_that_lists_folders_says_once_what_is_left_out(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    if layout == "voc":
        make_voc(tmp_path, {"a": voc_xml(("x", (1, 1, 9, 9)))}, {"train": ["a"]})
    elif layout == "yolo":
        make_yolo(tmp_path, {"train/a": "0 .5 .5 .5 .5\n"}, "train: images/train\nnames: [cat]\n")
    else:
        make_image(tmp_path / "images/a.jpg")
    folder = tmp_path / {"folder": "images", "voc": "JPEGImages", "yolo": "images/train"}[layout]
    touch(folder, "b.heic", "c.dng", "d.heic")
    (tmp_path / "far").mkdir()
    make_image(tmp_path / "far/z.jpg")
    (folder / "linked").symlink_to(tmp_path / "far")
    report = check_data(DataConfig(root=tmp_path, format=layout))
    found = [item for item in report.findings if item.code == "unreadable-kinds"]
    assert [(item.severity, item.count, item.example) for item in found] == [("warning", 3, str(folder / "b.heic"))]
    assert "3 files are left out: .heic (2), .dng (1), first" in found[0].message
    with caplog.at_level(logging.WARNING, logger="aligndet"):
        images = open_images(DataConfig(root=tmp_path, format=layout), purpose="train")
    assert caplog.text.count("3 files are left out") == 1
    assert sorted(Path(name).name for name in images.file_names) == ["a.jpg"] + ["z.jpg"] * (layout != "voc")


@pytest.mark.parametrize("kind", ["auto", "folder"])
def test_a_folder_of_unreadable_kinds_only_is_told_from_an_empty_one(tmp_path: Path, kind: str) -> None:
    touch(tmp_path, "a.heic", "b.heic")
    with pytest.raises(DataError, match=r"no images found in it; 2 files are left out: \.heic \(2\), .* to JPEG$"):
        open_images(DataConfig(root=tmp_path, format=kind), purpose="train")
