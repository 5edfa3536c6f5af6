"""Write down every setting as its config has it: `settings.json` for the command line, docs/settings.md for people.

`make settings` runs this module. It loads torch, with the configs; `settings.json` is there so that help and completion
need not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aligndet_cli.config import STAGES, StageConfig
from aligndet_cli.data.folds import SplitConfig
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.bench.plan import BenchConfig
from aligndet_cli.tools.predict.command import PredictConfig

DOCS = Path(__file__).parent
JSON_FILE, PAGE_FILE = DOCS.parent / "aligndet_cli" / "settings.json", DOCS / "settings.md"
COMMANDS: dict[str, type[StageConfig]] = {
    "predict": PredictConfig,
    "bench": BenchConfig,
    "split": SplitConfig,
    "doctor": StageConfig,
}
Table = Mapping[str, Mapping[str, Any]]  # settings by dotted path
Words = Mapping[str, Sequence[str]]  # flags by dotted path of their setting

INTRODUCTION = """\
# Settings

All settings, in the order in which the configs have them. `make settings` writes this page from the configs.
There are three ways to set one; later ones win:

1. a TOML file: `--config FILE`, with `topk = 20` in the table `[pretrain-box]`, or without a table for one stage
2. `--set topk=20`, any number of times
3. its flag, if it has one: `--topk 20`

`aligndet config show STAGE` prints all settings of a stage with their values, ready for `--config`; `--origin` adds who
set them. In TOML, `on` and `off` are `true` and `false`, and lists are `[640, 672]`. A default without code, such as
"by recipe", says what happens where nothing is set.
"""

# Heading, a sentence below it, and the beginnings of the paths; settings that several stages have.
SHARED = (
    ("Run and data", "Of all stages. [Data](data.md) tells more.", ("name", "seed", "data.")),
    ("Machine", "Of all stages. [Machines](machines.md) tells more.", ("runtime.",)),
    ("Backbone", "Of all stages with one. [Backbones and weights](backbones.md) tells more.", ("backbone.",)),
    ("Training", "Of all stages that train. [Detectors and recipes](detectors.md) tells more.", ("training.",)),
)
DETECTORS = """\
## Detectors

`detector.family`, or `--detector`, chooses one; its settings are set with `--set`, as in
`--set detector.neck_channels=128`. [Detectors and recipes](detectors.md) says what they are.
"""
# Defaults that the environment may change, as they are where it is empty.
FROM_ENVIRONMENT = {"runtime.offline": "off"}
_KINDS = {int: "int", float: "float", bool: "bool", Path: "path", str: "str", tuple: "list", list: "list"}


class Setting(TypedDict):
    """One setting, for people and for `flags.py`.

    Attributes:
        kind: `int`, `float`, `bool`, `path`, `str` or `list`; `str` where several of them are allowed.
        default: as text, a list joined by commas; None where there is none, and `text` ends in what happens then.
        choices: all words that are allowed, in a list several of them; empty where others are.
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
    return build_page(content, words)


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
    words = [item for item in get_args(kinds[0]) if get_origin(item) is Literal] if only is tuple else kinds * is_choice
    return {
        "kind": _KINDS[only] if len(kinds) == 1 and not is_choice else "str",
        "default": FROM_ENVIRONMENT.get(path, _as_text(value)),
        "choices": [str(word) for kind in words for word in get_args(kind)],
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


def build_page(content: Mapping[str, Mapping[str, Table]], words: Mapping[str, Words]) -> str:
    """Return the page.

    Args:
        content: see `settings.json`.
        words: flags of stages.
    """
    tables = {**content["stages"], **content["commands"]}
    shared = {path: entry for table in reversed(tables.values()) for path, entry in table.items() if _heading(path)}
    shared |= {path: entry for path, entry in tables["finetune"].items() if path in shared}
    all_words = {path: names for flags in words.values() for path, names in flags.items()}
    parts = [INTRODUCTION, "## Settings that stages share\n"]
    for heading, sentence, _ in SHARED:
        of_heading = {path: shared[path] for path in shared if _heading(path) == heading}
        parts += [f"### {heading}\n", f"{sentence}\n", _table(of_heading, all_words)]
    for name, table in tables.items():
        own = {path: entry for path, entry in table.items() if shared.get(path) != entry}
        if own:
            is_stage = name in content["stages"]
            sentence = _links(table, own) if is_stage else f"`aligndet {name} --help` has a flag for each, and others."
            parts += [f"## {name}\n", f"{sentence}\n", _table(own, words.get(name, {}))]
    parts += [DETECTORS, *_families(content["detectors"])]
    return "\n".join(parts)


def _heading(path: str) -> str | None:
    return next((heading for heading, _, starts in SHARED if path.startswith(starts)), None)


def _links(table: Table, own: Table) -> str:
    """Return the sentence about the settings of a stage that stand elsewhere on the page."""
    headings = dict.fromkeys(_heading(path) for path in table if path not in own)
    links = [f"[{heading.lower()}](#{_anchor(heading)})" for heading in headings if heading]
    links += ["[its detector](#detectors)"] if "detector.family" in table else []
    return f"Beside these: {', '.join(links[:-1])} and {links[-1]}."


def _families(families: Mapping[str, Table]) -> Iterator[str]:
    """Yield headings and tables; a family that has all settings of an earlier one lists only what it adds."""
    done: dict[str, Table] = {}
    for family, table in families.items():
        base = next((name for name, other in done.items() if other.items() <= table.items()), None)
        yield f"### {family}\n"
        if base:
            yield f"All settings of [{base}](#{_anchor(base)}), and:\n"
        yield _table({path: entry for path, entry in table.items() if base is None or path not in done[base]}, {})
        done[family] = table


def _table(table: Table, words: Words) -> str:
    with_flags = any(path in words for path in table)
    rows = [["setting", "flag", "default", "description"], ["---"] * 4]
    for path, entry in table.items():
        flag = ", ".join(f"`{word}`" for names in words.get(path, ()) for word in names.split("/"))
        rows.append([f"`{path}`", flag, *_default_and_text(entry)])
    return "\n".join("| " + " | ".join(row if with_flags else row[:1] + row[2:]) + " |" for row in rows) + "\n"


def _default_and_text(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return both cells; without a default, the end of the text says what happens then."""
    text, default = entry["text"], f"`{entry['default']}`"
    if entry["default"] is None:
        text, _, unset = text.removesuffix(").").rpartition(" (")
        text, default = f"{text}.", unset
    choices = ", ".join(f"`{word}`" for word in entry["choices"])
    some = "Any" if entry["kind"] == "list" else "One"
    return default, f"{text} {some} of {choices}." if choices else text


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


if __name__ == "__main__":
    write_settings()
