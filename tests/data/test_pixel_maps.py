"""Maps with the class of every pixel: what is refused beforehand and when they are used, and views that they follow."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import LabelBoxes, SampleStream
from aligndet_cli.data.open import open_images
from aligndet_cli.data.pixel_maps import PixelMaps
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.data.transforms import Crop, ViewParams, crop_sample, make_batch
from aligndet_cli.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("toy")
    draw_toy_data(folder, seed=0, num_train=5, num_val=2, size_hw=(48, 64))
    return open_images(DataConfig(root=folder), purpose="train")


@pytest.fixture
def maps(images: ImageSet, tmp_path: Path) -> PixelMaps:
    """Classes 0 to 4 in columns, and a first row without any."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for name, (height, width) in zip(images.file_names, images.sizes_hw.tolist(), strict=True):
        classes = np.tile(np.arange(width, dtype=np.uint8) % 5, (height, 1))
        classes[0] = 255
        Image.fromarray(classes).save((folder / name).with_suffix(".png"))
    return PixelMaps(images, folder, 5)


def test_they_are_read_as_they_are(maps: PixelMaps) -> None:
    everything = range(len(maps.image_set))
    assert maps.check(everything) == replace(maps, num_classes=9).check(everything)
    height, width = maps.image_set.sizes_hw[3].tolist()
    stream = SampleStream(maps.image_set, [3], LabelBoxes(maps.image_set), "fail", None, maps)
    classes = stream[0, 0].pixel_classes
    assert classes is not None and classes.dtype == torch.uint8 and classes.shape == (height, width)
    assert (classes[0] == 255).all() and torch.equal(classes[1].long(), torch.arange(width) % 5)
    # Numbers of colours, not the colours.
    file = maps.file_of(3)
    with Image.open(file) as image:
        image.putpalette([value % 256 // 2 for value in range(3 * 256)])
        image.save(file)
    again = stream[0, 0].pixel_classes
    assert again is not None and torch.equal(again, classes)
    before = maps.check(everything)
    file.write_bytes(file.read_bytes() + b"\0")
    assert maps.check(everything) != before


def remove(maps: PixelMaps, index: int) -> None:
    maps.file_of(index).unlink()


def write(maps: PixelMaps, index: int, mode: str, value: int = 0, more: int = 0) -> None:
    """Write a map of one value, as large as the image or so many columns wider."""
    height, width = maps.image_set.sizes_hw[index].tolist()
    Image.new(mode, (width + more, height), value).save(maps.file_of(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: [remove(maps, 1), remove(maps, 3)], r"maps: 2 of 5 images have no map, the first is \S+\.png"),
        (
            lambda maps: [remove(maps, index) for index in range(5)],
            r"maps: 5 of 5 .*; name the folder with the maps of this split, such as stuffthingmaps/train2017",
        ),
        (
            lambda maps: write(maps, 4, "L", more=3),
            r"maps: 1 of 5 maps have another size: \S+\.png is \d+x(\d+) pixels, and its image \d+x\1$",
        ),
        (
            lambda maps: write(maps, 2, "L", 7),
            r"\.png: has a pixel of class 7, and detector.semantic_classes = 5 means 0 to 4, and 255 for none",
        ),
        (
            lambda maps: write(maps, 0, "RGB"),
            r"\.png: has pixels of kind RGB; needed is one number",
        ),
        (lambda maps: write(maps, 0, "I;16"), r"\.png: has pixels of kind I;16; needed is one"),
        (lambda maps: maps.file_of(2).write_bytes(b"no image"), r"\.png: not an image that can be read"),
        (lambda maps: maps.file_of(2).write_bytes(maps.file_of(2).read_bytes()[:-40]), r"\.png: truncated or damaged"),
    ],
)
def test_what_is_wrong_is_one_line(maps: PixelMaps, change: Callable[[PixelMaps], object], message: str) -> None:
    change(maps)
    with pytest.raises(DataError, match=message) as caught:
        maps.check(range(5))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such folder of maps; check pixel_maps"):
        replace(maps, folder=maps.folder / "none").check(range(5))


def test_a_map_that_changes_later_is_left_out_with_its_image(maps: PixelMaps) -> None:
    write(maps, 1, "L", 7)
    write(maps, 2, "L", more=1)
    stream = SampleStream(maps.image_set, [1, 2, 3], LabelBoxes(maps.image_set), "skip", None, maps)
    sample = stream[0, 0]
    assert sample.index == 3
    assert [name for name, _ in sample.skipped] == maps.image_set.file_names[1:3]
    reasons = [reason for _, reason in sample.skipped]
    assert "class 7" in reasons[0] and " pixels, and its image " in reasons[1]


def numbered(height: int, width: int) -> Sample:
    """An image whose pixels are their class, 0 to 199."""
    classes = (torch.arange(height * width) % 200).to(torch.uint8).view(height, width)
    return Sample(0, 0, classes.expand(3, -1, -1).contiguous(), torch.zeros(0, 4), torch.zeros(0).long(), None, classes)


def test_they_follow_their_image_by_hand() -> None:
    sample = numbered(20, 33)
    classes = sample.pixel_classes
    assert classes is not None
    _, [flipped] = make_batch([sample], [ViewParams(20, 999, flip=True)], CPU)
    expected = torch.full((32, 64), 255, dtype=torch.uint8)
    expected[:20, :33] = classes.flip(1)
    assert flipped.pixel_classes is not None and torch.equal(flipped.pixel_classes, expected)
    # Twice as large: each value four times; never one between two.
    images, [doubled] = make_batch([sample], [ViewParams(40, 999)], CPU)
    assert images.sizes_hw == ((40, 66),) and doubled.pixel_classes is not None
    assert torch.equal(doubled.pixel_classes[:40, :66], classes.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert (doubled.pixel_classes[40:] == 255).all() and (doubled.pixel_classes[:, 66:] == 255).all()
    cropped = crop_sample(sample, Crop(3, 5, 11, 13), CPU)
    assert cropped.pixel_classes is not None and torch.equal(cropped.pixel_classes, classes[3:14, 5:18])
    assert torch.equal(cropped.image[0], cropped.pixel_classes)
