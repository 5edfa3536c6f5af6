import errno
import struct
from pathlib import Path

import pytest
from matplotlib.ft2font import FT2Font

from aligndet_cli import fonts
from aligndet_cli.plotting import FORMATS, finish_axes, never_failing, new_figure, save_figure, shorten, wrap

pytestmark = pytest.mark.plots


def test_an_error_while_drawing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with never_failing(Path("plots/x.png")):
        raise ValueError("no such font")
    assert "plots/x.png was not drawn: ValueError: no such font" in caplog.text
    with pytest.raises(KeyboardInterrupt), never_failing(Path("x")):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="No space"), never_failing(Path("x")):  # so that the run is continued
        raise OSError(errno.ENOSPC, "No space left on device")


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


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_of_the_kind_of_their_name_and_the_same_every_time(kind: str, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        figure = new_figure(3, 2)
        figure.add_subplot().set_title("title")
        save_figure(figure, tmp_path / f"a.{kind}")
        contents.append((tmp_path / f"a.{kind}").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind])
    if kind == "pdf":
        assert b"/FontFile2" in contents[0]  # TrueType, embedded


def test_no_letter_becomes_an_empty_box(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(fonts, "_warned", set())
    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    axes.set_yticks([0, 1], [shorten(name) for name in ("\U000e0041", "\u24b6")])  # no font has the first
    axes.set_title("1\n\u24b6")  # STIX has it
    figure.suptitle("\U000e0041\nb")
    save_figure(figure, tmp_path / "a.png")
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\U000e0041", "\u24b6"]
    assert axes.get_title() == "1\n\u24b6" and figure.get_suptitle() == "\\U000e0041\nb"
    for text in (axes.title, axes.get_yticklabels()[1]):
        assert ord("\u24b6") in FT2Font(text.get_fontproperties().get_file()).get_charmap()
    assert caplog.text.count("no font here has all letters of") == 1


def test_long_names_become_lines() -> None:
    lines = wrap("retinanet-resnet18-backbone-only", 20).split("\n")
    assert "".join(lines) == "retinanet-resnet18-backbone-only" and max(map(len, lines)) <= 20
