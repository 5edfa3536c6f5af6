"""Short sides, and ranges of them that are written short."""

import pytest
from pydantic import ValidationError

from aligndet_cli.data.sides import fold_sides, show_limits, show_sides
from aligndet_cli.finetune.views import ResolutionConfig
from aligndet_cli.pretrain_box.views import ViewsConfig


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        (["400..403"], (400, 401, 402, 403)),
        ("400..403", (400, 401, 402, 403)),
        (["320", "400..402", 640], (320, 400, 401, 402, 640)),
        (["64..64"], (64,)),
        ([640, 672], (640, 672)),
    ],
)
def test_ranges_are_all_sides_in_them(given: object, sides: tuple[int, ...]) -> None:
    for config in (ResolutionConfig, ViewsConfig):
        resolved = config.model_validate({"short_side": given})
        assert resolved.short_side == sides
        assert config.model_validate_json(resolved.model_dump_json()) == resolved


@pytest.mark.parametrize("given", ["1400..400", "400..", "400...500", "0..100000", "16..64", "", []])
def test_what_is_no_range_is_refused(given: object) -> None:
    with pytest.raises(ValidationError):
        ResolutionConfig.model_validate({"short_side": given})


@pytest.mark.parametrize("given", ["400..", "..400", "400-1400", "400...1400", "400 .. 1400"])
def test_what_is_nearly_a_range_is_told_how_to_write_one(given: str) -> None:
    with pytest.raises(ValidationError, match="write a side in pixels, or a range of sides such as 400..1400"):
        ResolutionConfig.model_validate({"short_side": given})


def test_a_range_of_small_sides_is_one_mistake() -> None:
    with pytest.raises(ValidationError, match="10..20: a side should be 32 or more") as caught:
        ResolutionConfig.model_validate({"short_side": "10..20"})
    assert caught.value.error_count() == 1


def test_a_file_and_people_see_ranges() -> None:
    resolved = ResolutionConfig.model_validate({"short_side": "400..1400"})
    assert len(resolved.short_side or ()) == 1001
    assert resolved.model_dump(mode="json")["short_side"] == ["400..1400"]
    assert fold_sides((640, 672, 704)) == [640, 672, 704] and fold_sides((40, 41, 60)) == [40, 41, 60]
    assert show_sides((480, 512)) == "[480, 512]" and show_sides((320, *range(400, 1401))) == "[320, 400..1400]"


def test_short_sides_above_the_long_side_are_told() -> None:
    assert show_limits((480, 512), 512) == "short side [480, 512], long side 512"
    some, every = show_limits((480, 640), 512), show_limits((640, 800), 512)
    assert some == (
        "short side [480, 640], long side 512 ([640] are above it, so the long side alone decides; "
        "--short-side sets smaller ones)"
    )
    assert "(every short side is above it" in every
