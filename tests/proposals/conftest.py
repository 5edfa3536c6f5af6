import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from aligndet_cli.proposals.stage import ProposalsConfig

SIZE_HW = (83, 127)
NUM_IMAGES = 7


@pytest.fixture(scope="session")
def soco_reference(shared_data: Path) -> dict[str, Any]:
    """What SoCo's own code finds in eight photos of minicoco."""
    reference: dict[str, Any] = json.loads(
        (shared_data.parent / "golden/g4_selective_search/selective_search.json").read_text()
    )
    return reference


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A COCO root of 7 noise images with three rectangles each, ids 100, 103, ...; per image an object and a crowd."""
    generator = np.random.default_rng(1)
    folder = tmp_path / "data"
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for index in range(NUM_IMAGES):
        pixels = generator.integers(90, 110, (*SIZE_HW, 3), dtype=np.uint8)
        for _ in range(3):
            x, y = int(generator.integers(0, 70)), int(generator.integers(0, 40))
            pixels[y : y + 37, x : x + 41] = generator.integers(0, 256, 3)
        name, image_id = f"{index:03d}.png", 100 + 3 * index
        cv2.imwrite(str(folder / "train2017" / name), pixels)
        images.append({"id": image_id, "file_name": name, "height": SIZE_HW[0], "width": SIZE_HW[1]})
        for bbox, is_crowd in (([x, y, 41, 37], 0), ([0, 0, 80, 80], 1)):
            label = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 17, "iscrowd": is_crowd}
            annotations.append({**label, "bbox": bbox, "area": bbox[2] * bbox[3]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 17, "name": "cat"}]}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def make_config(root: Path) -> Callable[..., ProposalsConfig]:
    """Config for `root`: one process, unless said otherwise."""

    def make(num_workers: int = 1, **settings: Any) -> ProposalsConfig:
        values = {"data": {"root": root}, "runtime": {"num_workers": num_workers}, **settings}
        return ProposalsConfig.model_validate(values)

    return make


@pytest.fixture
def make_search_config(make_config: Callable[..., ProposalsConfig]) -> Callable[..., ProposalsConfig]:
    """As `make_config`, searching quickly for boxes of at least 20 px."""
    return lambda **settings: make_config(**{"mode": "opencv-single", "min_size": 20, **settings})


@pytest.fixture
def contents_of() -> Callable[[Path], dict[str, bytes]]:
    """Bytes of every file of an artifact but its manifest, which holds times, and its config, which holds paths."""

    def contents(folder: Path) -> dict[str, bytes]:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        apart = ("manifest.json", "config.json")
        return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in apart}

    return contents
