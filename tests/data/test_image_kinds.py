"""Every mode and format that Pillow writes, and some that it does not: colours, or an error of one line."""

import io
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from aligndet_cli.data.images import (
    IMAGE_SUFFIXES,
    UNREADABLE_SUFFIXES,
    decode_image,
    decode_reduced,
    is_image_file,
    is_unreadable_kind,
    read_image,
    read_size_hw,
)
from aligndet_cli.errors import DataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
MAY_BE_MISSING = {"JPEG2000": "jpg_2000", "AVIF": "avif"}
TONES = ((20, 60, 120), (240, 200, 160))
MORE_BITS = ("I;16", "I;16L", "I;16B", "I", "F")


def two_tone(mode: str) -> Image.Image:
    """16x32 pixels, the left half darker: levels 0x20 and 0xC8 of grey, see `TONES` for colours."""
    if mode in MORE_BITS:
        dtype = {"I;16B": ">u2", "I": "<i4", "F": "<f4"}.get(mode, "<u2")
        levels = np.repeat(np.array([[0x2000, 0xC800]]), 16, axis=1).repeat(16, axis=0)
        return Image.frombytes(mode, (32, 16), levels.astype(dtype).tobytes())
    if mode == "LAB":
        left, right = (Image.new("LAB", (16, 16), (level, 128, 128)) for level in (0x40, 0xC0))
    else:
        tones = ((0, 0, 0), (255, 255, 255)) if mode == "1" else TONES
        left, right = (Image.new("RGB", (16, 16), tone) for tone in tones)
    whole = Image.new(left.mode, (32, 16))
    whole.paste(left, (0, 0))
    whole.paste(right, (16, 0))
    if mode in ("P", "PA"):
        return whole.quantize(2).convert(mode)
    return whole if mode == "LAB" else whole.convert(mode)


def tones_of(mode: str) -> list[list[int]]:
    """Return the two colours of `two_tone` as they must be read."""
    if mode in MORE_BITS:
        return [[0x20] * 3, [0xC8] * 3]
    if mode == "LAB":  # L* 25.1 and 75.3 are a luminance of 0.0445 and 0.487, which sRGB writes as 60 and 186
        return [[60] * 3, [186] * 3]
    if mode == "1":
        return [[0] * 3, [255] * 3]
    if mode in ("L", "LA"):  # 0.299 R + 0.587 G + 0.114 B
        return [[55] * 3, [207] * 3]
    return [list(tone) for tone in TONES]


def written() -> list[tuple[str, str, bytes]]:
    """Return every mode and format that Pillow can write, with the file."""
    found = []
    for mode, name in itertools.product((*EIGHT_BITS, *MORE_BITS), FORMATS):
        if name in MAY_BE_MISSING and not features.check(MAY_BE_MISSING[name]):
            continue
        if (mode, name) == ("I;16B", "JPEG2000"):  # Pillow writes the two bytes swapped
            continue
        buffer = io.BytesIO()
        try:
            two_tone(mode).save(buffer, format=name)
        except (OSError, KeyError, ValueError):  # the format has no such pixels
            continue
        found.append((mode, name, buffer.getvalue()))
    return found


WRITTEN = written()


