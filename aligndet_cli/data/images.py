"""Read image files: one decoder and one EXIF rule for the whole package.

Pixels are turned upright by the EXIF orientation, and sizes refer to the upright image. Everything is
decoded by Pillow (torchvision depends on it): it uses libjpeg-turbo, is as fast as OpenCV on 640x480 JPEGs
(some 500-1,000 images/s per core), prints nothing, and unlike OpenCV refuses a truncated file instead of
returning it half grey.
"""

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from aligndet_cli.errors import DataError, is_of_machine

# Decoders by Pillow's name, with the suffixes of their files. Content decides, since files named .jpg that hold a GIF
# exist in public data sets. Pillow's own list also holds formats that run other programs (EPS).
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
_MISSING = {  # decoders that some builds of Pillow lack
    *(() if features.check_codec("jpg_2000") else ("JPEG2000",)),
    *(() if find_spec("PIL._avif") else ("AVIF",)),  # not `features`: it loads the decoder, which takes 20 ms
}
_FORMATS = tuple(name for name in _SUFFIXES if name not in _MISSING)
IMAGE_SUFFIXES = frozenset(suffix for name in _FORMATS for suffix in _SUFFIXES[name])

# Suffixes of images that no decoder above reads; files that hold one are left out and counted.
_PHOTOS = (".heic", ".heif", ".hif", ".jxl", ".jxr", ".tga", ".ico", ".pcx", ".psd", ".psb", ".xcf")
_RAW = (".dng", ".raw", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
_DRAWINGS = (".svg", ".svgz", ".eps", ".wmf", ".emf")
_MEASURED = (".exr", ".hdr", ".pfm", ".dcm", ".dicom", ".npy")
_MISSING_SUFFIXES = (suffix for name in _MISSING for suffix in _SUFFIXES[name])
UNREADABLE_SUFFIXES = frozenset((*_PHOTOS, *_RAW, *_DRAWINGS, *_MEASURED, *_MISSING_SUFFIXES))

# Errors that Pillow's decoders raise on damaged bytes.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

MAX_PIXELS = 2 * 89_478_485  # Pillow's limit: of a header that says more, it decodes nothing

# Warnings that do not concern the pixels: damaged EXIF blocks, and images above 89 megapixels (above 179: an error).
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112
_SHORT = 3
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})
_JPEG_REDUCTIONS = (8, 4, 2)  # factors by which libjpeg can shrink an image while decoding
_JPEG_FORMATS = ("JPEG", "MPO")  # Pillow's name for a JPEG with further pictures behind it is MPO
_END_OF_IMAGE = 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in the data of a scan, where restarts and FF 00 may stand too

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image, upright, as (H, W, 3) uint8 RGB; the array is writable and owns its memory.

    Grayscale is repeated into three channels; alpha is dropped, not composited (as OpenCV and mmdetection do);
    12-bit and 16-bit channels keep their eight highest bits; of animations the first frame is taken.

    Raises:
        DataError: the file is missing, empty, truncated, or not an image; one line naming it.
    """
    return decode_image(read_bytes(path), path)


def read_values(path: Path) -> NDArray[np.uint8]:
    """Decode an image of a single channel as (H, W), as it is; of one with a palette the numbers of the colours.

    Raises:
        DataError: as `read_image`, or more channels or bits.
    """
    content = read_bytes(path)
    image = _open(io.BytesIO(content), path, is_empty=not content)
    if image.mode not in ("L", "P"):
        raise DataError(f"{path}: has pixels of kind {image.mode}; needed is one number of 8 bits for each")
    try:
        return np.array(image)
    except _DECODER_ERRORS as error:
        raise DataError(f"{path}: truncated or damaged image ({error}); replace it") from None


def decode_image(content: bytes, path: Path) -> NDArray[np.uint8]:
    """Decode bytes into (H, W, 3) uint8 RGB as `read_image` does; `path` only names them in errors."""
    image = _open(io.BytesIO(content), path, is_empty=not content)
    return _decode(image, content, path)


def decode_reduced(content: bytes, path: Path, min_pixels: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode a JPEG at a half, a quarter or an eighth of both sides, and any other format at full size.

    The largest reduction that leaves at least `min_pixels` is used. A truncated file is refused all the same.

    Returns:
        The image (H, W, 3) uint8 RGB, upright, with sides rounded up, and height and width of the full image, upright.

    Raises:
        DataError: as `read_image`.
    """
    image = _open(io.BytesIO(content), path, is_empty=not content)
    width, height = image.size
    full_size_hw = (width, height) if _orientation(image) in _SWAPS_SIDES else (height, width)
    if image.format == "JPEG":
        for reduction in _JPEG_REDUCTIONS:
            if min(width, height) >= reduction and -(-width // reduction) * -(-height // reduction) >= min_pixels:
                image.draft(None, (width // reduction, height // reduction))
                break
    return _decode(image, content, path), full_size_hw


def read_size_hw(path: Path) -> tuple[int, int]:
    """Return height and width of the upright image, from the header alone.

    Raises:
        DataError: the file is missing, empty, or its header belongs to no image.
    """
    try:
        _refuse_pipe(path)
        with path.open("rb") as handle:
            image = _open(handle, path, is_empty=path.stat().st_size == 0)
            width, height = image.size
            return (width, height) if _orientation(image) in _SWAPS_SIDES else (height, width)
    except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
        if is_of_machine(error):
            raise
        raise _unreadable(path, error) from None


def read_missing_sizes(images_dir: Path, file_names: Sequence[str], sizes_hw: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return sizes (B, 2) in which zeros are replaced by height and width from the file header, if it can be read."""
    sizes_hw = sizes_hw.copy()
    for index in np.flatnonzero(sizes_hw[:, 0] == 0).tolist():
        with contextlib.suppress(DataError):  # the code that needs the pixels reports it
            sizes_hw[index] = read_size_hw(images_dir / file_names[index])
    return sizes_hw


def other_size(size_hw: tuple[int, int], said_hw: tuple[int, int]) -> str:
    """Return the end of a message about an image of another size than its labels say."""
    cause = " (rotated by EXIF? boxes must refer to the upright image)" if said_hw == size_hw[::-1] else ""
    said = f"{said_hw[1]}x{said_hw[0]}"
    return f"is {size_hw[1]}x{size_hw[0]} pixels but its labels say {said}{cause}; fix the file or its labels"


def is_image_file(name: str) -> bool:
    """Return True if a file name has the suffix of an image and is not hidden (like `._x.jpg` of macOS)."""
    return _has_suffix(name, IMAGE_SUFFIXES)


def is_unreadable_kind(name: str) -> bool:
    """Return True if a file name has the suffix of an image that cannot be read here, and is not hidden."""
    return _has_suffix(name, UNREADABLE_SUFFIXES)


def _has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    path = Path(name)
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def read_bytes(path: Path) -> bytes:
    """Return the content of an image file.

    Raises:
        DataError: the file is missing or cannot be read; one line naming it.
    """
    try:
        _refuse_pipe(path)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
        if is_of_machine(error):
            raise
        raise _unreadable(path, error) from None


def _refuse_pipe(path: Path) -> None:
    """Make sure that a path is no pipe, since reading a pipe would wait forever for a writer."""
    if path.is_fifo():
        raise DataError(f"{path}: is a pipe, not an image file")


def upright_pixels(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    """Return the pixels of an opened image as (H, W, 3) uint8 RGB, upright; `path` only names it in errors.

    Raises:
        DataError: its file is damaged, or its pixels have no known range.
    """
    orientation = _orientation(image)
    try:
        image.load()
    except _DECODER_ERRORS as error:
        raise DataError(f"{path}: truncated or damaged image ({error}); replace it or remove it") from None
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return _to_rgb(image, path)


def _decode(image: Image.Image, content: bytes, path: Path) -> NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of an image that was opened from `content`, upright."""
    if image.format in _JPEG_FORMATS and _has_lost_tail(content):
        raise DataError(f"{path}: truncated or damaged image (zeros instead of its end); replace it or remove it")
    return upright_pixels(image, path)


def _has_lost_tail(content: bytes) -> bool:
    """Return True if a JPEG ends in zeros before its end-of-image marker, as a copy does that was broken off.

    libjpeg decodes zeros to grey without an error. Zeros after a complete image are padding.
    """
    if not content.endswith(b"\0\0"):
        return False
    place = 2  # behind the start-of-image marker
    while marker := _MARKER.search(content, place):
        place = marker.end()
        kind = content[place - 1]
        if kind == _END_OF_IMAGE:
            return False
        # Thumbnails, which have markers of their own, lie in segments, which are jumped over.
        place += int.from_bytes(content[place : place + 2], "big")
    return True


def _open(handle: BinaryIO | io.BytesIO, path: Path, *, is_empty: bool) -> Image.Image:
    if is_empty:
        raise DataError(f"{path}: empty file (0 bytes); copy it again or remove it")
    try:
        return Image.open(handle, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise DataError(
            f"{path}: has more than {MAX_PIXELS // 10**6} megapixels; make it smaller or cut it into tiles"
        ) from None
    except _DECODER_ERRORS as error:
        # Pillow's own text for unknown content shows a memory address.
        detail = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({error})"
        remedy = "convert it to JPEG" if is_unreadable_kind(path.name) else "replace it or remove it"
        raise DataError(f"{path}: not an image that can be read{detail}; {remedy}") from None


def _unreadable(path: Path, error: OSError | ValueError) -> DataError:
    if isinstance(error, FileNotFoundError | ValueError):
        return DataError(f"{path}: no such image file; check the path")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{path}: is a folder, not an image file")
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8 from the bytes before the pixels; 1 if there is none.

    `Image.getexif` is not used: it warns on damaged EXIF blocks and decodes a whole PNG to look for a block behind
    the pixels. Pillow itself turns TIFF files upright.
    """
    block = image.info.get("exif")
    if image.format == "TIFF" or not isinstance(block, bytes):
        return 1
    tiff = block.removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(num_entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return int(value) if kind == _SHORT and value in _TRANSPOSE else 1
    except struct.error:  # the block ends early: no orientation, but the pixels may be fine
        return 1
    return 1


def _to_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    if image.mode == "RGB":
        return np.array(image)
    if image.mode == "F":
        raise DataError(f"{path}: floating-point pixels have no known range; convert the image to 8 bits")
    if image.mode == "I" and image.format == "TIFF":  # in other formats, I holds 16 bits
        raise DataError(f"{path}: 32-bit or signed pixels have no known range; convert the image to 8 bits")
    if image.mode.startswith("I"):
        return np.repeat(_highest_bits(image)[:, :, None], 3, axis=2)
    # P: straight to RGB would warn where the palette has transparent entries. La: premultiplied alpha, of TIFF.
    if between := {"P": "RGBA", "La": "LA"}.get(image.mode):
        image = image.convert(between)
    return np.array(image.convert("RGB"))


def _highest_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Return the eight highest bits (H, W) of grey levels of 12 or 16 bits, as Pillow does for 16-bit colour."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    num_bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    levels = np.clip(np.array(image).astype(np.int64), 0, 2**num_bits - 1)
    gray = (levels >> (num_bits - 8)).astype(np.uint8)
    return 255 - gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray
