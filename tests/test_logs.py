"""Lines of progress where there is no terminal."""

import pytest

from aligndet_cli import logs
from aligndet_cli.logs import Progress


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
