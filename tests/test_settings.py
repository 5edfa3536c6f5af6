"""Every setting is described once, in its config; `settings.json` and docs/settings.md say what the configs say."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from importlib import resources
from typing import Any

import pytest

from aligndet_cli.config import STAGES, flatten
from aligndet_cli.detectors import BUILDERS, DetectorConfig
from aligndet_cli.driver import stage_config_class
from aligndet_cli.tools.settings import (
    COMMANDS,
    JSON_FILE,
    PAGE_FILE,
    describe_all,
    describe_settings,
    to_json,
    to_page,
)

# Paths that mean something else in several stages, and so have several texts.
OWN_MEANING = {
    "batch_size",  # of a forward pass, or of a training step
    "import_file",  # boxes, or clusters
    "long_side",  # fixed, or the run's
    "momentum",  # rises in `pretrain-box`
    "output",
    "short_side",
    "temperature",  # of one method or of all
    "training.batch_size",
    "embedding_dim",
    "steps",
}
# Texts of families that differ, because their parts do.
OWN_PARTS = {"head_convs", "head_norm", "pretext_samples", "score_threshold"}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return describe_all()


def tables(described: dict[str, Any]) -> list[dict[str, Any]]:
    return [table for group in described.values() for table in group.values()]


def test_both_files_say_what_the_configs_say(described: dict[str, Any]) -> None:
    assert JSON_FILE.read_text(encoding="utf-8") == to_json(described), "run `make settings`"
    assert PAGE_FILE.read_text(encoding="utf-8") == to_page(described), "run `make settings`"


def test_the_file_is_read_without_torch() -> None:
    read = "import json, sys; from importlib import resources; import aligndet_cli"
    read += (
        "; json.loads((resources.files(aligndet_cli) / 'settings.json').read_text()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", read], check=True)


@pytest.mark.parametrize("name", [*STAGES, *COMMANDS])
def test_every_setting_is_there(name: str, described: dict[str, Any]) -> None:
    config = COMMANDS[name] if name in COMMANDS else stage_config_class(name)
    expected = [path for path, _ in flatten(config().to_json())]
    given = {**described["stages"], **described["commands"]}[name]
    assert [path for path in expected if not path.startswith("detector.")] == [
        path for path in given if path != "detector.family" and path not in excluded(config)
    ]
    assert ("detector.family" in given) == ("detector.family" in expected)


def test_every_family_has_a_table(described: dict[str, Any]) -> None:
    assert list(described["detectors"]) == list(BUILDERS)
    assert described["stages"]["finetune"]["detector.family"]["choices"] == list(BUILDERS)


def test_descriptions_are_one_plain_sentence(described: dict[str, Any]) -> None:
    texts = {path: entry["text"] for table in tables(described) for path, entry in table.items()}
    style = re.compile(r"[A-Z](?!.*(?: \||\. )).{5,88}\.")
    assert {path: text for path, text in texts.items() if not style.fullmatch(text)} == {}
    questions = re.compile(r"(What|Whether|Which|Where|How|Who|When)\b")
    assert {path: text for path, text in texts.items() if questions.match(text)} == {}


def test_without_a_default_the_description_says_what_happens(described: dict[str, Any]) -> None:
    silent = [
        path
        for table in tables(described)
        for path, entry in table.items()
        if entry["default"] is None and not re.search(r" \([^()]+\)\.$", entry["text"])
    ]
    assert silent == []


def test_a_setting_means_the_same_wherever_it_stands(described: dict[str, Any]) -> None:
    meanings = defaultdict(set)
    for group in ("stages", "commands"):
        for table in described[group].values():
            for path, entry in table.items():
                meanings[path].add(entry["text"])
    assert {path for path, texts in meanings.items() if len(texts) > 1} == OWN_MEANING
