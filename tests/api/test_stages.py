"""The stages as functions: the same artifacts as their commands, callbacks, and errors that are ours."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import aligndet_cli as aligndet
from aligndet_cli.api.stages import _in_config, _sources
from aligndet_cli.config import STAGES
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.stage import find_stage
from helpers.callback_functions import note_step
from helpers.commandline import CHAIN, VARYING

SIDES = {"short_side": [64], "long_side": 96}
DETECTOR: dict[str, Any] = {"detector": {"neck_channels": 32, "head_convs": 1}, "backbone": "resnet18"}
CLUSTER: dict[str, Any] = {"k": 4, "pca_dim": 4, "backbone": "resnet18", "backbone_weights": "none", **SIDES}
SMALL: dict[str, Any] = {**DETECTOR, "steps": 6, "batch_size": 2}


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of the files that are the same in every run."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in VARYING)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.suffix != ".png"}


def test_the_five_stages_make_what_the_commands_make(toy: Path, chain: Path, tmp_path: Path) -> None:
    first = aligndet.proposals({"working_size": 96}, tmp_path, data=toy, min_size=16, num_workers=1)
    assert first.status == "done" and first.result["images"] == 13
    runs = [
        first,
        aligndet.cluster(
            None, tmp_path, k=4, pca_dim=4, backbone="resnet18", backbone_weights="none", short_side=64, long_side=96
        ),
        aligndet.pretrain_box({"views": SIDES}, tmp_path, **SMALL, backbone_weights="none"),
        aligndet.finetune({"resolution": SIDES, "detector.score_threshold": 0.005}, tmp_path, **SMALL),
        aligndet.evaluate(workspace=tmp_path),
    ]
    for stage, run in zip(CHAIN, runs, strict=True):
        assert run.folder.parent.name == stage
        (same,) = (chain / stage).iterdir()
        assert files_of(run.folder) == files_of(same), stage
    assert runs[-1].result["AP"] == json.loads((runs[-1].folder / "metrics.json").read_text())["AP"]
    again = aligndet.evaluate(workspace=tmp_path)
    assert again.status == "already complete" and again.result == runs[-1].result
    with pytest.raises(aligndet.GateError, match="below --fail-under 0.9"):
        aligndet.evaluate(workspace=tmp_path, fail_under=0.9)


def test_callbacks_are_told_what_the_log_says(toy: Path, chain: Path, tmp_path: Path) -> None:
    told: dict[str, list[Any]] = {"step": [], "log": [], "evaluate": [], "checkpoint": []}
    init = chain / "pretrain-box" / "retinanet-resnet18" / "weights.pt"
    run = aligndet.finetune(
        {"resolution": SIDES, "init": str(init), "training.checkpoint.every_steps": 3},
        tmp_path,
        data=toy,
        steps=8,
        batch_size=2,
        log_every=2,
        evaluate_every=1,
        on_step=lambda done, losses: told["step"].append((done, {name: loss.item() for name, loss in losses.items()})),
        on_log=lambda done, numbers: told["log"].append((done, dict(numbers))),
        on_evaluate=lambda done, numbers: told["evaluate"].append((done, dict(numbers))),
        on_checkpoint=lambda done, file: told["checkpoint"].append((done, file.name, file.exists())),
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [done for done, _ in told["step"]] == list(range(1, 9))
    assert told["checkpoint"] == [(3, "step-000000003.pt", True), (6, "step-000000006.pt", True)]
    logged = [line for line in lines if "lr" in line]
    assert [done for done, _ in told["log"]] == [2, 4, 6, 8]
    for (done, numbers), line in zip(told["log"], logged, strict=True):
        assert {"step": done, **numbers}.items() >= line.items() and numbers["images_per_s"] > 0
        assert told["step"][done - 1][1]["loss_cls"] == line["loss_cls"]
    measured = [line for line in lines if "AP" in line]
    assert [{"step": done, **numbers} for done, numbers in told["evaluate"]] == measured and len(measured) == 2


@pytest.mark.parametrize("was_deterministic", [False, True])
def test_what_a_callback_raises_ends_the_run_which_continues_later(
    toy: Path, chain: Path, tmp_path: Path, was_deterministic: bool
) -> None:
    init = str(chain / "pretrain-box" / "retinanet-resnet18" / "weights.pt")
    config = {"resolution": SIDES, "init": init, "training.checkpoint.every_steps": 2}
    steps: list[int] = []

    def stop_at_five(done: int, _losses: object) -> None:
        steps.append(done)
        if done == 5:
            raise ZeroDivisionError("enough")

    torch.use_deterministic_algorithms(was_deterministic)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError, match="enough"):
        aligndet.finetune(config, tmp_path, data=toy, steps=6, batch_size=2, name="run", on_step=stop_at_five)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.are_deterministic_algorithms_enabled() == was_deterministic
    resumed: list[int] = []
    run = aligndet.finetune(
        config, tmp_path, steps=6, data=toy, batch_size=2, name="run", on_step=lambda done, _: resumed.append(done)
    )
    assert run.action == "resume" and steps == [1, 2, 3, 4, 5] and resumed == [5, 6]


def test_callbacks_that_are_never_called_or_none_are_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(aligndet.ConfigError, match="proposals: trains nothing"):
        aligndet.proposals(workspace=tmp_path, data=toy, on_step=print)
    with pytest.raises(aligndet.ConfigError, match="on_log: is a str"):
        aligndet.finetune(workspace=tmp_path, data=toy, on_log="print")  # type: ignore[arg-type]


def test_callbacks_of_two_processes(toy: Path, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTED_STEPS", str(tmp_path / "steps.jsonl"))
    init = str(chain / "pretrain-box" / "retinanet-resnet18" / "weights.pt")
    common: dict[str, Any] = {"data": toy, "steps": 2, "batch_size": 4, "devices": 2, "accelerator": "cpu"}
    config = {"resolution": SIDES, "init": init}
    with pytest.raises(aligndet.ConfigError, match="callbacks: cannot go into another process"):
        aligndet.finetune(config, tmp_path, **common, on_step=lambda *_: None)
    aligndet.finetune(config, tmp_path, **common, on_step=note_step)
    noted = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert noted == [[done, "0", ["grad_norm", "loss_box_reg", "loss_cls"]] for done in (1, 2)]


def test_a_stage_runs_in_a_thread(toy: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(aligndet.proposals, {"working_size": 96}, tmp_path, data=toy, num_workers=2, limit=3).result()
    assert run.status == "done" and run.result["images"] == 3


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (None, {"batchsize": 2}, "batchsize: no setting of finetune; did you mean 'batch_size'"),
        (None, {"steps": 0}, "steps"),
        ({"training.stesp": 3}, {}, "training.stesp.*did you mean 'steps'"),
        ({"detector": {"family": "fcso"}}, {}, "fcso"),
        (7, {}, "config: of type int, holds no settings"),
        (aligndet.EvaluateConfig(), {}, "config: EvaluateConfig is not for finetune; give FinetuneConfig"),
        (None, {"progress": "bra"}, "progress='bra': write 'auto', 'bar'"),
        (None, {"detector": "fcos", "data": "nowhere"}, "nowhere"),
    ],
)
def test_errors_are_ours(config: Any, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(aligndet.AlignDetError, match=words):
        aligndet.finetune(config, tmp_path, **settings)


def test_a_config_object_says_what_was_set(toy: Path, tmp_path: Path) -> None:
    config = FinetuneConfig.model_validate({"detector": {"family": "fcos", "head_convs": 1}, "training": {"steps": 3}})
    given = {path: value for path, (_, value) in _in_config(config).items()}
    assert given == {"detector.family": "fcos", "detector.head_convs": 1, "training.steps": 3}
    for word, settings in (
        ("backbone_weights", {"backbone_weights": Path("a.pth")}),
        ("backbone.weights", {"backbone": {"weights": Path("a.pth")}}),
    ):
        assert _sources(find_stage("finetune"), None, None, settings).flags == {"backbone.weights": (word, "a.pth")}


def test_every_stage_is_a_function_whatever_was_imported_before() -> None:
    code = """
import sys
import aligndet_cli as aligndet
assert "torch" not in sys.modules and "pydantic" not in sys.modules
assert set(aligndet.__all__) <= set(dir(aligndet))
import aligndet_cli.finetune.stage
from aligndet_cli.api import stages
for name in sys.argv[1:]:
    assert callable(getattr(aligndet, name)) and getattr(stages, name).name.replace("-", "_") == name
for name in aligndet.__all__:
    assert getattr(aligndet, name) is not None
try:
    aligndet.finetune(nothing=1)
except aligndet.ConfigError as error:
    print(error)
assert not hasattr(aligndet, "nothing")
"""
    names = [stage.replace("-", "_") for stage in STAGES]
    ran = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("nothing: no setting of finetune")


def test_the_command_line_starts_without_the_api() -> None:
    code = (
        "import sys; from aligndet_cli.cli import app; print('torch' in sys.modules, 'aligndet_cli.api' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
