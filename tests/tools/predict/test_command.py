import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.files import write_json
from aligndet_cli.tools.predict.videos import VideoReader
from helpers.commandline import aligndet
from helpers.films import film
from helpers.small_detectors import save_detector


@pytest.fixture(scope="module")
def workspace(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one run, whose detector has learnt nothing and finds seven boxes in every image."""
    root = tmp_path_factory.mktemp("predict") / "workspace"
    run = root / "finetune" / "untrained"
    run.mkdir(parents=True)
    write_json(run / "manifest.json", {"content_hash": "x", "finished": "2026-01-01", "result": {}})
    config = RetinaNetConfig(neck_channels=32, head_convs=1, score_threshold=0.0, max_detections=7)
    backbone = BackboneConfig(name="resnet18", weights="none")
    categories = open_images(DataConfig(root=toy), purpose="val").categories
    torch.manual_seed(0)
    model = config.build(build_backbone(backbone), len(categories))
    where = {"stage": "finetune", "configs": (config, backbone), "categories": categories, "resolution": (64, 96)}
    save_detector(run / "weights.pt", model, **where)
    return root


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of images in all kinds of modes, 60 wide and 40 high, and a file that is none."""
    folder = tmp_path / "odd"
    (folder / "below").mkdir(parents=True)
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8))
    for mode in ("L", "RGBA", "P"):
        grey.convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 256).save(folder / "below" / "16-bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    grey.save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_finds_exactly_what_evaluate_finds(workspace, toy, tmp_path):
    aligndet("evaluate", toy, "-w", workspace, "--set", "plots=false")
    (folder,) = (workspace / "evaluate").iterdir()
    truth = json.loads((folder / "ground_truth.json").read_text())
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    keys = ("category_id", "bbox", "score")
    evaluated = [
        (names[entry["image_id"]], *(entry[key] for key in keys))
        for entry in json.loads((folder / "predictions.json").read_text())
    ]
    images = open_images(DataConfig(root=toy), purpose="val").images_dir
    words = ("-w", workspace, "--score", "0", "-o", tmp_path / "out", "--json")
    ran = aligndet("predict", images, *words).json()
    assert (ran["images"], ran["detections"], ran["skipped"]) == (11, 77, [])
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in content["images"]}
    assert sizes == {image["file_name"]: (image["height"], image["width"]) for image in truth["images"]}
    found = [(names[entry["image_id"]], *(entry[key] for key in keys)) for entry in content["annotations"]]
    assert sorted(found) == sorted(evaluated)
    assert content["categories"] == truth["categories"]


