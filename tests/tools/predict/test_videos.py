import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.errors import DataError
from aligndet_cli.tools.predict import videos
from aligndet_cli.tools.predict.videos import VideoReader, VideoWriter
from helpers.films import film


def test_frames_come_with_their_numbers_and_in_rgb(tmp_path: Path) -> None:
    reader = VideoReader(film(tmp_path / "a.avi", 7))
    frames = list(reader.frames(3))
    assert (reader.fps, reader.num_frames, reader.num_read) == (10.0, 7, 7)
    assert [number for number, _ in frames] == [0, 3, 6]
    for number, pixels in frames:
        assert pixels.shape == (64, 96, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels[:, 60:].astype(int) - 20 * number).max() < 6
        assert pixels[32, 10, 0] > 230 and pixels[32, 10, 2] < 25


def test_a_video_that_breaks_off_tells_how_much_is_missing(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.avi", 9).read_bytes()
    (tmp_path / "b.avi").write_bytes(whole[: len(whole) * 9 // 10])
    reader = VideoReader(tmp_path / "b.avi")
    assert 0 < len(list(reader.frames(1))) == reader.num_read < 9 == reader.num_frames


def test_what_is_no_video_is_named_and_nothing_else_is_printed(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"x\.mp4: not a video that can be read$"):
        VideoReader(tmp_path / "x.mp4")
    program = f"from aligndet_cli.tools.predict.videos import VideoReader; VideoReader({str(tmp_path / 'x.mp4')!r})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith("Traceback") and "moov" not in ran.stderr


@pytest.mark.parametrize(
    ("codecs", "written"),
    [
        (videos._CODECS, ["clip.mov.mp4"]),
        ((("none", ".mkv"), ("MJPG", ".avi")), ["clip.mov.avi"]),
        ((), [f"clip.mov/{number:06d}.jpg" for number in (0, 5, 10)]),
    ],
    ids=["first codec", "second codec", "no codec"],
)
def test_a_video_is_written_or_its_frames(codecs, written, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(videos, "_CODECS", codecs)
    writer = VideoWriter(tmp_path / "below" / "clip.mov", 2.5)
    for number in (0, 5, 10):
        writer.write(number, Image.new("RGB", (65, 49), (200, 20 * number, 0)))
    writer.close()
    files = sorted(path for path in (tmp_path / "below").rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path / "below")) for path in files] == written
    assert ("no codec" in caplog.text) == (not codecs)
    if codecs:
        reader = VideoReader(files[0])
        frames = [pixels for _, pixels in reader.frames(1)]
        assert (reader.fps, len(frames)) == (2.5, 3)
        assert np.abs(frames[2][20, 30].astype(int) - (200, 200, 0)).max() < 25
