r"""Fonts for texts of any language.

Text is set in DejaVu Sans, which comes with Matplotlib and has Latin, Greek, Cyrillic and Arabic letters, among others.
A text with other letters, such as Chinese ones, is set in an installed font that has them. Letters that no font has are
written as their numbers, as in `\u732b`, and a warning says so.
"""

import contextlib
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from aligndet_cli.logs import logger

FONT_FILE = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
_MOST_ADDED = 24  # letters that numbers may add to a text


def set_text(text: str) -> tuple[str, str]:
    """Return the file of a font for a text, and the text with numbers in place of letters that the font lacks."""
    missing = frozenset(text) - _letters_of(FONT_FILE)
    file = _installed_font(missing) if missing else FONT_FILE
    known = _letters_of(file)
    shown = "".join(letter if letter in known else ascii(letter)[1:-1] for letter in text)
    if shown != text:
        _warn_of_numbers(text)
    longest = len(text) + _MOST_ADDED
    return file, shown if len(shown) <= longest else f"{shown[: longest - 11]}\u2026{shown[-10:]}"


@cache
def font_of(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the font in a file at a size in pixels."""
    return ImageFont.truetype(file, size)


_warned: set[str] = set()


def _warn_of_numbers(text: str) -> None:
    """Warn, once per process."""
    if not _warned:
        _warned.add(text)
        logger.warning(
            "no font here has all letters of %r: pictures show their numbers; install one, such as Noto Sans", text
        )


@cache
def _installed_font(letters: frozenset[str]) -> str:
    """Return the first font of this machine that has these letters and Latin ones, or our own where none has."""
    wanted = letters | {chr(code) for code in range(32, 127)}
    # "Last Resort", which comes with Matplotlib, draws every letter as an empty box.
    for file in sorted({entry.fname for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")}):
        with contextlib.suppress(OSError, RuntimeError):  # it has gone, or cannot be read
            if wanted <= _letters_of(file) and font_of(file, 12):
                return file
    return FONT_FILE


@lru_cache(maxsize=8)  # Chinese fonts are large
def _letters_of(file: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(file).get_charmap()))
