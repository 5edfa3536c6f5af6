import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import DoctorReport, check_data
from helpers.commandline import aligndet
from helpers.data_sets import coco_content, make_coco, make_image, make_voc, make_yolo, voc_xml


def check(root: Path, **settings: Any) -> DoctorReport:
    report = check_data(DataConfig(root=root, **settings), num_threads=2)
    json.dumps(report.to_json())  # plain values only
    return report


def codes(report: DoctorReport, severity: str) -> dict[str, int]:
    return {item.code: item.count for item in report.findings if item.severity == severity}


def test_healthy_data_has_no_problems(tmp_path: Path) -> None:
    make_coco(tmp_path)
    report = check(tmp_path)
    assert codes(report, "error") == codes(report, "warning") == {}
    assert codes(report, "info") == {
        "images-without-boxes": 1,
        "crowds": 1,
        "rare-classes": 2,
        "category-id-gaps": 4,  # 4 and 9 leave out 5, 6, 7, 8
    }
    summary = report.summary["splits"]["train2017"]
    assert report.summary["format"] == "coco"
    assert (summary["images"], summary["boxes"], summary["crowd_boxes"]) == (3, 3, 1)
    assert summary["boxes_per_class"] == {"cat": 1, "dog": 2}
    assert summary["image_height"] == {"min": 40, "median": 40, "max": 40} and summary["image_width"]["max"] == 60


