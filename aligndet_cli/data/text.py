"""Text files as people's tools write them: byte-order marks, line ends of any system, other encodings."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligndet_cli.errors import DataError

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def decode_text(content: bytes, file: Path, *, errors: str = "strict") -> str:
    """Return the text of a file: UTF-8, or what its byte-order mark says; the mark is left out.

    Args:
        errors: how to treat bytes that are not text, see `bytes.decode`.

    Raises:
        DataError: not such a text.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    try:
        return content[len(mark) :].decode(_MARKS.get(mark, "utf-8"), errors)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_lines(file: Path, *, errors: str = "strict") -> list[str]:
    """Return the lines of a text file that are not blank, without blanks at both ends.

    Raises:
        DataError: cannot be read, or not a text, see `decode_text`.
    """
    lines = (line.strip() for line in decode_text(read_label_bytes(file), file, errors=errors).splitlines())
    return [line for line in lines if line]


def parse_json(text: str, file: Path, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the value of the text of a JSON file.

    Args:
        object_hook: see `json.loads`.

    Raises:
        DataError: not JSON.
    """
    try:
        return json.loads(text, object_hook=object_hook)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise DataError(f"{file}: not valid JSON ({error}); is the download complete?") from None


def read_label_bytes(file: Path) -> bytes:
    """Return the content of a label file that the user names.

    Raises:
        DataError: missing, or cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; check --annotations") from None
    except IsADirectoryError:
        raise DataError(f"{file}: is a folder, not a label file; check --annotations") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