def tiff(levels: np.ndarray, *, bits: int, sample_format: int = 1, photometric: int = 1, alpha: int = 0) -> bytes:
    """Return a little-endian TIFF of one strip, for kinds that Pillow does not write; `levels` (1, W) as stored.

    With `alpha` 1 each level is followed by alpha, with which it is multiplied.
    """
    data = levels.tobytes()
    width = len(data) * 8 // bits // (1 + alpha)
    short, long = 3, 4
    entries = [
        (256, long, width),
        (257, long, 1),
        (258, short, bits * (1 + (alpha << 16))),  # one or two numbers
        (259, short, 1),
        (262, short, photometric),
        (273, long, 8),
        (277, short, 1 + alpha),
        (278, long, 1),
        (279, long, len(data)),
        *([(338, short, 1)] if alpha else []),
        *([] if alpha else [(339, short, sample_format)]),
    ]
    data += b"\0" * (len(data) % 2)
    table = b"".join(struct.pack("<HHII", tag, kind, 1 + alpha * (tag == 258), value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + b"\0" * 4


@pytest.mark.parametrize(("mode", "name", "content"), WRITTEN, ids=[f"{mode} {name}" for mode, name, _ in WRITTEN])
def test_every_mode_of_every_format_keeps_its_colours_or_is_refused_in_one_line(
    mode: str, name: str, content: bytes
) -> None:
    path = Path("a.jpg")  # the content decides, not the suffix
    if (mode, name) in (("F", "TIFF"), ("F", "PPM"), ("I", "TIFF")):
        with pytest.raises(DataError, match=r"^a\.jpg: .* have no known range; convert the image to 8 bits$"):
            decode_image(content, path)
        return
    pixels = decode_image(content, path)
    assert pixels.shape == (16, 32, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    if mode in MORE_BITS and name in ("GIF", "WEBP", "AVIF"):
        return  # these formats have 8 bits: Pillow has cut the values when it wrote the file
    tolerance = 6 if name in ("JPEG", "WEBP", "AVIF") or mode == "YCbCr" else 2
    np.testing.assert_allclose(pixels[8, [4, 28]].astype(int), tones_of(mode), atol=tolerance)


def test_all_formats_of_the_list_were_written() -> None:
    there = {name for name in FORMATS if name not in MAY_BE_MISSING or features.check(MAY_BE_MISSING[name])}
    assert {name for _, name, _ in WRITTEN} == there and len(WRITTEN) > 60


@pytest.mark.parametrize(
    ("content", "right"),
    [
        (tiff(np.array([[0x12, 0x38, 0xFF]], dtype=np.uint8), bits=12), [0x12, 0x8F]),  # 0x123, 0x8FF
        (tiff(np.array([[0x1234, 0xFFFF]], dtype="<u2"), bits=16), [0x12, 0xFF]),
        (tiff(np.array([[0x1234, 0xFFFF]], dtype="<u2"), bits=16, photometric=0), [0xED, 0x00]),  # white is zero
        (tiff(np.array([[5, 250]], dtype=np.uint8), bits=8, photometric=0), [250, 5]),
        (tiff(np.array([[50, 100, 30, 30]], dtype=np.uint8), bits=8, alpha=1), [127, 255]),  # 255 * 50 / 100
        (tiff(np.array([[5, -5]], dtype="<i2"), bits=16, sample_format=2), None),
        (tiff(np.array([[0, 255]], dtype="<u4"), bits=32), None),
        (tiff(np.array([[0, -255]], dtype="<i4"), bits=32, sample_format=2), None),
        (tiff(np.array([[0, 1]], dtype="<f4"), bits=32, sample_format=3), None),
    ],
    ids=[
        "12 bits",
        "16 bits",
        "16 bits inverted",
        "8 bits inverted",
        "premultiplied alpha",
        "signed 16",
        "32",
        "signed 32",
        "float",
    ],
)
def test_grey_tiffs_of_known_range_keep_their_highest_bits_and_others_are_refused(
    content: bytes, right: list[int] | None
) -> None:
    if right is None:
        with pytest.raises(DataError, match=r"have no known range; convert the image to 8 bits$"):
            decode_image(content, Path("a.tif"))
    else:
        pixels = decode_image(content, Path("a.tif"))
        assert pixels.tolist() == [[[level] * 3 for level in right]]


def huge(name: str) -> bytes:
    """Return a small file whose header promises 100,000 x 100,000 pixels."""
    side = 100_000
    if name == "PNG":
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        checked = header + struct.pack(">I", zlib.crc32(header))
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + checked + struct.pack(">I4s", 99, b"IDAT") + b"\0" * 99
    if name == "BMP":
        return b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + b"\0" * 50
    if name == "PPM":
        return b"P6 100000 100000 255\n" + b"\0" * 100
    if name == "TIFF":
        return tiff(np.zeros((1, 1), dtype=np.uint8), bits=8).replace(
            struct.pack("<HHII", 256, 4, 1, 1) + struct.pack("<HHII", 257, 4, 1, 1),
            struct.pack("<HHII", 256, 4, 1, side) + struct.pack("<HHII", 257, 4, 1, side),
        )
    buffer = io.BytesIO()
    Image.new("RGB", (33, 33)).save(buffer, format=name)
    content, limit = buffer.getvalue(), 65_535  # of formats whose sides have 16 bits
    if name in ("JPEG2000", "AVIF"):
        return content.replace(struct.pack(">II", 33, 33), struct.pack(">II", side, side))
    return content.replace(*(struct.pack("<HH" if name == "GIF" else ">HH", n, n) for n in (33, limit)))


@pytest.mark.parametrize("name", sorted({name for _, name, _ in WRITTEN} - {"WEBP"}))
def test_a_header_that_promises_too_many_pixels_is_an_error_before_memory_is_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(huge(name))
    message = "has more than 178 megapixels; make it smaller or cut it into tiles"
    if name == "AVIF":  # the decoder itself has a limit
        message = "not an image that can be read; replace it or remove it"
    for read in (read_image, read_size_hw, lambda path: decode_reduced(path.read_bytes(), path, 1)):
        with pytest.raises(DataError, match=rf"/a\.jpg: {message}$"):
            read(path)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".j2k"}))
def test_every_suffix_of_an_image_is_written_and_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    two_tone("RGB").convert({".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")).save(path)
    assert read_image(path).shape == (16, 32, 3) and read_size_hw(path) == (16, 32)


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 0, 200))]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({} if name != "a.webp" else {"lossless": True})
        )
        assert read_image(tmp_path / name)[4, 4].tolist() == [200, 0, 0]


def test_image_files_are_told_by_their_suffix() -> None:
    assert is_image_file("A.JPG") and is_image_file("a/b.tiff") and not is_image_file("a.txt")
    assert not is_image_file("._a.jpg") and not is_image_file("a/._a.jpg")  # macOS leaves these in archives
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES | UNREADABLE_SUFFIXES)
    assert not IMAGE_SUFFIXES & UNREADABLE_SUFFIXES
    assert is_unreadable_kind("a/B.HEIC") and not is_unreadable_kind("._b.heic") and not is_unreadable_kind("b.txt")


def test_an_image_of_an_unreadable_kind_is_named_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"^a\.heic: not an image that can be read; convert it to JPEG$"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Path("a.heic"))
