"""The part of YAML that a YOLO `data.yaml` uses: top-level scalars, lists and one-level mappings of scalars.

Other keys of the file may hold anything (download scripts, for example): they are skipped, not parsed. Unlike
in YAML 1.1, `yes`, `no`, `on` and `off` stay words, since they are class names here.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from aligndet_cli.errors import DataError

_TOP_LEVEL_KEY = re.compile(r"""^(["']?)([A-Za-z_][\w-]*)\1\s*:(?:\s+|$)(.*)$""")
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")


def read_yaml_keys(file: Path, keys: Collection[str]) -> dict[str, Any]:
    """Values of the wanted top-level keys that the file has: scalar, list of scalars, or mapping of scalars.

    Raises:
        DataError: not a text file, or a wanted key holds something else.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file; expected YAML with 'train', 'val' and 'names'") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    blocks: dict[str, list[str]] = {}
    block: list[str] = []
    for line in lines:
        match = _TOP_LEVEL_KEY.match(line)
        if match:
            block = blocks[match[2]] = [match[3]]
        else:
            block.append(line)
    return {key: _value([_without_comment(line) for line in blocks[key]], file, key) for key in keys if key in blocks}


def _value(lines: list[str], file: Path, key: str) -> Any:
    """The value of a key: `lines[0]` stood behind the colon, the others below it."""
    below = [line.strip() for line in lines[1:] if line.strip()]
    start = lines[0].strip()
    try:
        if start[:1] in ("[", "{"):
            return _flow(" ".join([start, *below]))
        if start[:1] in ("|", ">", "&", "*", "!"):
            raise ValueError(f"'{start[0]}' is not supported")
        if start:
            return _scalar(" ".join([start, *below]))
        if all(line == "-" or line.startswith("- ") for line in below):
            return [_scalar(line[1:].strip()) for line in below] if below else None
        return dict(_pair(line) for line in below)
    except ValueError as error:
        raise DataError(f"{file}: '{key}' cannot be read ({error}); write it as a plain value, list or map") from None


def _flow(text: str) -> Any:
    """`[a, b]` or `{0: a, 1: b}`."""
    closing = {"[": "]", "{": "}"}[text[0]]
    if len(text) < 2 or text[-1] != closing:
        raise ValueError(f"no closing '{closing}'")
    items = [item.strip() for item in _split(text[1:-1], ",")]
    if items and not items[-1]:  # a trailing comma, or nothing between the brackets
        items.pop()
    return [_scalar(item) for item in items] if closing == "]" else dict(_pair(item) for item in items)


def _pair(text: str) -> tuple[Any, Any]:
    parts = _split(text, ":")
    if len(parts) < 2:
        raise ValueError(f"'{text}' is not 'key: value'")
    return _scalar(parts[0].strip()), _scalar(text[len(parts[0]) + 1 :].strip())


def _scalar(text: str) -> Any:
    if _QUOTED.fullmatch(text):
        return json.loads(text) if text[0] == '"' else text[1:-1].replace("''", "'")
    if text[:1] in ("[", "{", '"', "'"):
        raise ValueError(f"'{text}' is nested too deeply or not closed")
    if text in ("", "~", "null"):
        return None
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else text


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside quotes."""
    masked = _QUOTED.sub(lambda match: "_" * len(match[0]), text)
    parts, start = [], 0
    for position, character in enumerate(masked):
        if character == separator:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _without_comment(line: str) -> str:
    masked = _QUOTED.sub(lambda match: "_" * len(match[0]), line)
    comment = re.search(r"(^|\s)#", masked)
    return line[: comment.start()] if comment else line
