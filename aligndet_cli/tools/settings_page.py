"""Build docs/settings.md out of `settings.json`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    return default, f"{text} One of {choices}." if choices else text


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")
