import json
import shutil
from pathlib import Path
from typing import Any

from builders import coco_content, make_coco, make_image, make_voc, make_yolo, voc_xml
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import DoctorReport, check_data


def check(root: Path, **settings: Any) -> DoctorReport:
    report = check_data(DataConfig(root=root, **settings), num_threads=2)
    json.dumps(report.to_json())  # plain values only
    return report


def codes(report: DoctorReport, severity: str) -> dict[str, int]:
    return {item.code: item.count for item in report.findings if item.severity == severity}


def test_healthy_data(tmp_path: Path) -> None:
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


def test_many_problems_at_once(tmp_path: Path) -> None:
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
        "malformed-boxes": 1,
        "unsafe-file-names": 1,
        "missing-images": 1,
        "non-finite-boxes": 1,
        "unreadable-images": 1,
        "size-mismatch": 1,
    }
    assert codes(report, "warning") == {
        "degenerate-boxes": 2,  # the malformed one counts as empty
        "boxes-outside-the-image": 1,
        "boxes-clipped-to-the-image": 1,
        "duplicate-boxes": 1,
        "duplicate-images": 1,
    }
    mismatch = next(item for item in report.findings if item.code == "size-mismatch")
    assert mismatch.example == "turned.jpg" and "EXIF" in mismatch.message
    severities = [item.severity for item in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_images_in_two_splits(tmp_path: Path) -> None:
    make_coco(tmp_path, split="train2017")
    make_coco(tmp_path, split="val2017")
    shutil.copy(tmp_path / "train2017/a.jpg", tmp_path / "val2017/b.jpg")
    report = check(tmp_path)
    assert codes(report, "error") == {"images-in-two-splits": 1}
    assert "train2017/a.jpg and val2017/b.jpg" in report.findings[0].message
    assert codes(check(tmp_path, split="train2017"), "error") == {}


def test_other_formats(tmp_path: Path) -> None:
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


def test_polygons_and_imbalance(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[50, 30, 60, 30, 60, 40]]
    content["annotations"] += [
        {"image_id": 30, "category_id": 4, "bbox": [2 * number, 20, 1, 1]} for number in range(11)
    ]
    make_coco(tmp_path, content)
    report = check(tmp_path)
    assert codes(report, "info")["boxes-without-polygons"] == 13
    assert codes(report, "warning") == {"class-imbalance": 2}  # 12 of 14 boxes are cats


def test_bccd(shared_data: Path) -> None:
    report = check(shared_data / "bccd/BCCD")
    found = codes(report, "warning")
    # README: 2 boxes without area, 8 images with a doubled box (7 in trainval, 1 in test), strong imbalance.
    assert report.count("error") == 0 and found["degenerate-boxes"] == 2 and "class-imbalance" in found
    doubled = [item.count for item in report.findings if item.code == "duplicate-boxes"]
    assert doubled == [7, 1]
