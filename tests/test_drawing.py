from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from aligndet_cli.drawing import LINE_HEIGHT, draw_boxes, draw_grid, draw_text, draw_tile, place_tag, save_picture
from aligndet_cli.plotting import COLOURS

BEHIND, WHITE = (232, 232, 232), (255, 255, 255)


def test_a_tile_holds_the_whole_image_and_its_boxes_scaled_alike() -> None:
    grey = np.full((100, 50, 3), 128, np.uint8)
    tile = draw_tile(grey, np.array([[10, 20, 40, 60]]), (200, 300), colours=["#ff0000"], lines=["one", "two"])
    assert tile.size == (300, 200 + 2 * LINE_HEIGHT)
    # 50 x 100 pixels become 100 x 200, from column 100 on; the box from (100 + 20, 40) to (100 + 80, 120).
    pixels = np.asarray(tile)
    assert (pixels[:200, :100] == BEHIND).all() and (pixels[:200, 200:] == BEHIND).all()
    is_red = (pixels == (255, 0, 0)).all(axis=2)
    rows, columns = np.nonzero(is_red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (41, 119, 121, 179)  # within a dark rim
    assert (pixels[0:200, 100:200][~is_red[:200, 100:200]] <= 128).all()
    assert draw_tile(None, np.zeros((0, 4)), (20, 30), colours=[]).getcolors() == [(600, BEHIND)]


def test_images_of_one_pixel_and_boxes_without_area_can_be_drawn() -> None:
    tile = draw_tile(np.zeros((1, 900, 3), np.uint8), np.zeros((1, 4)), (30, 40), colours=["#ffffff"], labels=["1"])
    assert tile.size == (40, 30)
    draw_boxes(Image.new("RGB", (1, 1)), np.array([[0.4, 0.4, 0.4, 0.4]]), ["#ffffff"], ["long"])


@pytest.mark.parametrize(
    ("box", "taken", "expected"),
    [
        ((20, 50, 60, 90), [], (20, 40, 50, 50)),  # above
        ((20, 5, 60, 90), [], (20, 5, 50, 15)),  # no room above: inside
        ((20, 50, 60, 90), [(0, 40, 60, 45)], (20, 50, 50, 60)),  # another tag above: inside
        ((90, 50, 99, 90), [], (70, 40, 100, 50)),  # not beyond the right border
        ((20, 50, 80, 90), [(0, 30, 49, 100)], (50, 40, 80, 50)),  # others at the left: at the right
        ((20, 50, 40, 100), [(0, 0, 100, 60), (0, 90, 100, 100)], (20, 60, 50, 70)),  # in a line of its own
        ((20, 50, 60, 90), [(0, 0, 100, 100)], None),  # nowhere
    ],
)
def test_tags_find_their_place(box, taken, expected) -> None:
    assert place_tag(box, (30, 10), (100, 100), taken) == expected


def test_no_label_covers_another() -> None:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 300, (40, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(20, 80, (40, 2))], axis=1)
    tags: list[tuple[float, float, float, float]] = []
    for box in boxes.tolist():
        found = place_tag(tuple(box), (60, 15), (400, 400), tags)
        tags += [found] if found is not None else []
    assert 30 < len(tags) <= 40
    for place, (x1, y1, x2, y2) in enumerate(tags):
        assert all(x2 <= a or c <= x1 or y2 <= b or d <= y1 for a, b, c, d in tags[:place])


def test_later_boxes_and_their_labels_are_on_top() -> None:
    image = Image.new("RGB", (30, 12), "white")  # room for one label
    draw_boxes(image, np.array([[5, 2, 25, 10], [5, 2, 25, 10]]), ["#ff0000", "#00ff00"], ["xx", "xx"])
    assert not (np.asarray(image) == (255, 0, 0)).all(axis=2).any()


