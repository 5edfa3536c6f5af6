"""Evaluations while training: the best step, and when training ends early."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from aligndet_cli.finetune import measuring
from aligndet_cli.finetune.measuring import Measuring
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.best import Best

PERIOD, NUM_STEPS = 10, 65


def evaluations(
    folder: Path, monkeypatch: pytest.MonkeyPatch, values: dict[int, float | None], **more: int
) -> Measuring:
    """Evaluations that find these APs by finished steps."""
    images = SimpleNamespace(categories=(), __len__=lambda: 0)
    found = Measuring(
        nn.Linear(1, 1),  # type: ignore[arg-type]
        images=images,  # type: ignore[arg-type]
        resolution=(64, 96),
        has_masks=False,
        period=PERIOD,
        num_steps=NUM_STEPS,
        patience=more.get("patience"),
        folder=folder,
        write=lambda file: file.write_text(str(found.at)) and None,  # type: ignore[attr-defined]
        process=Process(),
    )
    monkeypatch.setattr(measuring, "evaluation_batches", lambda *_, **__: [])
    monkeypatch.setattr(measuring, "predict_images", lambda *_: [])
    monkeypatch.setattr(measuring, "choose_metric", lambda *_: "coco")
    monkeypatch.setattr(measuring, "range", lambda _: [], raising=False)
    monkeypatch.setattr(measuring, "len", lambda _: 0, raising=False)

    def measure(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(metrics={"AP": values[found.at], "AP50": None, "AP75": 0.5})  # type: ignore[attr-defined]

    monkeypatch.setattr(measuring, "measure", measure)
    return found


def steps_until_over(found: Measuring, start: int = 0) -> list[int]:
    """The finished steps after which was evaluated, until the end or an early one."""
    seen = []
    for done in range(start + 1, NUM_STEPS + 1):
        found.at = done  # type: ignore[attr-defined]
        if found.between(done) is not None:
            seen.append(done)
        if found.is_over():
            break
    return seen


RISING_AND_FALLING = {10: 0.1, 20: 0.3, 30: 0.3, 40: 0.2, 50: 0.25, 60: 0.1, 65: 0.0}


def test_without_patience_all_is_evaluated_and_the_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluations(tmp_path, monkeypatch, RISING_AND_FALLING)
    assert steps_until_over(found) == [10, 20, 30, 40, 50, 60, 65]
    assert found.best.now == Best(20, "AP", 0.3) and not found.is_over()


@pytest.mark.parametrize(("patience", "end"), [(1, 30), (2, 40), (3, 50), (4, 60), (5, None)])
def test_training_ends_after_so_many_evaluations_that_are_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, end: int | None
) -> None:
    found = evaluations(tmp_path, monkeypatch, RISING_AND_FALLING, patience=patience)
    seen = steps_until_over(found)
    assert (seen[-1], found.stopped_at) == (end or 65, end)


@pytest.mark.parametrize("stopped_after", range(1, 50, 7))
def test_a_continued_run_decides_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int) -> None:
    first = evaluations(tmp_path, monkeypatch, RISING_AND_FALLING, patience=3)
    for done in range(1, stopped_after + 1):
        first.at = done  # type: ignore[attr-defined]
        first.between(done)
    saved = stopped_after // 6 * 6  # the last checkpoint: some steps, and evaluations, are done twice
    again = evaluations(tmp_path, monkeypatch, RISING_AND_FALLING, patience=3)
    steps_until_over(again, start=saved)
    assert (again.stopped_at, again.best.now) == (50, Best(20, "AP", 0.3))


def test_numbers_that_cannot_be_measured_are_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluations(tmp_path, monkeypatch, dict.fromkeys(RISING_AND_FALLING), patience=2)
    assert steps_until_over(found) == [10, 20] and found.best.now is None
