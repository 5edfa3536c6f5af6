"""Write down every setting as its config has it: `settings.json` for the command line, docs/settings.md for people.

`make settings` runs this module. It loads torch, with the configs; `settings.json` is there so that help and completion
need not.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aligndet_cli.config import STAGES, StageConfig
from aligndet_cli.data.folds import SplitConfig
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.stage import find_stage
from aligndet_cli.tools import settings_page
from aligndet_cli.tools.bench.measure import BenchConfig
from aligndet_cli.tools.predict.command import PredictConfig

PACKAGE = Path(__file__).parents[1]
JSON_FILE, PAGE_FILE = PACKAGE / "settings.json", PACKAGE.parent / "docs" / "settings.md"
COMMANDS: dict[str, type[StageConfig]] = {
    "predict": PredictConfig,
    "bench": BenchConfig,
    "split": SplitConfig,
    "doctor": StageConfig,
}
# Defaults that the environment may change, as they are where it is empty.
FROM_ENVIRONMENT = {"runtime.offline": "off"}
_KINDS = {int: "int", float: "float", bool: "bool", Path: "path", str: "str", tuple: "list", list: "list"}


class Setting(TypedDict):
    """One setting, for people and for `flags.py`.

    Attributes:
        kind: `int`, `float`, `bool`, `path`, `str` or `list`; `str` where several of them are allowed.
        default: as text, a list joined by commas; None where there is none, and `text` ends in what happens then.
        choices: all words that are allowed; empty where others are.
        text: one line.
    """

    kind: str
    default: str | None
    choices: list[str]
    text: str


def describe_settings(config_class: type[BaseModel]) -> dict[str, Setting]:
    """Return `{dotted.path: setting}` in the order of the fields; of a detector only the choice of its family."""
    return dict(_leaves(config_class(), ""))


def describe_all() -> dict[str, dict[str, dict[str, Setting]]]:
    """Return the content of `settings.json`: settings of stages, of other commands, and of detector families."""
    return {
        "stages": {name: describe_settings(find_stage(name).steps().config) for name in STAGES},
        "commands": {name: describe_settings(config) for name, config in COMMANDS.items()},
        "detectors": {config.model_fields["family"].default: _of_family(config) for config in _members(DetectorConfig)},
    }


def to_json(content: Mapping[str, Any]) -> str:
    """Return `settings.json` with one setting per line."""
    return _to_json(content, depth=3) + "\n"


def to_page(content: Mapping[str, Any]) -> str:
    """Return docs/settings.md."""
    words = {name: {flag.path: flag.names for flag in find_stage(name).flags if flag.path} for name in STAGES}
    return settings_page.build_page(content, words)


def write_settings() -> None:
    """Write both files."""
    content = describe_all()
    JSON_FILE.write_text(to_json(content), encoding="utf-8")
    PAGE_FILE.write_text(to_page(content), encoding="utf-8")


def _of_family(config: type[BaseModel]) -> dict[str, Setting]:
    return {path: setting for path, setting in _leaves(config(), "detector.") if path != "detector.family"}


def _leaves(group: BaseModel, prefix: str) -> Iterator[tuple[str, Setting]]:
    for name, field in type(group).model_fields.items():
        value, path = getattr(group, name), f"{prefix}{name}"
        if field.discriminator is not None:
            tag = str(field.discriminator)
            fields = [member.model_fields[tag] for member in _members(field.annotation)]
            setting = _setting(path, fields[0], getattr(value, tag))
            yield f"{path}.{tag}", {**setting, "choices": [field.default for field in fields]}
        elif isinstance(value, BaseModel):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, _setting(path, field, value)


def _setting(path: str, field: FieldInfo, value: Any) -> Setting:
    kinds = _members(field.annotation)
    is_choice = all(get_origin(kind) is Literal for kind in kinds)
    only = get_origin(kinds[0]) or kinds[0]
    return {
        "kind": _KINDS[only] if len(kinds) == 1 and not is_choice else "str",
        "default": FROM_ENVIRONMENT.get(path, _as_text(value)),
        "choices": [str(word) for kind in kinds for word in get_args(kind)] if is_choice else [],
        "text": field.description or "",
    }


def _members(annotation: Any) -> list[Any]:
    """Return the types that `annotation` allows, but for None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is type(None) else [annotation]


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join(str(_as_text(item)) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _to_json(tree: Any, depth: int, indent: str = "") -> str:
    if depth == 0:
        return json.dumps(tree, ensure_ascii=False)
    lines = (f"{indent} {json.dumps(key)}: {_to_json(value, depth - 1, f'{indent} ')}" for key, value in tree.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


if __name__ == "__main__":
    write_settings()
