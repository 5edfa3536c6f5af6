import json
from pathlib import Path

import pytest

from aligndet_cli.pretrain_image.health import judge

GOOD, BAD = {"knn": 0.6, "linear": 0.7}, {"knn": 0.2, "linear": 0.2}


def log(folder: Path, name: str, losses: list[float], ranks: list[float], **more: float) -> Path:
    lines = [
        {"step": 10 * number, "lr": 0.1, name: loss, "embedding_rank": rank, "embedding_spread": 0.9, **more}
        for number, (loss, rank) in enumerate(zip(losses, ranks, strict=True), start=1)
    ]
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("name", "losses", "ranks", "more", "verdict"),
    [
        ("loss_similarity", [-0.1, -0.4, -0.6, -0.8], [60, 50, 40, 30], {}, "healthy"),
        (
            "loss_similarity",
            [-0.1, -0.9, -0.99, -1.0],
            [60, 20, 4, 3],
            {},
            "collapsed",
        ),  # a perfect loss, and worthless
        ("loss_similarity", [-0.1, -0.9, -0.99, -1.0], [60, 50, 50, 50], {"embedding_spread": 0.05}, "collapsed"),
        ("loss_similarity", [0.0, 0.0, 0.0, -0.01], [60, 60, 60, 60], {}, "not learning"),  # chance is 0, best -1
        ("loss_contrastive", [6.0, 6.2, 5.0, 4.0], [60, 50, 40, 30], {"chance": 6.2}, "healthy"),
        ("loss_contrastive", [6.0, 6.2, 6.2, 6.15], [60, 60, 60, 60], {"chance": 6.2}, "not learning"),  # 0.8 %
        ("loss_cls", [1.6, 1.4, 1.0, 0.5], [60, 9, 5, 3], {"chance": 1.609}, "healthy"),  # few classes, few directions
        ("loss_cls", [2.0, 1.7, 1.61, 1.61], [60, 50, 40, 30], {"chance": 1.609}, "not learning"),
        ("loss_cls", [1.6, 1.0], [60, 50], {"chance": 1.609}, "too short"),
    ],
)
def test_verdicts(
    tmp_path: Path, name: str, losses: list[float], ranks: list[float], more: dict[str, float], verdict: str
) -> None:
    found = judge(log(tmp_path, name, losses, ranks, **more), None, None, best=-1.0)
    assert found["verdict"] == verdict, found["explanation"]
    assert found[name] == losses[-1]


def test_no_better_than_at_the_start_is_not_learning(tmp_path: Path) -> None:
    file = log(tmp_path, "loss_similarity", [-0.1, -0.4, -0.6, -0.8], [60, 50, 40, 30])
    assert judge(file, BAD, GOOD, best=-1.0)["verdict"] == "healthy"
    found = judge(file, BAD, BAD, best=-1.0)
    assert found["verdict"] == "not learning" and "nearest-neighbour accuracy 20.0% (at the start 20.0%)" in str(found)


def test_the_best_loss_is_the_methods(tmp_path: Path) -> None:
    file = log(tmp_path, "loss_similarity", [-0.01, -0.02, -0.04, -0.06], [60, 50, 40, 30])
    assert judge(file, None, None, best=-1.0)["verdict"] == "healthy"  # 6 % of the way
    assert judge(file, None, None, best=-4.0)["verdict"] == "not learning"  # 1.5 %
