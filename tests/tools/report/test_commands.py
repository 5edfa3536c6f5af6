import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligndet_cli.commands import stages
from aligndet_cli.config import Sources, load_config
from aligndet_cli.driver import Request
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.report.commands import command_of
from aligndet_cli.workspace import Artifact
from helpers.commandline import aligndet
from helpers.reports import put


class Caught(Exception):
    """What a pasted command asks for."""

    def __init__(self, request: Request) -> None:
        self.request = request


@pytest.fixture(autouse=True)
def _no_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands stop where a stage would begin."""

    def execute(request: Request) -> None:
        raise Caught(request)

    monkeypatch.setattr(stages, "execute", execute)
    yield


# Settings of every form: flags with words, numbers, paths and lists, switches on and off, and what only --set knows.
GIVEN = {
    "pretrain-image": ("method=supervised", "backbone.name=resnet18", "data.split=a split", "training.epochs=3"),
    "proposals": ("data.format=folder", "min_size=17", "max_per_image=5", "working_size=96", "on_error=skip"),
    "cluster": ("k=7", "backbone.name=resnet18", "data.limit=3", "runtime.num_workers=0"),
    "pretrain-box": (
        "detector.family=fcos",
        "detector.neck_channels=64",
        'name="7"',
        "freeze_backbone=false",
        "backbone.weights=weights/a 'quoted' name.pt",
        "views.short_side=[96,128]",
        "momentum=0.98",
        "training.lr=1e-05",
        "training.batch_size=auto",
        "runtime.devices=2",
    ),
    "finetune": (
        "detector.family=detr",
        "label=été \U0001f600; $(rm -rf /) `x` \"'",
        "init=backbone",
        "fraction=2.5",
        "data.annotations=-odd/labels.json",
        "resolution.short_side=[160]",
        "runtime.deterministic=true",
    ),
    "evaluate": ("run=some-run", "plots=false", "short_side=64", "long_side=96", "batch_size=8"),
}


@pytest.mark.parametrize("stage", GIVEN)
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_pasted_command_asks_for_the_same(stage: str, is_plain: bool, tmp_path: Path) -> None:
    config_class = find_stage(stage).steps().config
    settings = () if is_plain else (*GIVEN[stage], f"data.root={tmp_path / 'my data'}", "seed=3")
    config, _ = load_config(config_class, stage, Sources(None, settings, {}))
    put(tmp_path / "x", "hash", config.to_json(), {}, {})
    command = command_of(stage, Artifact(tmp_path / "x", {}), "my workspace")
    assert command is not None
    program, *words = shlex.split(command)
    assert program == "aligndet" and words[0] == stage and "\n" not in command
    with pytest.raises(Caught) as caught:
        aligndet(*words)
    request = caught.value.request
    assert (request.stage, request.workspace.root) == (stage, Path("my workspace"))
    again, _ = load_config(config_class, stage, request.sources)
    assert again == config and again.hashed_settings() == config.hashed_settings()
    assert is_plain == (words == [stage, "-w", "my workspace"])


def test_what_no_stage_made_has_no_command(tmp_path: Path) -> None:
    put(tmp_path / "imported", "hash", {"source": "faster_rcnn.pth"}, {}, {})
    assert command_of("finetune", Artifact(tmp_path / "imported", {}), "ws") is None
