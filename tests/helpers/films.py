"""Videos drawn on the spot."""

from pathlib import Path

import cv2
import numpy as np


def film(file: Path, num_frames: int, size: tuple[int, int] = (96, 64)) -> Path:
    """A video whose frame n has a grey level of 20 * n, but for its red left half."""
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 10, size)
    for number in range(num_frames):
        pixels = np.full((size[1], size[0], 3), 20 * number % 256, dtype=np.uint8)
        pixels[:, : size[0] // 2] = (0, 0, 255)  # BGR
        writer.write(pixels)
    writer.release()
    return file
