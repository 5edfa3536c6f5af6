from dataclasses import fields, replace
from pathlib import Path

import torch

from aligndet_cli.data.packing import pack, unpack
from aligndet_cli.data.sample import Sample


def sample(position: int, size_hw: tuple[int, int], num_boxes: int, *, with_masks: bool = False) -> Sample:
    generator = torch.Generator().manual_seed(position)
    return Sample(
        position,
        index=10 * position,
        image=torch.randint(256, (3, *size_hw), dtype=torch.uint8, generator=generator),
        boxes=torch.rand((num_boxes, 4), generator=generator),
        class_ids=torch.randint(9, (num_boxes,), generator=generator),
        masks=torch.rand((num_boxes, *size_hw), generator=generator) > 0.5 if with_masks else None,
    )


def through_a_file(samples: list[Sample], folder: Path) -> list[Sample]:
    packed = pack(samples)
    with (folder / "block").open("w+b", buffering=0) as file:
        packed.write(file)
        file.seek(0)
        block = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    copied = torch.zeros(packed.size, dtype=torch.uint8)
    packed.copy_to(copied)
    assert torch.equal(block, copied)
    found: list[Sample] = unpack(packed.head, block)
    return found


def test_samples_come_out_as_they_went_in(tmp_path: Path) -> None:
    samples = [
        sample(1, (5, 7), 2, with_masks=True),
        sample(2, (3, 11), 0, with_masks=True),
        sample(3, (13, 2), 3),
        replace(sample(4, (1, 1), 1), skipped=(("a.jpg", "is empty"),)),
    ]
    for before, after in zip(samples, through_a_file(samples, tmp_path), strict=True):
        for name in (field.name for field in fields(Sample)):
            one, two = getattr(before, name), getattr(after, name)
            if isinstance(one, torch.Tensor):
                assert one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two), name
            else:
                assert one == two, name


def test_images_that_are_views_in_another_order(tmp_path: Path) -> None:
    upright = sample(1, (4, 6), 0)
    turned = replace(upright, image=upright.image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert torch.equal(through_a_file([turned], tmp_path)[0].image, upright.image)
