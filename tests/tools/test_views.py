"""What pre-training sees, before it does."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.loaders import SampleStream
from aligndet_cli.data.open import open_images
from aligndet_cli.data.transforms import ViewParams
from aligndet_cli.pretrain_box import pictures
from aligndet_cli.pretrain_box.pictures import draw_first_views, show_views
from aligndet_cli.pretrain_box.views import VIEWS, ViewsConfig
from helpers.commandline import CHAIN, aligndet

RESOLUTION = ("--short-side", "64,96", "--long-side", "120")


def test_views_before_any_training(toy: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    words = ("views", toy, "-w", workspace, *RESOLUTION)
    assert "run `aligndet proposals" in aligndet(*words, code=2).error_line()
    assert "run `aligndet proposals DATA` first" in aligndet("views", "-w", tmp_path / "empty", code=2).error_line()
    aligndet("proposals", toy, "-w", workspace, *CHAIN["proposals"])
    assert aligndet(*words).stdout == f"{workspace / 'views.jpg'}\n"
    content = (workspace / "views.jpg").read_bytes()
    # Four images: a line of text, and two views of 440 x 330 with a line of text each; six pixels between them.
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("JPEG", (440 + 6 + 440, 4 * (24 + 330 + 24)))
    assert {path.name for path in workspace.iterdir()} <= {"proposals", "views.jpg", "workspace.json", ".index"}
    more = ("--count", "2", "-o", tmp_path / "two.jpg", "--json")
    assert aligndet(*words, *more).json()["file"] == str(tmp_path / "two.jpg")
    with Image.open(tmp_path / "two.jpg") as image:
        assert image.size == (886, 2 * 378)
    aligndet(*words)
    assert (workspace / "views.jpg").read_bytes() == content
    aligndet(*words, "--seed", "1")
    assert (workspace / "views.jpg").read_bytes() != content
    soco = ("views", toy, "-w", workspace, "--method", "soco", "--detector", "faster-rcnn")
    aligndet(*soco, "-o", tmp_path / "three.jpg")
    with Image.open(tmp_path / "three.jpg") as image:
        assert image.size == (3 * 440 + 2 * 6, 4 * 378)
    assert "--method soco has square views of one side" in aligndet(*soco, *RESOLUTION, code=2).error_line()
    for wrong, message in {
        ("--count", "0"): "--count 0: write a number from 1 to ",
        ("--count", "65"): "--count 65: write a number from 1 to ",
        ("-o", str(tmp_path / "x.png")): "x.png: name a .jpg file",
        ("-o", str(tmp_path / "none" / "x.jpg")): "no such folder as ",
    }.items():
        assert message in aligndet(*words, *wrong, code=2).error_line()


def test_a_run_draws_what_it_was_trained_on(chain: Path, toy: Path, tmp_path: Path) -> None:
    """`views` with the run's settings gives the picture that the run has made."""
    [run] = (chain / "pretrain-box").iterdir()
    config = json.loads((run / "config.json").read_text())
    sides = ",".join(map(str, config["views"]["short_side"])), str(config["views"]["long_side"])
    words = ("--short-side", sides[0], "--long-side", sides[1], "-o", tmp_path / "v.jpg")
    aligndet("views", toy, "-w", chain, "--set", f"training.batch_size={config['training']['batch_size']}", *words)
    assert (tmp_path / "v.jpg").read_bytes() == (run / "plots" / "views.jpg").read_bytes()


class OneBox:
    """The same box in every image, as `SampleStream` asks for them."""

    def boxes_and_classes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[20, 10, 60, 30]], np.float32), np.zeros(1, np.int64)


def test_a_box_lies_on_its_thing_in_both_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A red thing of 40 x 20 pixels on grey, once as it is and once flipped: the frame is drawn around it."""
    pixels = np.full((66, 88, 3), 128, np.uint8)
    pixels[10:30, 20:60] = (250, 0, 0)
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data" / "x.png")
    views = {1: ViewParams(66, 88), 2: ViewParams(66, 88, flip=True)}
    monkeypatch.setattr(pictures, "draw_views", lambda samples, number, *_: [views[number]])
    image_set = open_images(DataConfig(root=tmp_path / "data"), purpose="train")
    stream = SampleStream(image_set, [0], OneBox(), "fail")
    show = partial(show_views, resolution=ViewsConfig(short_side=(66,), long_side=88), seed=0, numbers=VIEWS)
    draw_first_views(tmp_path / "v.jpg", stream, show, seed=0, batch_size=4, count=1)
    with Image.open(tmp_path / "v.jpg") as image:
        shown = np.asarray(image).astype(int)
    blue = np.array([0, 114, 178])  # of the first box
    for left, x1 in ((0, 20), (446, 88 - 60)):
        # 88 x 66 pixels become 440 x 330, five times as large, below a line of 24 pixels.
        view = shown[24 : 24 + 330, left : left + 440]
        top, bottom, start, end = 50, 150, 5 * x1, 5 * (x1 + 40)
        assert (view[top + 30 : bottom - 8, start + 30 : end - 8] @ [1, -1, 0] > 150).all()  # inside: the thing
        assert abs(view[bottom + 8 :, start:end] - 128).max() < 40  # outside: grey
        for row, column in ((top + 60, start), (top + 60, end - 1), (top, start + 120), (bottom - 1, start + 120)):
            near = view[max(row - 1, 0) : row + 2, column - 1 : column + 2].reshape(-1, 3)
            assert abs(near - blue).sum(axis=1).min() < 60