def test_images_of_every_kind_and_crops(workspace, odd, tmp_path):
    words = ("-w", workspace, "-o", tmp_path / "out", "--score", "0", "--batch-size", "2", "--save-crops")
    ran = aligndet("predict", odd, *words)
    assert ran.stdout.startswith("35 detections of score >= 0 in 5 images, 1 unreadable\n")
    assert f"warning: left out: {odd / 'broken.jpg'}: not an image that can be read" in ran.stderr
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in content["images"]}
    names = ("L.png", "P.png", "RGBA.png", "below/16-bit.png")
    assert sizes == {**dict.fromkeys(names, (40, 60)), "turned.jpg": (60, 40)}
    drawn = sorted(file.relative_to(tmp_path / "out" / "images").as_posix() for file in _files(tmp_path / "out/images"))
    assert drawn == ["L.png.jpg", "P.png.jpg", "RGBA.png.jpg", "below/16-bit.png.jpg", "turned.jpg"]
    with Image.open(tmp_path / "out" / "images" / "turned.jpg") as turned:
        assert turned.size == (320, 480)  # upright, and enlarged eight times
    classes = {category["id"]: category["name"] for category in content["categories"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    with_area = [entry for entry in content["annotations"] if min(entry["bbox"][2:]) > 0]
    crops = {file.relative_to(tmp_path / "out" / "crops").parts for file in _files(tmp_path / "out" / "crops")}
    assert {(classes[entry["category_id"]], *Path(names[entry["image_id"]]).parts[:-1]) for entry in with_area} <= {
        parts[:-1] for parts in crops
    }
    assert len(with_area) <= len(crops) <= 35


def test_scores_below_the_limit_are_left_out(workspace, odd, tmp_path):
    words = ("predict", odd / "L.png", "-w", workspace, "-o", tmp_path / "out", "--no-annotated", "--json")
    assert aligndet(*words, "--score", "0.9").json()["detections"] == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_no_readable_image_is_an_error_of_the_data(workspace, odd, tmp_path):
    ran = aligndet("predict", odd / "broken.jpg", "-w", workspace, "-o", tmp_path / "out", code=3)
    assert "nothing can be read of 1 image" in ran.error_line()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_what_is_there_is_replaced_only_on_request(workspace, odd, tmp_path):
    out = tmp_path / "out"
    words = ("predict", odd / "L.png", "-w", workspace, "-o", out, "--score", "0")
    aligndet(*words)
    (out / "notes.txt").touch()
    assert "use --force" in aligndet(*words, code=2).error_line()
    aligndet(*words, "--no-annotated", "--force")
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", "predictions.json"]
    (out / "predictions.json").unlink()
    assert "holds other files" in aligndet(*words, "--force", code=2).error_line()
    assert "is a file" in aligndet(*words, "-o", out / "notes.txt", code=2).error_line()


def test_a_weights_file_instead_of_a_run(workspace, odd, tmp_path):
    weights = tmp_path / "mine.pt"
    shutil.copy(workspace / "finetune" / "untrained" / "weights.pt", weights)
    result = aligndet("predict", odd / "L.png", "-w", tmp_path / "empty", "--weights", weights, "--json").json()
    assert result["folder"] == str(tmp_path / "empty" / "predict" / "mine")
    words = ("predict", odd / "L.png", "-w", workspace)
    assert "name one of them" in aligndet(*words, "--weights", weights, "--run", "x", code=2).error_line()
    assert "name them" in aligndet("predict", code=2).error_line()


def test_weights_that_do_not_fit_are_refused(workspace, odd, tmp_path):
    content = torch.load(workspace / "finetune" / "untrained" / "weights.pt", weights_only=True)
    name = "backbone.conv1.weight"
    for change, said in (
        ({name: content["state_dict"][name] * float("nan")}, f"'{name}' holds NaN or infinity"),
        (
            {name: content["state_dict"][name][:3]},
            f"its tensors are not those of its retinanet (size mismatch for {name}",
        ),
    ):
        file = tmp_path / "w.pt"
        torch.save({**content, "state_dict": {**content["state_dict"], **change}}, file)
        assert said in aligndet("predict", odd, "--weights", file, "-o", tmp_path / "out", code=4).error_line()
    assert not (tmp_path / "out").exists()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_every_call_without_output_has_a_folder_of_its_own(workspace, odd, tmp_path):
    root = Path(shutil.copytree(workspace, tmp_path / "w"))
    words = ("predict", "-w", root, "--score", "0", "--json")
    folders = [Path(aligndet(*words, odd / name).json()["folder"]) for name in ("L.png", "P.png", "RGBA.png")]
    assert [folder.name for folder in folders] == ["untrained", "untrained-2", "untrained-3"]
    names = [json.loads((folder / "predictions.json").read_text())["images"][0]["file_name"] for folder in folders]
    assert names == ["L.png", "P.png", "RGBA.png"]
    # What earlier calls have drawn is not looked at again.
    shutil.rmtree(folders[1])
    shutil.copy(odd / "L.png", root / "mine.png")
    ran = aligndet(*words, root)
    assert Path(ran.json()["folder"]) == folders[1] and ran.json()["images"] == 1
    assert f"1 image, results to {folders[1]}\n" in ran.stderr
    ran = aligndet(*words, odd / "P.png", "--force").json()
    assert Path(ran["folder"]) == folders[0]
    assert not list((root / "predict").glob(".*"))


def test_videos_text_files_and_a_table(workspace, odd, tmp_path):
    film(odd / "clip.mp4.avi", 7, (60, 40))
    (odd / "broken.mp4").write_bytes(b"no video")
    whole = film(odd / "cut.avi", 9, (60, 40)).read_bytes()
    (odd / "cut.avi").write_bytes(whole[: len(whole) * 8 // 10])
    out = tmp_path / "out"
    words = ("predict", odd, "-w", workspace, "-o", out, "--score", "0", "--every", "3", "--batch-size", "2")
    ran = aligndet(*words, "--save-txt", "--save-conf", "--csv", "--save-crops")
    frames = len([name for name in (out / "labels" / "cut.avi").iterdir()])
    assert 0 < frames < 3
    total = 7 * (5 + 3 + frames)
    assert ran.stdout.startswith(
        f"{total} detections of score >= 0 in 5 images and {3 + frames} frames, 3 unreadable\n"
    )
    assert f"{odd / 'broken.mp4'}: not a video that can be read" in ran.stderr
    assert "of 9 frames cannot be read" in ran.stderr
    content = json.loads((out / "predictions.json").read_text())
    clip = [image for image in content["images"] if image.get("video") == "clip.mp4.avi"]
    assert [(image["file_name"], image["frame"]) for image in clip] == [
        (f"clip.mp4.avi/{number:06d}.jpg", number) for number in (0, 3, 6)
    ]
    ids = [image["id"] for image in content["images"]]
    assert len(set(ids)) == len(ids) and {entry["image_id"] for entry in content["annotations"]} == set(ids)
    assert (out / "images" / "clip.mp4.avi.mp4").stat().st_size > 0 and (out / "images" / "cut.avi.mp4").exists()
    assert any("clip.mp4.avi" in path.parts for path in _files(out / "crops"))
    rows = (out / "detections.csv").read_text().splitlines()
    assert len(rows) == 1 + total and sum(row.startswith("clip.mp4.avi,6,") for row in rows) == 7
    lines = (out / "labels" / "clip.mp4.avi" / "000003.txt").read_text().splitlines()
    assert len(lines) == 7 and {len(line.split()) for line in lines} == {6}
    assert "disc" in (out / "names.yaml").read_text()
    aligndet(*words, "--force", "--no-annotated")
    assert [path.name for path in out.iterdir()] == ["predictions.json"]


def test_a_frame_is_an_image(workspace, tmp_path):
    """What is found in a frame is what is found in the same pixels as an image."""
    clip = film(tmp_path / "clip.avi", 2, (60, 40))
    (_, pixels), _ = VideoReader(clip).frames(1)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    aligndet("predict", clip, tmp_path / "frame.png", "-w", workspace, "-o", tmp_path / "out", "--score", "0")
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    of_image, of_frame, _ = (
        [(entry["bbox"], entry["score"]) for entry in content["annotations"] if entry["image_id"] == image["id"]]
        for image in content["images"]
    )
    assert of_image == of_frame and len(of_image) == 7


def test_settings_without_effect_and_files_of_one_name_are_refused(workspace, odd, tmp_path):
    words = ("predict", odd / "L.png", "-w", workspace, "-o", tmp_path / "out")
    assert "--every: takes frames of videos" in aligndet(*words, "--every", "2", code=2).error_line()
    line = aligndet(*words, "--save-conf", code=2).error_line()
    assert line == "error: --save-conf: scores are added to the files of --save-txt; ask for both"
    shutil.copy(odd / "L.png", odd / "L.bmp")
    line = aligndet("predict", odd, *words[2:], "--save-txt", code=2).error_line()
    assert "L.bmp and L.png would share one text file" in line or "L.png and L.bmp" in line
    (tmp_path / "x.mp4").write_bytes(b"no video")
    line = aligndet("predict", tmp_path / "x.mp4", *words[2:], code=3).error_line()
    assert "nothing can be read of 1 video; the first" in line and "x.mp4: not a video" in line
    assert not (tmp_path / "out").exists()
