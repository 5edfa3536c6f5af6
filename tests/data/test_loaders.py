import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.data.loaders import LabelBoxes, SampleStream, StreamSampler, batches_of_run, evaluation_batches
from aligndet_cli.data.open import open_images
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.errors import DataError
from aligndet_cli.processes.devices import Process


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    draw_toy_data(folder, seed=0, num_train=7, num_val=3, size_hw=(64, 80))
    return folder


@pytest.fixture
def images(toy: Path) -> ImageSet:
    return open_images(DataConfig(root=toy), purpose="train")


def sampler(num_images: int, start: int = 0, rank: int = 0, world: int = 1) -> StreamSampler:
    """Steps of 4 images; the first three images of each five are wide, the others tall."""
    process = Process(rank=rank, world_size=world)
    aspects = np.where(np.arange(num_images) % 5 < 3, 1.5, 0.75)
    return StreamSampler(aspects, 4, seed=5, start_step=start, num_steps=6, process=process)


def batches_of(stream: SampleStream, workers: int, num_steps: int = 6) -> list[list[Sample]]:
    return list(batches_of_run(stream, 4, steps=range(num_steps), seed=5, num_workers=workers, process=Process()))


def test_every_image_once_per_epoch_and_epochs_differ() -> None:
    places = [place for batch in sampler(8) for place in batch]
    assert [position for position, _ in places] == list(range(24))
    rows = [row for _, row in places]
    assert sorted(rows[:8]) == sorted(rows[8:16]) == sorted(rows[16:]) == list(range(8))
    assert rows[:8] != rows[8:16]


def test_two_ranks_share_what_one_would_take() -> None:
    whole = list(sampler(7))
    parts = [list(sampler(7, rank=rank, world=2)) for rank in range(2)]
    assert whole == [first + second for first, second in zip(*parts, strict=True)]


def test_two_processes_together_see_every_image_once_an_epoch() -> None:
    """17 images in steps of 4: epochs end within a step, whose images the two processes share."""
    parts = [list(sampler(17, rank=rank, world=2)) for rank in range(2)]
    seen = sorted(place for part in parts for batch in part for place in batch)
    assert [position for position, _ in seen] == list(range(24))
    assert sorted(row for _, row in seen[:17]) == list(range(17))
    assert {len({row for batch in part for _, row in batch}) for part in parts} != {17}


def test_resuming_continues_the_stream() -> None:
    assert list(sampler(7))[4:] == list(sampler(7, start=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_workers(images: ImageSet, workers: int) -> None:
    stream = SampleStream(images, range(len(images)), LabelBoxes(images), "skip")
    batches = batches_of(stream, workers)
    reference = batches_of(stream, 0)
    assert [[s.index for s in batch] for batch in batches] == [[s.index for s in batch] for batch in reference]
    for batch, expected in zip(batches, reference, strict=True):
        assert all(torch.equal(one.image, two.image) for one, two in zip(batch, expected, strict=True))


def test_crowds_are_not_trained_on(toy: Path, images: ImageSet) -> None:
    crowded = np.ones(len(images.boxes), dtype=bool)
    changed = ImageSet(**{**images.__dict__, "is_crowd": crowded})
    assert all(len(LabelBoxes(changed).boxes_and_classes(index)[0]) == 0 for index in range(len(images)))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_or_fatal(tmp_path: Path, workers: int) -> None:
    draw_toy_data(tmp_path, seed=0, num_train=7, num_val=1, size_hw=(64, 80))
    images = open_images(DataConfig(root=tmp_path), purpose="train")
    broken = images.record(2).path
    broken.write_bytes(broken.read_bytes()[:200])
    stream = SampleStream(images, range(7), LabelBoxes(images), "skip")
    batches = batches_of(stream, workers)
    skipped = {file for batch in batches for sample in batch for file, _ in sample.skipped}
    assert skipped == {images.file_names[2]}
    assert all(sample.index != 2 for batch in batches for sample in batch)
    strict = SampleStream(images, range(7), LabelBoxes(images), "fail")
    with pytest.raises(DataError, match=broken.name) as caught:
        batches_of(strict, workers)
    assert "\n" not in str(caught.value)


def test_a_size_that_contradicts_the_labels_is_an_error(tmp_path: Path) -> None:
    draw_toy_data(tmp_path, seed=0, num_train=3, num_val=1, size_hw=(64, 80))
    labels = next((tmp_path / "annotations").glob("*train*.json"))
    content = json.loads(labels.read_text())
    for image in content["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    labels.write_text(json.dumps(content))
    images = open_images(DataConfig(root=tmp_path), purpose="train")
    with pytest.raises(DataError, match="pixels but its labels say"):
        SampleStream(images, range(3), LabelBoxes(images), "fail")[(0, 0)]
    for row in range(3):  # the reason is that of the first image, whichever is tried first
        with pytest.raises(DataError) as caught:
            SampleStream(images, range(3), LabelBoxes(images), "skip")[(0, row)]
        first = re.escape(f"none of the 3 images can be read; the first: {images.file_names[0]}: is ")
        assert re.search(rf"{first}\d+x\d+ pixels but its labels say \d+x\d+", str(caught.value))


def test_evaluation_goes_through_all_images_in_order(images: ImageSet) -> None:
    batches = evaluation_batches(
        images,
        indices=[5, 0, 3],
        batch_size=2,
        resolution=(32, 99),
        num_workers=0,
        device=torch.device("cpu"),
    )
    found = list(batches)
    assert [indices for indices, _, _ in found] == [[5, 0], [3]]
    for indices, batch, sizes in found:
        assert [tuple(images.sizes_hw[index]) for index in indices] == sizes
        assert all(min(size_hw) == 32 for size_hw in batch.sizes_hw)


def test_a_batch_may_be_larger_than_the_data_set(images: ImageSet) -> None:
    aspects = np.array([2.0, 0.5, 1.0])
    two_epochs = StreamSampler(aspects, 4, seed=5, start_step=0, num_steps=3, process=Process())
    rows = [row for batch in two_epochs for _, row in batch]
    assert all(sorted(rows[start : start + 3]) == [0, 1, 2] for start in (0, 3, 6, 9))
    stream = SampleStream(images, [0, 2, 4], LabelBoxes(images), "fail")
    batches = batches_of_run(stream, 4, steps=range(3), seed=5, num_workers=0, process=Process(), aspects=aspects)
    assert [sample.index for batch in batches for sample in batch] == [2 * row for row in rows]


def test_a_run_takes_up_its_batches_at_any_step(images: ImageSet) -> None:
    stream = SampleStream(images, range(len(images)), LabelBoxes(images), "fail")
    rest = batches_of_run(stream, 4, steps=range(4, 6), seed=5, num_workers=0, process=Process())
    indices = [[sample.index for sample in batch] for batch in rest]
    assert indices == [[sample.index for sample in batch] for batch in batches_of(stream, 0)[4:]]


def test_positions_are_found_in_any_order() -> None:
    known = np.array([30, 10, 20])
    assert positions_of(np.array([10, 5, 30, 40, 20, 10]), known).tolist() == [1, -1, 0, -1, 2, 1]
    assert positions_of(np.array([1]), np.array([], dtype=np.int64)).tolist() == [-1]
