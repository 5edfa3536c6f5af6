"""Videos as frames, one at a time, and annotated frames as a video."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger
from aligndet_cli.tools.predict.pictures import save_jpeg

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))
_CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))  # the first that this machine's OpenCV can write
_DEFAULT_FPS = 25.0  # of a video that does not say


class VideoReader:
    """Every so manieth frame of a video, from its first; at most one is in memory.

    Attributes:
        fps: frames per second.
        num_frames: what the file says; 0 if it does not.
        num_read: frames passed so far, also those between the ones asked for.

    Raises:
        DataError: the file cannot be opened, or holds no video.
    """

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # our line says what is wrong
        self.path = path
        with _silent():
            self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise DataError(f"{path}: not a video that can be read")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if math.isfinite(fps) and fps > 0 else _DEFAULT_FPS
        self.num_frames = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        self.num_read = 0

    def frames(self, every: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield number (from 0) and pixels (H, W, 3) uint8 RGB of frames 0, `every`, 2 * `every` and so on."""
        try:
            while self._capture.grab():
                number = self.num_read
                self.num_read += 1
                if number % every:
                    continue
                is_read, pixels = self._capture.retrieve()
                if is_read:
                    yield number, np.ascontiguousarray(pixels[:, :, ::-1])
        finally:
            self._capture.release()


class VideoWriter:
    """Frames written as a video, or, where OpenCV has no codec, as one picture each.

    Args:
        file: where the video goes; its suffix is added if it is not one of the codec's.
        fps: frames per second.
    """

    def __init__(self, file: Path, fps: float) -> None:
        self.file, self.fps = file, fps
        self._writer: Any = None

    def write(self, number: int, image: Image.Image) -> None:
        """Write the next frame; all have the size of the first."""
        if self._writer is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._open(image.size)
        if self._writer:
            self._writer.write(np.asarray(image)[:, :, ::-1])
            return
        save_jpeg(image, self.file / f"{number:06d}.jpg")

    def close(self) -> None:
        """Finish the file."""
        if self._writer:
            self._writer.release()

    def _open(self, size: tuple[int, int]) -> Any:
        for codec, suffix in _CODECS:
            same = self.file.suffix.lower() == suffix
            file = self.file if same else self.file.with_name(f"{self.file.name}{suffix}")
            with _silent():
                writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*codec), self.fps, size)
            if writer.isOpened():
                return writer
            file.unlink(missing_ok=True)
        logger.warning(f"{self.file.name}: OpenCV has no codec to write a video here; its frames are pictures instead")
        return False


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep OpenCV from printing what we say ourselves."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
