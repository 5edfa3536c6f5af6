from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.config import DataConfig
from aligndet_cli.errors import DataError
from aligndet_cli.pretrain_image.labels import open_data
from aligndet_cli.pretrain_image.probe import Probe, ProbeRegions, extract, score, square_of

COLOURS = {"dark": 20, "bright": 230}


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    """Dark and bright images: any backbone tells them apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, level in COLOURS.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level, level + 20, (37, 41, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    found = open_data(DataConfig(root=tmp_path / "data"), seed=0, index_dir=tmp_path / "index").probe
    assert found is not None
    return found


def test_what_anyone_can_tell_apart_scores_one(probe: Probe) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18"))
    assert score(backbone, probe, 32) == {"knn": 1.0, "linear": 1.0}
    # With the classes of half of the test images swapped it cannot be more than a half.
    swapped = probe.test.class_ids.copy()
    swapped[::2] = 1 - swapped[::2]
    wrong = Probe(probe.train, ProbeRegions(probe.test.image_set, probe.test.image_index, swapped))
    assert score(backbone, wrong, 32) == {"knn": 0.5, "linear": 0.5}


def test_an_image_that_cannot_be_read_is_left_out(probe: Probe) -> None:
    broken = probe.test.image_set.record(1).path
    broken.write_bytes(b"")
    features, class_ids = extract(build_backbone(BackboneConfig(name="resnet18")), probe.test, 32)
    assert features.shape == (5, 512) and class_ids.tolist() == np.delete(probe.test.class_ids, 1).tolist()


def test_images_of_which_none_can_be_read_are_an_error_that_names_the_first(probe: Probe) -> None:
    for index in range(len(probe.test.image_set)):
        probe.test.image_set.record(index).path.write_bytes(b"")
    first = probe.test.image_set.record(int(probe.test.image_index[0])).path
    with pytest.raises(DataError, match=f"none of the .* images can be read; the first: {first}: empty file"):
        extract(build_backbone(BackboneConfig(name="resnet18")), probe.test, 32)


def test_squares() -> None:
    # Whole images: the central 7/8 of the short side. Boxes: as wide as their longer side, cut at the border.
    assert square_of((80, 100), None) == (5, 15, 70, 70)
    assert square_of((80, 100), np.array([30, 40, 50, 50], dtype=np.float32)) == (35, 30, 20, 20)
    assert square_of((80, 100), np.array([90, 10, 98, 30], dtype=np.float32)) == (10, 84, 20, 16)
