import struct
from pathlib import Path

import pytest

from aligndet_cli.plotting import COLOURS, hex_to_rgb, ink_on, never_failing, new_figure, save_figure, shorten


def test_an_error_while_drawing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with never_failing(Path("plots/x.png")):
        raise ValueError("no such font")
    assert "plots/x.png was not drawn: ValueError: no such font" in caplog.text
    with pytest.raises(KeyboardInterrupt), never_failing(Path("x")):
        raise KeyboardInterrupt


def test_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        figure = new_figure(3, 2)
        figure.add_subplot().plot([1, 2], [3, 4], label="\u4e2d")  # a letter that the font lacks
        save_figure(figure, tmp_path / "made" / name)
    content = (tmp_path / "made" / "a.png").read_bytes()
    assert content == (tmp_path / "made" / "b.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (300, 200)
    assert b"Software" not in content and b"matplotlib" not in content


def test_letters_can_be_read_on_every_colour() -> None:
    assert hex_to_rgb("#0072B2") == (0, 114, 178)

    def luminance(colour: tuple[int, int, int]) -> float:
        """Of WCAG 2."""
        levels = [(level / 255 + 0.055) ** 2.4 / 1.055**2.4 if level > 10 else level / 3294.6 for level in colour]
        return 0.2126 * levels[0] + 0.7152 * levels[1] + 0.0722 * levels[2]

    for colour in map(hex_to_rgb, COLOURS):
        light, dark = sorted((luminance(colour), luminance(ink_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, colour  # level AA


def test_long_names_are_shortened() -> None:
    assert shorten("a" * 22) == "a" * 22 and shorten("a" * 23) == "a" * 19 + "..."
