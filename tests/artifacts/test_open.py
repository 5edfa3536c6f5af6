"""Proposals and their images are found again, and never mixed up."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from aligndet_cli.artifacts.open import open_proposals
from aligndet_cli.artifacts.proposals import STORE_FILES, ImageProposals, write_store
from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import hash_files, write_json
from aligndet_cli.workspace import Workspace


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((40, 50, 3), 60 * index, np.uint8))
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


def add_proposals(workspace: Workspace, name: str, data: DataConfig) -> None:
    """Write a finished proposals artifact with one box per image."""
    folder = workspace.root / "proposals" / name
    folder.mkdir(parents=True)
    images = open_images(data, purpose="train")
    box = np.array([[1, 2, 30, 40]], np.float32)
    names = zip(images.image_ids.tolist(), images.file_names, strict=True)
    write_store(folder, (ImageProposals(image_id, file_name, (40, 50), box) for image_id, file_name in names))
    content_hash = hash_files([folder / file for file in STORE_FILES])
    manifest = {"inputs": {"data": images.fingerprint}, "content_hash": content_hash, "finished": name, "result": {}}
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "config.json", {"data": data.model_dump(mode="json")})


def test_data_is_read_where_the_proposals_found_it(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root, limit=2))
    store, images, artifact = open_proposals(workspace)
    assert (len(store), len(images), artifact.name) == (2, 2, "a")
    assert store.image_ids.tolist() == images.image_ids.tolist()


def test_images_of_a_plain_folder_have_the_sizes_that_the_proposals_saw(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    folder = workspace.root / "proposals" / "a"
    entries = [ImageProposals(number, f"{number}.png", (40, 50), np.zeros((0, 4), np.float32)) for number in (2, 0)]
    write_store(folder, entries)  # without image 1, which could not be read
    images = open_proposals(workspace)[1]
    assert images.sizes_hw.tolist() == [[40, 50], [0, 0], [40, 50]]
    assert images.aspects([0, 1]).tolist() == [1.25, 1]
    write_store(folder, [])
    assert open_proposals(workspace)[1].sizes_hw.tolist() == [[0, 0]] * 3


def test_the_newest_or_the_named_proposals_are_opened(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root, limit=1))
    add_proposals(workspace, "b", DataConfig(root=root, limit=2))
    assert open_proposals(workspace)[2].name == "b"
    assert open_proposals(workspace, "a")[2].name == "a"
    assert len(open_proposals(workspace, "a")[1]) == 1


def test_moved_data_is_found_where_the_workspace_remembers_it(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    moved = Path(shutil.move(root, root.with_name("moved")))
    workspace.remember("data", {"root": str(moved), "format": "auto", "split": None})
    assert open_proposals(workspace)[1].root == moved


def test_moved_data_can_be_named(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    moved = Path(shutil.move(root, root.with_name("moved")))
    assert open_proposals(workspace, data=DataConfig(root=moved))[1].root == moved


def test_other_data_remembered_since_does_not_matter(workspace: Workspace, root: Path, tmp_path: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    other = tmp_path / "elsewhere"
    workspace.remember("data", {"root": str(other), "format": "auto", "annotations": None, "images": None})
    assert open_proposals(workspace)[1].root == root
    # The command line fills in the remembered data, so it does not count as named by the user.
    assert open_proposals(workspace, data=DataConfig(root=other))[1].root == root


def test_wrong_data_is_refused(workspace: Workspace, root: Path, tmp_path: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    other = Path(shutil.copytree(root, tmp_path / "other"))
    (other / "1.png").unlink()
    with pytest.raises(ConfigError, match="name the right folder"):
        open_proposals(workspace, data=DataConfig(root=other))


def test_changed_data_is_refused(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    (root / "1.png").unlink()
    with pytest.raises(ConfigError, match="--force"):
        open_proposals(workspace)


def test_lost_data_must_be_named(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root))
    shutil.rmtree(root)
    with pytest.raises(ConfigError, match="data.root=FOLDER"):
        open_proposals(workspace)


def test_another_limit_or_split_is_refused(workspace: Workspace, root: Path) -> None:
    add_proposals(workspace, "a", DataConfig(root=root, limit=2))
    assert len(open_proposals(workspace, data=DataConfig(limit=2))[1]) == 2
    with pytest.raises(ConfigError, match=r"data\.limit = 1"):
        open_proposals(workspace, data=DataConfig(limit=1))
    with pytest.raises(ConfigError, match=r"data\.split = val"):
        open_proposals(workspace, data=DataConfig(split="val"))


def test_missing_proposals_are_an_error(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="run `aligndet proposals DATA` first"):
        open_proposals(workspace)
