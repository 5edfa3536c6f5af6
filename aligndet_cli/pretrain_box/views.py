"""Resolution and random changes of the views of images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from aligndet_cli.config import Frozen, Side
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.sides import Sides
from aligndet_cli.data.transforms import ViewParams, draw_view

VIEWS = (1, 2)


class ViewsConfig(Frozen):
    """Resolution of the views."""

    # AlignDet §4.1; coco_soft-teacher.py
    short_side: Sides = Field(
        (640, 672, 704, 736, 768, 800),
        description="Short sides in pixels (or 400..1400), one of which is drawn for each view.",
    )
    long_side: Side = Field(1333, description="Largest long side in pixels.")


@dataclass(frozen=True)
class ViewChanges:
    """Kinds of random changes of an image beside its size."""

    flip: bool = True
    colour: bool = True


ALL_CHANGES = ViewChanges()


def draw_views(
    samples: Sequence[Sample], number: int, resolution: ViewsConfig, seed: int, changes: ViewChanges = ALL_CHANGES
) -> list[ViewParams]:
    """Draw the parameters of view `number` (of `VIEWS`) for each of B samples."""
    sides = resolution.short_side, resolution.long_side
    drawn = [draw_view((seed, one.position, number), *sides, with_colour=changes.colour) for one in samples]
    return drawn if changes.flip else [replace(one, flip=False) for one in drawn]
