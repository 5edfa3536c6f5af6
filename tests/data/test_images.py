"""Images are read upright as RGB: values are known colours, sizes are worked out beside each case."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.data.images import (
    decode_image,
    decode_reduced,
    read_bytes,
    read_image,
    read_missing_sizes,
    read_size_hw,
)
from aligndet_cli.errors import DataError

# Top left red, top right green, bottom left blue, bottom right white: tells all eight orientations apart.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)


def corner_image(block: int = 16) -> Image.Image:
    """Upright picture of 2x3 blocks: 32 high, 48 wide, the right column twice as wide."""
    pixels = np.repeat(np.repeat(CORNERS, block, axis=0), [block, 2 * block], axis=1)
    return Image.fromarray(pixels)


def noise(size_hw: tuple[int, int] = (120, 160)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size_hw, 3), dtype=np.uint8))


def read_reduced(path: Path, min_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    return decode_reduced(read_bytes(path), path, min_pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = corner_image()
    # A camera stores the inverse of each orientation: 6 (turn by 90 to view) was stored turned the other way.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    stored.save(path, exif=exif, **({} if suffix == ".tif" else {"quality": 95}))
    assert read_size_hw(path) == (32, 48)
    pixels = read_image(path)
    assert pixels.shape == (32, 48, 3)
    centres = pixels[[8, 24]][:, [8, 32]]
    np.testing.assert_allclose(centres.astype(int), CORNERS.astype(int), atol=12)
    # A half of both sides has 16 * 24 = 384 pixels, a quarter 96.
    reduced, size_hw = read_reduced(path, 100)
    assert size_hw == (32, 48)
    assert reduced.shape == ((16, 24, 3) if suffix == ".jpg" else (32, 48, 3))
    step = 32 // len(reduced)
    centres = reduced[[8 // step, 24 // step]][:, [8 // step, 32 // step]]
    np.testing.assert_allclose(centres.astype(int), CORNERS.astype(int), atol=12)


def test_missing_sizes_are_read_from_headers_and_unreadable_files_passed_over(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned by 90 degrees
    corner_image().save(tmp_path / "turned.jpg", exif=exif)
    corner_image().save(tmp_path / "known.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"")
    given = np.array([[0, 0], [7, 5], [0, 0], [0, 0]], dtype=np.int32)
    found = read_missing_sizes(tmp_path, ["turned.jpg", "known.jpg", "broken.jpg", "absent.jpg"], given)
    assert found.tolist() == [[48, 32], [7, 5], [0, 0], [0, 0]] and not given[0].any()


# Outside pytest, which resets the filters, images.py silences this.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_block_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    # A directory that claims 9 entries and holds none.
    corner_image().save(path, exif=b"Exif\x00\x00MM\x00\x2a" + struct.pack(">IH", 8, 9))
    assert read_size_hw(path) == read_image(path).shape[:2] == (32, 48)


def test_cmyk_colours_are_not_inverted(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)  # magenta + yellow ink = red
    np.testing.assert_allclose(read_image(path)[8, 8].astype(int), [255, 0, 0], atol=6)


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(path)
    assert read_image(path)[0, 0].tolist() == [10, 20, 30]


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(path, transparency=bytes([0, 128]))
    assert read_image(path)[0, 0].tolist() == [200, 100, 50]


def test_16_bit_png_keeps_the_high_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)).save(path)
    assert read_image(path)[0].tolist() == [[0, 0, 0], [0x12] * 3, [0xFF] * 3]


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    assert read_image(path).tolist() == [[[1, 2, 3]]]
    assert read_size_hw(path) == (1, 1)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_are_errors(tmp_path: Path, suffix: str, share: float) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    noise().save(whole)
    content = whole.read_bytes()
    assert read_image(whole).shape == (120, 160, 3)
    cut.write_bytes(content[: int(len(content) * share)])
    for read in (read_image, lambda path: read_reduced(path, 1)):
        with pytest.raises(DataError) as error:
            read(cut)
        assert str(error.value).startswith(f"{cut}: ") and "\n" not in str(error.value)


def jpeg(**settings: object) -> bytes:
    """Return a JPEG with few scan data for its size, whose lost tail libjpeg decodes without a word."""
    buffer = io.BytesIO()
    smooth = noise((3, 4)).resize((320, 240), Image.Resampling.BICUBIC)
    smooth.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    exif = b"Exif\0\0II*\0" + struct.pack("<IHI", 8, 0, 0) + jpeg(quality=20)[:20_000]
    return jpeg(exif=exif)


JPEGS = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_blocks=3),
    "grey": jpeg(quality=5),
    "thumbnail": with_thumbnail(),
}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_tail_is_zeros_is_an_error(kind: str, share: float) -> None:
    content = JPEGS[kind]
    assert decode_image(content, Path("a.jpg")).shape == (240, 320, 3)
    # Never less than the headers, of which a thumbnail is a large part; without them it is no image at all.
    start = content.rindex(b"\xff\xda") if kind != "progressive" else content.index(b"\xff\xda")
    kept = start + int((len(content) - start) * share)
    broken = content[:kept] + bytes(max(len(content) - kept, 2))
    for read in (decode_image, lambda content, path: decode_reduced(content, path, 1)):
        with pytest.raises(DataError, match=r"^a\.jpg: truncated or damaged image \(zeros instead of its end\)"):
            read(broken, Path("a.jpg"))


@pytest.mark.parametrize(
    "tail",
    [bytes(2), bytes(5000), b"junk", b"junk" + bytes(9), b"\xff" * 9 + bytes(9), jpeg()[:3000] + bytes(9)],
    ids=["two zeros", "many zeros", "junk", "junk and zeros", "fill bytes", "half a second image and zeros"],
)
@pytest.mark.parametrize("kind", JPEGS)
def test_what_lies_behind_a_complete_jpeg_does_not_matter(kind: str, tail: bytes) -> None:
    whole = decode_image(JPEGS[kind], Path("a.jpg"))
    np.testing.assert_array_equal(decode_image(JPEGS[kind] + tail, Path("a.jpg")), whole)
    np.testing.assert_array_equal(decode_reduced(JPEGS[kind] + tail, Path("a.jpg"), 10**9)[0], whole)


def test_fill_bytes_before_the_end_of_a_jpeg_are_skipped() -> None:
    whole = decode_image(JPEGS["baseline"], Path("a.jpg"))
    filled = JPEGS["baseline"][:-2] + b"\xff" * 7 + b"\xd9\0\0"
    np.testing.assert_array_equal(decode_image(filled, Path("a.jpg")), whole)


def test_the_first_picture_of_several_needs_only_its_own_end() -> None:
    buffer = io.BytesIO()
    noise().save(buffer, "MPO", save_all=True, append_images=[corner_image()])
    content = buffer.getvalue()
    broken = content[:-200] + bytes(200)  # of the second picture
    np.testing.assert_array_equal(decode_image(broken, Path("a.jpg")), decode_image(content, Path("a.jpg")))
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_image(content[:5000] + bytes(len(content) - 5000), Path("a.jpg"))


def test_a_progressive_jpeg_cut_in_half_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise().save(path, progressive=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="truncated"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_size_hw, lambda path: read_reduced(path, 1)])
def test_what_is_not_an_image_is_refused(tmp_path: Path, read, capfd: pytest.CaptureFixture[str]) -> None:
    text, empty, folder = tmp_path / "text.jpg", tmp_path / "empty.jpg", tmp_path / "folder.jpg"
    text.write_text("hello, I am not a JPEG\n" * 20)
    empty.touch()
    folder.mkdir()
    cases = {text: "not an image", empty: "empty file", folder: "is a folder", tmp_path / "no.jpg": "no such image"}
    for path, message in cases.items():
        with pytest.raises(DataError, match=message) as error:
            read(path)
        assert str(path) in str(error.value) and "0x" not in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("read", [read_image, read_size_hw])
def test_pipe_is_refused_rather_than_waited_for(tmp_path: Path, read) -> None:
    pipe = tmp_path / "a.jpg"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="is a pipe"):
        read(pipe)


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not an image"):
        read_image(path)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("min_pixels", "size_hw"),
    # 121x163 px: an eighth, rounded up, is 16x21 = 336 px, a quarter 31x41 = 1271, a half 61x82 = 5002.
    [
        (1, (16, 21)),
        (336, (16, 21)),
        (337, (31, 41)),
        (1271, (31, 41)),
        (1272, (61, 82)),
        (5002, (61, 82)),
        (5003, (121, 163)),
        (10**9, (121, 163)),
    ],
)
def test_reduced_jpeg_has_enough_pixels(
    tmp_path: Path, min_pixels: int, size_hw: tuple[int, int], mode: str, progressive: bool
) -> None:
    path = tmp_path / "a.jpg"
    smooth = noise((3, 4)).resize((163, 121), Image.Resampling.BICUBIC)
    smooth.convert(mode).save(path, quality=95, progressive=progressive)
    reduced, full_size_hw = read_reduced(path, min_pixels)
    assert reduced.shape == (*size_hw, 3) and reduced.dtype == np.uint8
    assert full_size_hw == (121, 163)
    # The same picture: scaled back, it is near the full one.
    back = np.asarray(Image.fromarray(reduced).resize((163, 121), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(back - read_image(path)).mean() < 8


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 2000), (2000, 2), (7, 64), (8, 64)])
def test_thin_jpegs_are_never_reduced_to_nothing(tmp_path: Path, size_hw: tuple[int, int]) -> None:
    path = tmp_path / "a.jpg"
    noise(size_hw).save(path)
    reduced, full_size_hw = read_reduced(path, 1)
    assert full_size_hw == size_hw and min(reduced.shape) >= 1
    assert reduced.shape[0] >= size_hw[0] / 8 and reduced.shape[1] >= size_hw[1] / 8


def test_other_formats_are_not_reduced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    reduced, size_hw = read_reduced(path, 1)
    assert size_hw == (120, 160)
    np.testing.assert_array_equal(reduced, read_image(path))


def test_decode_image_names_the_file() -> None:
    with pytest.raises(DataError, match=r"^some/file\.jpg: "):
        decode_image(b"x", Path("some/file.jpg"))
