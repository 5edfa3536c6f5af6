"""The best weights so far: which are kept, and that number and file belong together after any crash."""

from pathlib import Path

import pytest

from aligndet_cli.training.best import Best, BestWeights


def offer(best: BestWeights, step: int, value: float) -> None:
    best.offer(Best(step, "AP", value), lambda file: file.write_text(f"weights of {step}") and None)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "resume").iterdir())


def test_the_best_is_kept_and_ties_keep_the_earlier(tmp_path: Path) -> None:
    best = BestWeights(tmp_path)
    for step, value in ((10, 0.1), (20, 0.3), (30, 0.3), (40, 0.2)):
        offer(best, step, value)
    assert best.now == Best(20, "AP", 0.3)
    assert files(tmp_path) == ["best-000000020.pt", "best.json"]
    best.put_in_place()
    assert (tmp_path / "best.pt").read_text() == "weights of 20"


def test_without_a_number_there_is_no_file(tmp_path: Path) -> None:
    BestWeights(tmp_path).put_in_place()
    assert list(tmp_path.iterdir()) == []


def test_a_continued_run_knows_it(tmp_path: Path) -> None:
    offer(BestWeights(tmp_path), 20, 0.3)
    again = BestWeights(tmp_path)
    assert again.now == Best(20, "AP", 0.3)
    offer(again, 10, 0.1)  # from an earlier step on, evaluated again
    offer(again, 20, 0.3)
    assert again.now == Best(20, "AP", 0.3) and files(tmp_path) == ["best-000000020.pt", "best.json"]


@pytest.mark.parametrize("dies_at", ["weights", "record", "removal"])
def test_a_crash_leaves_a_number_with_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    offer(BestWeights(tmp_path), 10, 0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def die(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        if dies_at == "record":
            patch.setattr("aligndet_cli.training.best.write_json", die)
        if dies_at == "removal":
            patch.setattr(Path, "unlink", die)
        best = BestWeights(tmp_path)
        best.offer(Best(20, "AP", 0.3), die if dies_at == "weights" else lambda file: file.write_text("weights of 20"))
    again = BestWeights(tmp_path)
    assert again.now is not None
    again.put_in_place()
    assert (tmp_path / "best.pt").read_text() == f"weights of {again.now.step}"
    assert again.now.step == (20 if dies_at == "removal" else 10)
