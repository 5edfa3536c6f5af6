import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligndet_cli.tools.study.quick import budget, fit, timing
from aligndet_cli.tools.study.quick.fit import DetectorRates
from aligndet_cli.tools.study.spec import load_study
from helpers.commandline import aligndet


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps that only pass through: what they train is measured nowhere."""
    monkeypatch.setattr(budget, "_LADDER", (budget._Rung(2, 1, 3, 1),))
    monkeypatch.setattr(budget, "finetune_steps", lambda _: 2)
    monkeypatch.setattr(timing, "_WARM_UP", 1)
    monkeypatch.setattr(timing, "_STEPS", 1)
    monkeypatch.setitem(fit.RATES, "retinanet", DetectorRates(0.001, (0.001, 0.002, 0.004)))
    monkeypatch.setattr(fit, "BATCH", 2)
    monkeypatch.setattr(fit, "_SMALLEST_SIDE", 64)
    monkeypatch.setattr(fit, "_OBJECT_PX", 10)
    yield


def words_of(data: Path, weights: Path, workspace: Path) -> list[str]:
    return ["study", "--quick", str(data), "--backbone-weights", str(weights), "-w", str(workspace)]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_from_data_to_a_verdict(toy: Path, mobilenet: Path, tmp_path: Path) -> None:
    words = words_of(toy, mobilenet, tmp_path / "ws")
    planned = aligndet(*words, "--dry-run", "--json")
    found = planned.json()
    assert found["status"] == "dry run" and found["plan"]["seconds"] > 0 and not (tmp_path / "ws").exists()
    assert "13 images of 'train' to train on, 11 to measure on ('val')" in planned.stderr and "in all" in planned.stderr
    ran = aligndet(*words, "--json")
    found = ran.json()
    assert found["status"] == "done" and {run["state"] for run in found["runs"]} <= {"done", "complete"}
    # Nothing is learned, so all rates are as good and the middle one is taken: two seeds of two starts, and the other
    # two rates with the first seed.
    assert sum(run["stage"] == "finetune" for run in found["runs"]) == 6
    (verdict,) = found["verdicts"]
    assert verdict["num_pairs"] == 2 and verdict["baseline"] == "backbone only, lr 0.002"
    assert verdict["sentence"] in Path(found["page"]).read_text().replace("&#39;", "'")
    # The plan is an ordinary study, whose baseline is the chosen one.
    study = load_study(tmp_path / "ws" / "quick.toml")
    assert [start.label for start in study.starts[:2]] == [verdict["baseline"], "AlignDet"]
    assert study.starts[0].seeds is None and all(start.seeds == (0,) for start in study.starts[2:])
    plain, ours = (start.settings["finetune"]["training.lr"] for start in study.starts[:2])
    assert ours == pytest.approx(1.5 * plain)
    assert "8 complete" not in aligndet("study", tmp_path / "ws" / "quick.toml", "-w", tmp_path / "ws", "-n").stdout
    # Again: nothing is measured, nothing is run, the same answer.
    again = aligndet(*words)
    assert "measuring" not in again.stderr and verdict["sentence"] in again.stdout
    assert "page with all pictures: " in again.stdout


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_an_interrupted_study_goes_on_with_its_plan(
    toy: Path, mobilenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(toy, mobilenet, tmp_path / "ws")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("aligndet_cli.tools.study.quick.command.run_study", stop)
        aligndet(*words, code=130)
    plan = tmp_path / "ws" / "quick.toml"
    text = plan.read_text()
    shown = aligndet(*words, "--dry-run")
    assert "measuring" not in shown.stderr and plan.read_text() == text
    # Another question, or another file, is not taken for it.
    assert "is the plan of `aligndet study --quick" in aligndet(*words, "--hours", "2", code=2).error_line()
    plan.write_text(text.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    assert "was changed since it was planned; run it with" in aligndet(*words, code=2).error_line()
    (tmp_path / "ws" / "quick.json").unlink()
    assert "is no plan of this command" in aligndet(*words, code=2).error_line()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_images_that_are_held_out_go_through_all_stages(toy: Path, mobilenet: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy / "train", data / "train")
    (data / "annotations").mkdir()
    shutil.copy(toy / "annotations" / "instances_train.json", data / "annotations")
    planned = aligndet(*words_of(data, mobilenet, tmp_path / "ws"), "--dry-run")
    assert "11 images of 'train' to train on, 2 to measure on (drawn from 'train', the only split)" in planned.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--hours", "1", "study.toml"), 2, "--hours: goes with --quick"),
        (("--backbone-weights", "a.pth", "study.toml"), 2, "--backbone-weights: goes with --quick"),
        (("--quick",), 2, "which data? name it"),
        (("--quick", "{toy}", "--hours", "0"), 2, "--hours 0: should be greater than 0"),
        (("--quick", "{toy}", "--detector", "detr"), 2, "--detector detr: short runs are known for retinanet,"),
        (("--quick", "{toy}/train"), 3, "no labels for split"),
        (("--quick", "{toy}", "--backbone-weights", "gone.pth"), 4, "gone.pth: no such file"),
    ],
)
def test_mistakes_are_one_line(toy: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    filled = [word.format(toy=toy) for word in words]
    for more in ((), ("--dry-run",)):
        assert said in aligndet("study", *filled, "-w", tmp_path / "ws", *more, code=code).error_line()
    assert not (tmp_path / "ws").exists()
    error = aligndet("study", *filled, "-w", tmp_path / "ws", "--json", code=code)
    assert json.loads(error.stdout)["exit_code"] == code
