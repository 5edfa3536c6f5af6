"""Lines of progress, on a terminal and elsewhere."""

import re

import pytest
from rich.control import strip_control_codes

from aligndet_cli import logs
from aligndet_cli.logs import Progress, duration


def test_plain_lines_come_every_five_seconds_at_first_and_once_a_minute_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    total = 300 * 4  # five minutes of four steps a second
    with Progress("training", total, "steps", mode="plain") as progress:
        for _ in range(total):
            now += 0.25
            progress.advance()
    shown = [int(line.split()[1].split("/")[0]) / 4 for line in capsys.readouterr().err.splitlines()]
    # Seconds: every five up to 55; from 60 on, the next is due a minute after the last; and the end.
    assert shown == [*range(5, 60, 5), 115, 175, 235, 295, 300]


def bar_at(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a bar in a terminal of that many columns."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    fields = {"loss": 0.532, "cls": 0.4, "box_reg": 0.132, "img/s": 14.2, "data-wait": "2%", "memory": "1.1 GB"}
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    with Progress("training", 12000, "steps", mode="bar", first="loss") as progress:
        now += 6000 / 31.2
        progress.advance(6000, **fields)
    return strip_control_codes(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (60, ("eta ", "loss 0.532", "steps/s")),
        (80, ("━", "eta ", "loss 0.532", "steps/s")),
        (160, ("━", "eta ", "loss 0.532", "steps/s", "cls 0.4", "box_reg 0.132", "img/s 14.2", "data-wait 2%")),
    ],
)
def test_a_bar_shows_the_loss_first_and_no_field_in_part(
    width: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = bar_at(width, monkeypatch, capsys)
    assert len(line) <= width and "…" not in line
    places = [line.find(text) for text in expected]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (36.4, "36 s"), (250, "4 min 10 s"), (7530, "2 h 5 min")]
)
def test_durations_are_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
