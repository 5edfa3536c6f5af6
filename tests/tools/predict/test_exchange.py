from pathlib import Path

import yaml
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.tools.predict.exchange import write_table, write_yolo

# Two images of 200 x 100 pixels, the second with nothing in it, and a frame.
CONTENT = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 200, "height": 100},
        {"id": 2, "file_name": "below/b.png", "width": 200, "height": 100},
        {"id": 3, "file_name": "clip.mp4/000030.jpg", "video": "clip.mp4", "frame": 30, "width": 200, "height": 100},
    ],
    "categories": [{"id": 3, "name": "cell, red"}, {"id": 7, "name": "Thrombozyt \u00e4"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [20.0, 10.0, 50.0, 25.0], "score": 0.75},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0.0, 0.0, 200.0, 100.0], "score": 0.5},
        {"id": 3, "image_id": 3, "category_id": 3, "bbox": [100.0, 50.0, 20.0, 30.0], "score": 0.25},
    ],
}


def test_yolo_lines_are_shares_of_the_image(tmp_path: Path) -> None:
    write_yolo(CONTENT, tmp_path, with_scores=False)
    # The first box has its centre at (45, 22.5).
    lines = ["1 0.225000 0.225000 0.250000 0.250000", "0 0.500000 0.500000 1.000000 1.000000"]
    assert (tmp_path / "labels" / "a.txt").read_text().splitlines() == lines
    assert (tmp_path / "labels" / "below" / "b.txt").read_text() == ""
    assert (tmp_path / "labels" / "clip.mp4" / "000030.txt").read_text().startswith("0 0.55")
    names = yaml.safe_load((tmp_path / "names.yaml").read_text(encoding="utf-8"))
    assert names == {"names": {0: "cell, red", 1: "Thrombozyt \u00e4"}}
    write_yolo(CONTENT, tmp_path, with_scores=True)
    assert (tmp_path / "labels" / "a.txt").read_text().splitlines() == [f"{lines[0]} 0.750000", f"{lines[1]} 0.500000"]


def test_yolo_files_are_read_back(tmp_path: Path) -> None:
    write_yolo(CONTENT, tmp_path, with_scores=False)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels" / "below" / "b.txt").unlink()
    (tmp_path / "labels" / "clip.mp4" / "000030.txt").unlink()
    (tmp_path / "names.yaml").rename(tmp_path / "data.yaml")
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("train: images\n")
    record = open_images(DataConfig(root=tmp_path), purpose="train").record(0)
    assert record.boxes.tolist() == [[20.0, 10.0, 70.0, 35.0], [0.0, 0.0, 200.0, 100.0]]
    assert record.class_ids.tolist() == [1, 0]


def test_table_has_a_row_for_each_box(tmp_path: Path) -> None:
    write_table(CONTENT, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines() == [
        "file,frame,class,score,x1,y1,x2,y2",
        "a.jpg,,Thrombozyt \u00e4,0.75,20.0,10.0,70.0,35.0",
        'a.jpg,,"cell, red",0.5,0.0,0.0,200.0,100.0',
        'clip.mp4,30,"cell, red",0.25,100.0,50.0,120.0,80.0',
    ]