def test_tiles_stand_in_rows_as_wide_and_high_as_the_largest() -> None:
    tiles = [Image.new("RGB", size, colour) for size, colour in (((4, 2), "red"), ((2, 3), "lime"), ((1, 1), "blue"))]
    grid = draw_grid(tiles, num_columns=2, gap=1)
    assert grid.size == (4 + 1 + 2, 3 + 1 + 1)
    assert [grid.getpixel(place) for place in ((0, 0), (5, 0), (0, 4))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert grid.getpixel((0, 2)) == grid.getpixel((4, 0)) == grid.getpixel((6, 4)) == WHITE


@pytest.mark.parametrize(
    "name",
    ["K\u00e4fer", "\u0436\u0443\u043a", "\u732b", "\U0001f9a9", "a\nb", "\udcff"],
    ids=["umlaut", "Cyrillic", "Chinese", "emoji", "two lines", "bytes that are no text"],
)
def test_every_name_can_be_read(name: str) -> None:
    shown = draw_text([name], 200)
    assert shown.size == (200, LINE_HEIGHT)
    for unreadable in ("", "?", "K?fer", "\U0010fffe", "\u732c", "a b"):
        assert shown.tobytes() != draw_text([unreadable], 200).tobytes()


def test_letters_are_taken_from_other_fonts_or_written_as_numbers() -> None:
    circled, nowhere = "\u24b6", "\U000e0041"  # STIX has the first, and comes with Matplotlib
    assert draw_text([circled], 200).tobytes() != draw_text([r"\u24b6"], 200).tobytes()
    assert draw_text([nowhere], 200).tobytes() == draw_text([r"\U000e0041"], 200).tobytes()


def test_long_lines_lose_their_beginning() -> None:
    short, long = (np.asarray(draw_text(["x" * count + "  640x480  3 boxes"], 200)) for count in (15, 500))
    assert (short[:, 100:] == WHITE).all(axis=2).mean() < 1
    ends = [np.nonzero((pixels != WHITE).any(axis=(0, 2)))[0][-1] for pixels in (short, long)]
    assert all(end < 196 for end in ends)
    width = 60  # of "3 boxes", about
    last = [pixels[:, end - width : end] for pixels, end in zip((short, long), ends, strict=True)]
    assert np.abs(last[0].astype(int) - last[1]).mean() < 20  # but for fractions of pixels
    assert draw_text(["x" * 50], 5).size == (5, LINE_HEIGHT)


def test_letters_can_be_read_on_every_colour() -> None:
    def luminance(colour: tuple[int, ...]) -> float:
        """Of WCAG 2."""
        levels = [(level / 255 + 0.055) ** 2.4 / 1.055**2.4 if level > 10 else level / 3294.6 for level in colour]
        return 0.2126 * levels[0] + 0.7152 * levels[1] + 0.0722 * levels[2]

    for colour in COLOURS:
        image = Image.new("RGB", (400, 300), colour)
        draw_boxes(image, np.array([[50, 50, 300, 250]]), [colour], ["M"])
        own = ImageColor.getrgb(colour)
        tag = np.asarray(image)[36:49, 50:64].reshape(-1, 3)  # above the box
        farthest = tag[np.abs(tag.astype(int) - own).sum(axis=1).argmax()]
        light, dark = sorted((luminance(own), luminance(tuple(farthest.tolist()))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, colour  # level AA


def test_pictures_are_written_after_their_names_and_the_same_every_time(tmp_path: Path) -> None:
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG")):
        save_picture(draw_text(["text"], 90), tmp_path / "made" / name)
        content = (tmp_path / "made" / name).read_bytes()
        save_picture(draw_text(["text"], 90), tmp_path / "made" / name)
        assert (tmp_path / "made" / name).read_bytes() == content
        with Image.open(tmp_path / "made" / name) as image:
            assert (image.format, image.size) == (kind, (90, LINE_HEIGHT))


def test_thin_boxes_can_be_drawn_wherever_they_lie() -> None:
    """A box narrower than its line gets room for it, also where floats are rounded."""
    places = np.random.default_rng(0).uniform(0, 40, (2000, 2))
    boxes = np.concatenate([places, places + (0.7, 30)], axis=1)
    for size, order in (((64, 80), [0, 1, 2, 3]), ((80, 64), [1, 0, 3, 2])):
        image = Image.new("RGB", size)
        draw_boxes(image, boxes[:, order], ["#0072B2"] * len(boxes))
        assert ImageColor.getrgb("#0072B2") in {colour for _, colour in image.getcolors()}
