import struct
from pathlib import Path

import pytest

from aligndet_cli.plotting import finish_axes, never_failing, new_figure, save_figure, shorten


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


def test_dollars_are_letters_and_powers_of_ten_are_numbers(tmp_path: Path) -> None:
    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    axes.plot([1, 2], [1, 1000], label=r"$\frac{$")  # an error where it is read as mathematics
    axes.set_yscale("log")
    finish_axes(axes, title="$x$")
    save_figure(figure, tmp_path / "a.png")
    assert not axes.title.get_parse_math() and axes.get_yticklabels()[2].get_parse_math()
    assert "mathdefault" in axes.get_yticklabels()[2].get_text()


def test_long_names_are_shortened() -> None:
    assert shorten("a" * 22) == "a" * 22 and shorten("a" * 23) == "a" * 19 + "..."
