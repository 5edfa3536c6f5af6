"""Lines of progress, on a terminal and elsewhere."""

import io
import re

import pytest
from rich.control import strip_control_codes

from aligndet_cli import logs
from aligndet_cli.logs import Progress, duration, fold, logger
from helpers.commandline import own_logging


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


def screen_of(output: str) -> list[str]:
    """The lines that a terminal shows, if none is longer than it."""
    shown = []
    for line in output.replace("\r\n", "\n").split("\n"):
        last = re.split(r"\x1b\[2K|\r", line)[-1]
        shown.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).rstrip())
    return [line for line in shown if line]


def test_a_message_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with own_logging():
        logs.setup_logging(0)
        with Progress("training", 3, "steps", mode="bar") as progress:
            progress.advance()
            logger.info("first step (1): 4 images of up to 96x160")
            logger.warning("[red]5[/] images are left out")
            progress.advance(2)
        logger.info("afterwards")
    first, second, bar, last = screen_of(capsys.readouterr().err)
    assert first == "first step (1): 4 images of up to 96x160"
    assert second == "warning: [red]5[/] images are left out"
    assert bar.startswith("training ━") and "3/3" in bar
    assert last == "afterwards"


def test_a_speed_is_a_plain_number_and_never_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    with Progress("cluster: k-means", 917_760, "proposals", mode="bar") as progress:
        now += 0.6
        progress.advance(917_760)
    (line,) = screen_of(capsys.readouterr().err)
    # 917,760 in 0.6 s are 1,529,600 a second; the unit has no room
    assert line.endswith(" 1,530,000/s") and len(line) <= 80


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("short enough", ["short enough"]),
        ("a sentence that is longer than it is wide", ["a sentence that is longer", "than it is wide"]),
        ("  weights  of a file of torchvision", ["  weights  of a file of", "           torchvision"]),
        ("in /a/path/that-is-longer-than-the-line/x.pt", ["in", "/a/path/that-is-longer-than-the-line/x.pt"]),
    ],
)
def test_lines_break_between_words(line: str, expected: list[str]) -> None:
    assert fold(line, 25).splitlines() == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_lines_are_folded_and_commands_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    command = "next: aligndet finetune DATA --detector retinanet --workspace experiments"
    sentence = "a line of the log that is longer than forty columns"
    told = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(logs.sys, "stderr", stream)
        with own_logging():
            logs.setup_logging(0)
            logger.info(sentence)
            logger.info(command)
        told.append(stream.getvalue().splitlines())
    assert told[0] == ["a line of the log that is longer than", "forty columns", command]
    assert told[1] == [sentence, command]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (36.4, "36 s"), (250, "4 min 10 s"), (7530, "2 h 5 min")]
)
def test_durations_are_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
