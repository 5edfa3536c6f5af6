"""Every setting is described once, in its config; `settings.json` and docs/settings.md say what the configs say."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from write_settings import (
    COMMANDS,
    JSON_FILE,
    PAGE_FILE,
    describe_all,
    describe_settings,
    to_json,
    to_page,
)

from aligndet_cli.config import STAGES, Frozen, flatten
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.stage import find_stage

# Settings that have the same path in several stages and do not mean the same there.
OF_A_STAGE = {"batch_size", "method", "import_file", "momentum", "temperature", "training.batch_size"}
OF_A_STAGE |= {"weights", "output", "short_side", "long_side"}
# Settings of detectors that stand for other parts in other families.
OF_A_FAMILY = {"detector.head_convs", "detector.head_norm", "detector.pretext_samples", "detector.score_threshold"}


class Inner(Frozen):
    rate: float = Field(1e-4, description="Rate.")


class Example(Frozen):
    count: Annotated[int, Field(ge=1)] | None = Field(None, description="Count (all).")
    sides: tuple[int, ...] = Field((640, 672), description="Sides.")
    file: Path | None = Field(None, description="File (none).")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field("auto", description="Workers.")
    kind: Literal["a", "b"] | Literal["auto"] = Field("auto", description="Kind.")
    is_fast: bool = Field(True, description="Be fast.")
    inner: Inner = Inner()


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return describe_all()


def texts_by_path(tables: dict[str, Any]) -> dict[str, set[str]]:
    texts = defaultdict(set)
    for table in tables.values():
        for path, entry in table.items():
            texts[path].add(entry["text"])
    return texts


def test_both_files_say_what_the_configs_say(described: dict[str, Any]) -> None:
    assert JSON_FILE.read_text(encoding="utf-8") == to_json(described), "run `make settings`"
    assert PAGE_FILE.read_text(encoding="utf-8") == to_page(described), "run `make settings`"


def test_a_setting_is_described_as_a_person_writes_it() -> None:
    cells = {path: list(entry.values()) for path, entry in describe_settings(Example).items()}
    assert cells == {
        "count": ["int", None, [], "Count (all)."],
        "sides": ["list", "640,672", [], "Sides."],
        "file": ["path", None, [], "File (none)."],
        "workers": ["str", "auto", [], "Workers."],
        "kind": ["str", "auto", ["a", "b", "auto"], "Kind."],
        "is_fast": ["bool", "on", [], "Be fast."],
        "inner.rate": ["float", "0.0001", [], "Rate."],
    }


@pytest.mark.parametrize("name", [*STAGES, *COMMANDS])
def test_every_setting_is_there(name: str, described: dict[str, Any]) -> None:
    config = (COMMANDS[name] if name in COMMANDS else find_stage(name).steps().config)()
    given = {**described["stages"], **described["commands"]}[name]
    family = described["detectors"][config.detector.family] if "detector.family" in given else {}
    assert {path for path, _ in flatten(config.to_json())} <= {*given, *family}


def test_every_family_has_a_table_and_is_a_choice(described: dict[str, Any]) -> None:
    assert list(described["detectors"]) == list(DETECTORS)
    assert described["stages"]["finetune"]["detector.family"]["choices"] == list(DETECTORS)


def test_a_description_is_one_plain_line(described: dict[str, Any]) -> None:
    texts = {text for tables in described.values() for texts in texts_by_path(tables).values() for text in texts}
    assert {text for text in texts if not re.fullmatch(r"[A-Z$].{2,88}\.", text) or "|" in text} == set()
    assert {text for text in texts if re.match(r"(What|Whether|Which|Where|How|Who|When)\b", text)} == set()


def test_a_description_says_in_brackets_what_happens_without_a_default(described: dict[str, Any]) -> None:
    silent = {
        (name, path)
        for tables in described.values()
        for name, table in tables.items()
        for path, entry in table.items()
        if entry["default"] is None and not re.search(r" \([^()]+\)\.$", entry["text"])
    }
    assert silent == set()


def test_a_path_has_one_description_unless_it_means_several_things(described: dict[str, Any]) -> None:
    of_stages = texts_by_path({**described["stages"], **described["commands"]})
    assert {path for path, texts in of_stages.items() if len(texts) > 1} == OF_A_STAGE
    of_families = texts_by_path(described["detectors"])
    assert {path for path, texts in of_families.items() if len(texts) > 1} == OF_A_FAMILY


def test_the_command_line_reads_the_file_without_torch() -> None:
    read = "from importlib import resources as r; import aligndet_cli, json, sys"
    read += "; assert json.loads((r.files(aligndet_cli) / 'settings.json').read_text())['stages']"
    subprocess.run([sys.executable, "-c", f"{read}; assert 'torch' not in sys.modules"], check=True)