def test_many_problems_are_found_at_once(tmp_path: Path) -> None:
    content = coco_content()
    images, annotations = content["images"], content["annotations"]
    for image_id, name in ((40, "cut.jpg"), (50, "gone.jpg"), (60, "turned.jpg"), (70, "../up.jpg"), (80, "copy.jpg")):
        images.append({"id": image_id, "file_name": name, "height": 40, "width": 60})
    images.append(dict(images[0]))
    boxes = [
        (30, 4, [1, 2, 3, 4]),  # the same as annotation 2
        (30, 4, [1, 2, 0, 4]),
        (30, 4, [100, 2, 5, 4]),
        (30, 4, [50, 2, 30, 4]),
        (30, 4, [float("nan"), 2, 3, 4]),
        (30, 5, [1, 2, 3, 4]),
        (99, 4, [1, 2, 3, 4]),
        (30, 4, [1, 2]),
    ]
    annotations += [{"image_id": image, "category_id": category, "bbox": box} for image, category, box in boxes]
    make_coco(tmp_path, content)
    folder = tmp_path / "train2017"
    (folder / "gone.jpg").unlink()
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (60, 40)).save(folder / "turned.jpg", exif=exif)
    shutil.copy(folder / "a.jpg", folder / "copy.jpg")
    report = check(tmp_path)
    assert codes(report, "error") == {
        "duplicate-image-ids": 1,
        "unknown-image-ids": 1,
        "unknown-category-ids": 1,
        "malformed-boxes": 2,
        "unsafe-file-names": 1,
        "missing-images": 1,
        "unreadable-images": 1,
        "size-mismatch": 1,
    }
    assert codes(report, "warning") == {
        "degenerate-boxes": 3,  # the malformed ones count as empty
        "boxes-outside-the-image": 1,
        "boxes-clipped-to-the-image": 1,
        "duplicate-boxes": 1,
        "duplicate-images": 1,
    }
    mismatch = next(item for item in report.findings if item.code == "size-mismatch")
    assert mismatch.example == "turned.jpg" and "EXIF" in mismatch.message
    severities = [item.severity for item in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_classes_of_one_name_are_counted_apart(tmp_path: Path) -> None:
    odd = r"[red]:cat: $x$ \\"
    yaml = f"path: .\ntrain: images/train\nval: images/val\nnames: ['{odd}', '{odd}', dog]\n"
    make_yolo(tmp_path, {"train/a": "0 .3 .3 .2 .2\n1 .5 .5 .2 .2\n0 .7 .7 .2 .2\n", "val/b": ""}, yaml)
    make_image(tmp_path / "images/val/b.jpg", color=(1, 1, 1))
    counts = check(tmp_path, split="train").summary["splits"]["train"]["boxes_per_class"]
    assert counts == {f"{odd} (id 0)": 2, f"{odd} (id 1)": 1, "dog": 0}
    assert f"classes 0 and 1 are both called '{odd}': " in aligndet("doctor", tmp_path).stdout  # no markup


def test_images_in_two_splits_are_an_error(tmp_path: Path) -> None:
    make_coco(tmp_path, split="train2017")
    make_coco(tmp_path, split="val2017")
    shutil.copy(tmp_path / "train2017/a.jpg", tmp_path / "val2017/b.jpg")
    report = check(tmp_path)
    assert codes(report, "error") == {"images-in-two-splits": 1}
    assert "train2017/a.jpg and val2017/b.jpg" in report.findings[0].message
    assert codes(check(tmp_path, split="train2017"), "error") == {}


def test_other_formats_are_checked_too(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc", {"a": voc_xml(("x", (1, 1, 9, 9))), "b": "<oops"}, {"train": ["a", "b"], "val": []})
    report = check(tmp_path / "voc")
    assert codes(report, "error")["bad-annotations"] == 1
    assert report.summary["splits"]["train"]["boxes"] == 1
    make_yolo(tmp_path / "yolo", {"train/a": "7 .5 .5 1 1\nbad\n0 .5 .5 .5 .5\n", "val/b": ""})
    make_image(tmp_path / "yolo/images/val/b.jpg", color=(1, 1, 1))
    report = check(tmp_path / "yolo")
    assert codes(report, "error") == {"unknown-category-ids": 1, "bad-label-lines": 1}
    assert set(report.summary["splits"]) == {"train", "val"}
    make_image(tmp_path / "plain/a.jpg")
    report = check(tmp_path / "plain")
    assert codes(report, "info") == {"no-labels": 1} and report.count("error") == 0


def test_structure_errors_are_findings(tmp_path: Path) -> None:
    assert codes(check(tmp_path / "no"), "error") == {"unreadable-data": 1}
    file = make_coco(tmp_path)
    make_coco(tmp_path, split="val2017")
    file.write_text(file.read_text()[:50])
    report = check(tmp_path)
    assert codes(report, "error") == {"unreadable-data": 1}
    assert "not valid JSON" in report.findings[0].message and list(report.summary["splits"]) == ["val2017"]


def test_missing_polygons_and_imbalance_are_told(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[50, 30, 60, 30, 60, 40]]
    content["annotations"] += [
        {"image_id": 30, "category_id": 4, "bbox": [2 * number, 20, 1, 1]} for number in range(11)
    ]
    make_coco(tmp_path, content)
    report = check(tmp_path)
    assert codes(report, "info")["boxes-without-polygons"] == 13
    assert codes(report, "warning") == {}
    assert codes(report, "info")["class-imbalance"] == 2  # 12 of 14 boxes are cats


def test_bccd_has_the_faults_of_its_readme(shared_data: Path) -> None:
    report = check(shared_data / "bccd/BCCD")
    found = codes(report, "warning")
    # README: 2 boxes without area, 8 images with a doubled box (7 in trainval, 1 in test), strong imbalance.
    assert report.count("error") == 0 and found["degenerate-boxes"] == 2
    # Of the seven, one is not shifted but drawn again, 0.83 of the other.
    doubled = [item.count for item in report.findings if item.code == "duplicate-boxes"]
    assert doubled == [6, 1]


# ---- exit codes ----


def with_boxes(*boxes: tuple[int, int, list[float]]) -> dict[str, Any]:
    """Return the content of `make_coco` with more annotations of (image id, category id, bbox)."""
    content = coco_content()
    content["annotations"] += [
        {"image_id": image, "category_id": category, "bbox": box} for image, category, box in boxes
    ]
    return content


# Severity by code. Errors: a stage refuses them, or they certainly spoil a result. Warnings: stages correct or
# leave out the entry, or it is there twice. Infos: the labels are used as they are.
ON_COCO: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown-image-ids": ("error", with_boxes((99, 4, [1, 2, 3, 4]))),
    "unknown-category-ids": ("error", with_boxes((30, 5, [1, 2, 3, 4]))),
    "malformed-boxes": ("error", with_boxes((30, 4, [1, 2]))),
    "malformed-entries": ("error", {**coco_content(), "annotations": [7]}),
    "duplicate-image-ids": ("error", {**coco_content(), "images": 2 * coco_content()["images"]}),
    "duplicate-category-ids": ("error", {**coco_content(), "categories": 2 * coco_content()["categories"]}),
    "unsafe-file-names": (
        "error",
        {**coco_content(), "images": [*coco_content()["images"], {"id": 7, "file_name": "../up.jpg"}]},
    ),
    "no-images": ("error", {"images": [], "annotations": [], "categories": []}),
    "degenerate-boxes": ("warning", with_boxes((10, 4, [1, 2, 0, 4]))),
    "boxes-outside-the-image": ("warning", with_boxes((10, 4, [100, 2, 5, 4]))),
    "boxes-clipped-to-the-image": ("warning", with_boxes((10, 4, [50, 2, 30, 4]))),
    # [10, 10, 19, 20] lies inside [10, 10, 20, 20]: IoU 19 / 20
    "duplicate-boxes": ("warning", with_boxes((10, 4, [10, 10, 20, 20]), (10, 4, [10, 10, 19, 20]))),
    "equal-class-names": ("warning", {**coco_content(), "categories": [{"id": n, "name": "cat"} for n in (4, 9)]}),
    "class-imbalance": ("info", with_boxes(*((10, 4, [2 * number, 20, 1, 1]) for number in range(11)))),
    "crowds": ("info", coco_content()),
    "images-without-boxes": ("info", coco_content()),
    "category-id-gaps": ("info", coco_content()),
    "rare-classes": ("info", coco_content()),
    "classes-without-boxes": ("info", {**coco_content(), "annotations": coco_content()["annotations"][:1]}),
    "bad-masks": (
        "warning",
        {
            **coco_content(),
            "annotations": [{**coco_content()["annotations"][0], "segmentation": [[50, 30, 60, 30, float("nan"), 40]]}],
        },
    ),
    "boxes-without-polygons": (
        "info",
        {
            **coco_content(),
            "annotations": [
                {"image_id": 20, "category_id": 9, "bbox": [5, 5, 10, 10], "segmentation": [[5, 5, 15, 5, 15, 15]]},
                {"image_id": 30, "category_id": 4, "bbox": [5, 5, 10, 10]},
            ],
        },
    ),
}


def check_exit_codes(root: Path, code: str, severity: str) -> None:
    """Run the command with and without `--strict`; the code must be found, and nothing graver."""
    plain, strict = {"error": (3, 3), "warning": (0, 6), "info": (0, 0)}[severity]
    words = ("doctor", root, "-w", root / "w")
    content = aligndet(*words, "--json", code=plain).json()
    assert {item["severity"] for item in content["findings"] if item["code"] == code} == {severity}
    assert content["findings"][0]["severity"] == severity
    ran = aligndet(*words, "--strict", code=strict)
    assert (strict == 0) == (ran.stderr == "") and (strict == 0 or ran.error_line())
    assert aligndet(*words, "--strict", "--json", code=strict).json() == content


@pytest.mark.parametrize("code", ON_COCO)
def test_errors_exit_3_and_only_warnings_fail_strict(tmp_path: Path, code: str) -> None:
    severity, content = ON_COCO[code]
    make_coco(tmp_path, content)
    check_exit_codes(tmp_path, code, severity)


def test_files_exit_like_their_labels(tmp_path: Path) -> None:
    """Codes that depend on image files, splits or other formats."""
    for name in ("missing-images", "unreadable-images", "size-mismatch", "duplicate-images"):
        make_coco(tmp_path / name)
    (tmp_path / "missing-images/train2017/a.jpg").unlink()
    (tmp_path / "unreadable-images/train2017/a.jpg").write_bytes(b"")
    make_image(tmp_path / "size-mismatch/train2017/a.jpg", size_hw=(60, 40))
    shutil.copy(tmp_path / "duplicate-images/train2017/a.jpg", tmp_path / "duplicate-images/train2017/b.jpg")
    for name in ("images-in-two-splits", "different-classes"):
        make_coco(tmp_path / name)
    make_coco(tmp_path / "images-in-two-splits", split="val2017")
    shutil.copy(tmp_path / "images-in-two-splits/train2017/a.jpg", tmp_path / "images-in-two-splits/val2017/a.jpg")
    make_coco(
        tmp_path / "different-classes",
        {**coco_content(), "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "fox"}]},
        split="val2017",
    )
    make_voc(tmp_path / "bad-annotations", {"a": "<oops"}, {"train": ["a"]})
    make_voc(tmp_path / "missing-annotations", {"a": voc_xml(("x", (1, 1, 9, 9)))}, {"train": ["a", "b"]})
    make_yolo(tmp_path / "bad-label-lines", {"train/a": "bad\n0 .5 .5 .5 .5\n", "val/b": ""})
    make_image(tmp_path / "bad-label-lines/images/val/b.jpg", color=(1, 1, 1))
    make_image(tmp_path / "no-labels/a.jpg")
    severities = dict.fromkeys((path.name for path in tmp_path.iterdir()), "error")
    severities |= {"duplicate-images": "warning", "no-labels": "info"}
    assert len(severities) == 10
    for code, severity in severities.items():
        check_exit_codes(tmp_path / code, code, severity)


def test_a_missing_folder_exits_3_and_is_named(tmp_path: Path) -> None:
    ran = aligndet("doctor", tmp_path / "nowhere", "-w", tmp_path / "w", code=3)
    assert str(tmp_path / "nowhere") in ran.error_line()
    assert f"unknown data at {tmp_path / 'nowhere'}: 1 error, 0 warnings\n" in ran.stdout
    check_exit_codes(tmp_path / "nowhere", "unreadable-data", "error")


@pytest.mark.parametrize(
    ("root", "exit_code", "found"),
    [
        ("minicoco", 0, set()),
        ("bccd/BCCD", 6, {"degenerate-boxes", "duplicate-boxes"}),  # its README names both
        ("neudet", 6, {"duplicate-boxes", "duplicate-images"}),  # three boxes are there twice; one file under two names
        ("kangaroo", 3, {"unreadable-images", "images-in-two-splits", "duplicate-boxes"}),  # one each
    ],
)
def test_strict_fails_on_real_sets_for_real_faults_only(
    shared_data: Path, tmp_path: Path, root: str, exit_code: int, found: set[str]
) -> None:
    ran = aligndet("doctor", shared_data / root, "-w", tmp_path / "w", "--strict", "--json", code=exit_code)
    assert {item["code"] for item in ran.json()["findings"] if item["severity"] != "info"} == found
