"""Bad input through the command line: one line, the right exit code, nothing lost."""

import fcntl
import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.workspace import Workspace
from helpers.commandline import BACKBONE, CHAIN, NECK, RESOLUTION, aligndet, assert_same_results, files_of
from helpers.forks import ForkServer

pytestmark = pytest.mark.e2e

# As many steps as it takes to see all 13 images.
FINETUNE = ("finetune", *BACKBONE, *NECK, *RESOLUTION, "--batch-size", "2", "--steps", "7", "--init", "scratch")
GROUND_TRUTH = ("--source", "ground-truth", "--num-workers", "1")


def cut(file: Path, _image: Image.Image) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path, _image: Image.Image) -> None:
    file.write_bytes(b"")


def write_text(file: Path, _image: Image.Image) -> None:
    file.write_text("<html>404 not found</html>")


def rotate_by_exif(file: Path, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def write_16_bit(file: Path, image: Image.Image) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file, format="PNG")


# What is done to the image of that number, and what is said about it; None: it is used like any other.
SPOILERS: dict[int, tuple[Callable[[Path, Image.Image], Any], str | None]] = {
    1: (cut, "truncated or damaged image"),
    2: (empty, "empty file (0 bytes)"),
    3: (write_text, "not an image that can be read"),
    # The labels are of the image as it lies in the file: turned upright, the boxes would be elsewhere.
    4: (rotate_by_exif, "but its labels say"),
    5: (lambda file, _image: Image.new("RGB", (1, 1)).save(file), "but its labels say"),
    6: (lambda file, image: image.convert("L").save(file), None),
    7: (lambda file, image: image.convert("CMYK").save(file), None),
    8: (lambda file, image: image.convert("RGBA").save(file, format="PNG"), None),
    9: (write_16_bit, None),
}


def spoil(data: Path, number: int) -> Path:
    """Damage one image of the training split; returns its file."""
    file = data / "train" / f"{number:06d}.jpg"
    with Image.open(file) as image:
        image.load()
    SPOILERS[number][0](file, image)
    return file


