"""A step in a process of its own: its memory, and its end if that is too much."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aligndet_cli.errors import RunError
from aligndet_cli.training import footprint as footprint_module
from aligndet_cli.training.footprint import Footprint, try_step
from helpers.commandline import environment
from helpers.hungry import hungry_trial

GB = 10**9
# As people write it, without `if __name__ == "__main__":`.
SCRIPT = """
import sys
print("this line")
sys.path.append(sys.argv[1])
from aligndet_cli.training.footprint import try_step
from helpers.hungry import hungry_trial
print("measured", try_step(hungry_trial(per_pixel=1), room=2 * 10**9) is not None)
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell")


def test_what_a_batch_takes() -> None:
    footprint = Footprint(started=7, unused=5, fixed=1000, per_image=100, per_sample=3, gaps=2.0)
    assert footprint.of(1) == 1000 + 200 + 2 * 3  # as much again in gaps
    assert footprint.of(8) == 1000 + 8 * 200 + 8 * 2 * 3
    assert footprint.of(8, 4) == 1000 + 2 * 200 + 8 * 2 * 3  # four times two images
    assert footprint.of(8, 4, is_sparing=True) == 1000 + 220 + 8 * 2 * 3


def test_memory_of_a_step_is_measured() -> None:
    # 20,000 pixels of 10,000 bytes are 200 MB; the strip before is a twentieth of that.
    footprint = try_step(hungry_trial(per_pixel=10_000, at_once=300_000_000), room=2 * GB)
    assert footprint is not None
    assert footprint.per_image == pytest.approx(200e6, rel=0.1)
    assert footprint.fixed == pytest.approx(300e6, rel=0.2)
    assert footprint.per_sample == 3 * 20_000 and footprint.started > 50e6


def test_a_step_that_takes_too_much_is_one_line_and_no_harm() -> None:
    with pytest.raises(RunError) as error:
        try_step(hungry_trial(per_pixel=100_000), room=GB)  # 2 GB
    line = "a step with a single image of 100x200 needs more than the 1 GB of memory that are free"
    assert str(error.value) == f"{line}: lower --short-side and --long-side"


def test_what_fails_otherwise_says_nothing_about_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="aligndet"):
        assert try_step(hungry_trial(problem="no such thing"), room=GB) is None
    assert "ValueError: no such thing" in caplog.text


def test_the_script_that_calls_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "pickle.py").write_text("raise SystemExit")  # a file of the user's that is named like one of Python's
    words = [sys.executable, "-P", "script.py", str(Path(__file__).parents[1])]
    ran = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n") == ["this line", "measured True", ""] and ran.stderr == ""


def test_a_process_that_does_not_start_says_nothing_about_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(footprint_module, "_PROGRAM", "raise SystemExit(3)")
    with caplog.at_level("INFO", logger="aligndet"):
        assert try_step(hungry_trial(), room=GB) is None
    assert "its process ended at once, with exit code 3" in caplog.text


def test_a_process_that_takes_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint_module, "_PATIENCE_S", 0.0)
    assert try_step(hungry_trial(), room=GB) is None


def test_a_process_that_is_killed_counts_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = lambda pid: os.kill(pid, signal.SIGKILL)  # noqa: E731
    monkeypatch.setattr(footprint_module, "process_usage", kill)
    with pytest.raises(RunError, match="single image"):
        try_step(hungry_trial(), room=GB)