@pytest.fixture
def data(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy set, to be damaged."""
    return Path(shutil.copytree(toy, tmp_path / "toy"))


@pytest.fixture
def labels(data: Path) -> Iterator[dict[str, Any]]:
    """Training labels of `data`, written back by `save`."""
    yield json.loads((data / "annotations" / "instances_train.json").read_text())


def save(data: Path, labels: dict[str, Any]) -> Path:
    file = data / "annotations" / "instances_train.json"
    file.write_text(json.dumps(labels))
    return file


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}


def test_odd_images_are_used_and_bad_ones_listed(data: Path, tmp_path: Path) -> None:
    for number in SPOILERS:
        spoil(data, number)
    workspace = tmp_path / "w"
    aligndet("proposals", data, "-w", workspace, *CHAIN["proposals"])
    aligndet("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"])
    ran = aligndet(*FINETUNE, "-w", workspace)
    bad = {f"{number:06d}.jpg": said for number, (_, said) in SPOILERS.items() if said is not None}
    for artifact in (workspace / "proposals" / "train", workspace / "finetune" / "retinanet-resnet18-scratch"):
        found = skipped(artifact)
        assert found.keys() == bad.keys()
        for file, said in bad.items():
            # The two stages word the difference between file and labels each in their own way.
            assert said.split(" its ")[0] in found[file] and str(data) not in found[file]
    assert Workspace(workspace).require("proposals").result["images"] == 13 - len(bad)
    assert Workspace(workspace).require("pretrain-box").result["images"] == 13 - len(bad)
    assert skipped(workspace / "pretrain-box" / "retinanet-resnet18") == {}
    for file in bad:
        assert ran.stderr.count(f"warning: skipped {file}: ") == 1


@pytest.mark.parametrize("number", [number for number, (_, said) in SPOILERS.items() if said is not None])
def test_on_error_fail_stops_at_the_first(data: Path, tmp_path: Path, number: int) -> None:
    good = (data / "train" / f"{number:06d}.jpg").read_bytes()
    file, said = spoil(data, number), str(SPOILERS[number][1]).split(" its ")[0]
    strict = ("-w", tmp_path / "w", "--on-error", "fail")
    for words in (("proposals", data, *GROUND_TRUTH), (*FINETUNE, data)):
        line = aligndet(*words, *strict, code=3).error_line()
        assert line.startswith(f"error: {file}: ") and said in line, line
    # Repaired, the data count as others, unless the files are as large as before: the command says how to start over.
    file.write_bytes(good)
    words = ("proposals", data, *GROUND_TRUTH, *strict)
    assert "input data: " in (line := aligndet(*words, code=2).error_line()) and "--no-resume" in line
    assert aligndet(*words, "--no-resume", "--json").json()["result"]["images"] == 13


def test_images_that_go_bad_after_proposals(data: Path, tmp_path: Path) -> None:
    """Of the same length, so that the data still counts as the same: found out while training."""
    workspace = tmp_path / "w"
    aligndet("proposals", data, "-w", workspace, *GROUND_TRUTH)
    file = data / "train" / "000006.jpg"
    file.write_bytes(b"x" * file.stat().st_size)
    words = ("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"], "--steps", "7")
    aligndet(*words)
    assert skipped(workspace / "pretrain-box" / "retinanet-resnet18").keys() == {"000006.jpg"}
    line = aligndet(*words, "--name", "strict", "--on-error", "fail", code=3).error_line()
    assert f"{file}: not an image that can be read" in line
    # In evaluation every image counts, so that none may be missing.
    aligndet(*FINETUNE, "-w", workspace)
    file = data / "val" / "000003.jpg"
    good = file.read_bytes()
    file.write_bytes(b"x" * len(good))
    assert f"{file}: not an image" in aligndet("evaluate", "-w", workspace, code=3).error_line()
    # Nothing is lost: with the image repaired, the same command goes on.
    file.write_bytes(good)
    assert aligndet("evaluate", "-w", workspace, "--json").json()["result"]["images"] == 11


def test_a_1x1_image_that_the_labels_know(data: Path, labels: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(data / "train" / labels["images"][2]["file_name"])
    labels["images"][2] |= {"width": 1, "height": 1}
    image_id = labels["images"][2]["id"]
    labels["annotations"] = [entry for entry in labels["annotations"] if entry["image_id"] != image_id]
    save(data, labels)
    workspace = tmp_path / "w"
    aligndet("proposals", data, "-w", workspace, *CHAIN["proposals"])
    aligndet("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"])
    aligndet(*FINETUNE, "-w", workspace)
    assert skipped(workspace / "finetune" / "retinanet-resnet18-scratch") == {}


def test_a_folder_of_nothing_but_bad_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"")
    line = aligndet("proposals", folder, "-w", tmp_path / "w", "--num-workers", "1", code=3).error_line()
    assert f"{folder}: none of 1 images could be used; the first: a.jpg: empty file" in line
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    aligndet("proposals", folder, "-w", tmp_path / "w", "--num-workers", "1")
    words = ("pretrain-box", "-w", tmp_path / "w", *CHAIN["pretrain-box"])
    assert "none of the images has a proposal" in aligndet(*words, code=3).error_line()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bbox", [float("nan"), 1, 9, 9], "annotations[3] has the 'bbox' [nan, 1, 9, 9], expected"),
        ("bbox", [1, 2, 3], "annotations[3] has the 'bbox' [1, 2, 3], expected"),
        ("category_id", 4711, "annotations[3] has category id 4711, which is not listed"),
        ("image_id", 4711, "annotations[3] has image id 4711, which is not listed"),
    ],
)
def test_bad_annotations_exit_3(
    data: Path, labels: dict[str, Any], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    labels["annotations"][3][key] = value
    file = save(data, labels)
    for words in (("proposals", data, *GROUND_TRUTH), (*FINETUNE, data)):
        line = aligndet(*words, "-w", tmp_path / "w", code=3).error_line()
        assert line.startswith(f"error: {file}: ") and said in line, line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("bbox", "said"),
    [
        ([5, 5, -4, 8], "1 box without area was left out, first in"),
        ([5000, 5000, 9, 9], "1 box wholly outside its image was left out, first in"),
        ([-30, -30, 60, 60], "1 box reached beyond its image and was clipped, first in"),
    ],
)
def test_boxes_outside_are_corrected_and_reported(
    data: Path, labels: dict[str, Any], tmp_path: Path, bbox: list[int], said: str
) -> None:
    labels["annotations"][3]["bbox"] = bbox
    file = save(data, labels)
    ran = aligndet("proposals", data, "-w", tmp_path / "w", *GROUND_TRUTH, "--json")
    assert f"warning: {file}: {said}" in ran.stderr
    num_boxes = len(labels["annotations"]) - ("left out" in said)
    assert ran.json()["result"]["proposals"] == num_boxes


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("id", None, "occurs more than once (1 duplicates in all); make the ids unique"),
        ("file_name", "../val/000001.jpg", "points outside the image folder"),
        ("file_name", "/etc/hostname", "points outside the image folder"),
        ("file_name", "gone.jpg", "gone.jpg: image listed in the labels is not on disk"),
    ],
)
def test_bad_image_entries_exit_3(
    data: Path, labels: dict[str, Any], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    labels["images"][1][key] = labels["images"][0]["id"] if value is None else value
    save(data, labels)
    for words in (("proposals", data), (*FINETUNE, data)):
        line = aligndet(*words, "-w", tmp_path / "w", code=3).error_line()
        assert said in line and str(data) in line, line
    assert not (tmp_path / "w").exists()


def test_labels_without_a_box_cannot_be_trained_on(data: Path, labels: dict[str, Any], tmp_path: Path) -> None:
    save(data, labels | {"annotations": []})
    line = aligndet(*FINETUNE, data, "-w", tmp_path / "w", code=3).error_line()
    assert f"{data}: no boxes to train on in the labels of split 'train'" in line


# ---- the workspace and the disk ----


def test_two_commands_cannot_write_the_same(chain: Path, tmp_path: Path) -> None:
    workspace = Workspace(Path(shutil.copytree(chain, tmp_path / "w")))
    held = workspace.root / "evaluate" / ".other.partial" / "lock"
    words = ("evaluate", "-w", workspace.root, "--name", "other")
    aligndet(*words, "--dry-run")
    held.parent.mkdir()
    with held.open("w") as handle:
        handle.write("pid 4711 on elsewhere")
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX)
        line = aligndet(*words, code=1).error_line()
        assert "another aligndet process (pid 4711 on elsewhere) is writing it" in line and "--name" in line
        runs = aligndet("status", "-w", workspace.root, "--json").json()["runs"]
        assert [row["state"] for row in runs if row["run"] == "other"] == ["running"]
    aligndet(*words)
    assert set(files_of(workspace.root / "evaluate" / "other")) == set(
        files_of(workspace.root / "evaluate" / "retinanet-resnet18-val")
    )


def test_workspace_below_a_file(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in ("proposals", "finetune"):
        more = GROUND_TRUTH if command == "proposals" else FINETUNE[1:]
        ran = aligndet(command, toy, "-w", tmp_path / "file" / "w", *more, code=1)
        assert "choose a --workspace that can be written" in ran.error_line()


def limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize("stage", ["proposals", "cluster", "finetune"])
def test_full_disk(forks: ForkServer, stage: str, chain: Path, toy: Path, tmp_path: Path) -> None:
    """A file system that is too small for the stage; then it grows, and the same command goes on to the same result."""
    disk, workspace = tmp_path / "disk", tmp_path / "disk" / "w"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        outside = tmp_path / "outside"
        shutil.copytree(chain, outside)
        shutil.rmtree(outside / stage)
        workspace.mkdir()
        for other in outside.iterdir():
            (workspace / other.name).symlink_to(other)
        (disk / "filler").write_bytes(b"x" * 180_000)
        words = [stage, *([toy] if stage == "proposals" else []), "-w", workspace, *CHAIN[stage]]
        assert forks.run(*words, cwd=tmp_path) == 1, forks.output
        line = forks.output.strip().splitlines()[-1]
        assert line.startswith("error: ") and "No space left on device" in line and "free some space" in line, line
        assert forks.output.count("error: ") == 1 and "Traceback" not in forks.output, forks.output
        assert not (workspace / stage / next((chain / stage).iterdir()).name).exists()
        subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
        assert forks.run(*words, cwd=tmp_path) == 0, forks.output
        assert_same_results(workspace / stage, chain / stage)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_read_only_disk(forks: ForkServer, toy: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a read-only disk here: {mounted.stderr.decode().strip()}")
    try:
        assert forks.run("proposals", toy, "-w", disk / "w", *GROUND_TRUTH, cwd=tmp_path) == 1
        assert "Read-only file system; choose a --workspace that can be written" in forks.output
        assert "Traceback" not in forks.output
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("stage", ["finetune", "evaluate"])
def test_files_may_not_grow(stage: str, chain: Path, tmp_path: Path) -> None:
    """Limit the size of files, as `ulimit -f` and quotas do; needs no right to mount anything."""
    workspace = Path(shutil.copytree(chain, tmp_path / "w"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        ran = aligndet(stage, "-w", workspace, *CHAIN[stage], "--name", "other", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; raise the limit on the size of files (ulimit -f), then run the same" in ran.error_line()
    aligndet(stage, "-w", workspace, *CHAIN[stage], "--name", "other")
    assert files_of(workspace / stage / "other").keys() == files_of(next((chain / stage).iterdir())).keys()
