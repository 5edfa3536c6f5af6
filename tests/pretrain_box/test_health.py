import json
from pathlib import Path

import pytest

from aligndet_cli.pretrain_box.health import judge


def log(folder: Path, losses: list[float], ranks: list[float], spread: float = 0.95) -> Path:
    """A metrics.jsonl with the chance level at 8.3."""
    lines = [
        {
            "step": 10 * number,
            "loss_contrastive": loss,
            "chance": 8.3,
            "positive_similarity": 0.4,
            "negative_similarity": 0.1,
            "embedding_spread": spread,
            "embedding_rank": rank,
        }
        for number, (loss, rank) in enumerate(zip(losses, ranks, strict=True))
    ]
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("losses", "ranks", "spread", "verdict"),
    [
        ([8.2, 7.0, 5.0, 3.0], [150, 140, 130, 120], 0.95, "healthy"),  # a loss of 3 is fine
        ([8.2, 8.2, 8.2, 8.17], [150, 150, 150, 150], 0.95, "not learning"),  # gained 0.03 of 8.3, under 0.5 %
        ([8.2, 7.0, 5.0, 4.0], [150, 60, 20, 9], 0.95, "collapsed"),  # 9 directions of 150, whatever the loss
        ([8.2, 7.0, 5.0, 4.0], [20, 15, 9, 3.5], 0.95, "collapsed"),
        ([8.3, 8.3, 8.3, 8.3], [150, 150, 150, 150], 0.02, "collapsed"),
        ([8.2, 7.0], [150, 140], 0.95, "too short"),
    ],
)
def test_verdicts(tmp_path: Path, losses: list[float], ranks: list[float], spread: float, verdict: str) -> None:
    assert judge(log(tmp_path, losses, ranks, spread))["verdict"] == verdict


@pytest.mark.parametrize(("losses", "told"), [([8.2], "only 1 logged step,"), ([8.2, 7.0], "only 2 logged steps,")])
def test_too_few_steps_are_counted(tmp_path: Path, losses: list[float], told: str) -> None:
    assert told in judge(log(tmp_path, losses, [150.0] * len(losses)))["explanation"]


def with_counterparts(file: Path, shares: list[float]) -> Path:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**line, "counterparts": share} for line, share in zip(lines, shares, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_few_counterparts(tmp_path: Path) -> None:
    # The last fifth of ten lines: (0.86 + 0.92) / 2 = 0.89.
    file = with_counterparts(log(tmp_path, [8.0] * 8 + [6.0, 4.0], [100] * 10), [0.99] * 8 + [0.86, 0.92])
    found = judge(file)
    assert (found["verdict"], found["counterparts"]) == ("few counterparts", 0.89)
    assert "only 89% of the boxes meet theirs in the other view: lower --topk" in found["explanation"]
    assert "detector.pretext_samples" in found["explanation"]


def test_enough_counterparts(tmp_path: Path) -> None:
    file = with_counterparts(log(tmp_path, [8.0] * 8 + [6.0, 4.0], [100] * 10), [0.2] * 8 + [0.89, 0.92])
    found = judge(file)
    assert found["verdict"] == "healthy" and "other view" not in found["explanation"]


def test_worse_than_few_counterparts(tmp_path: Path) -> None:
    file = with_counterparts(log(tmp_path, [8.2] * 10, [150] * 10), [0.5] * 10)
    found = judge(file)
    assert found["verdict"] == "not learning" and "only 50% of the boxes meet theirs" in found["explanation"]


def test_numbers_are_those_of_the_last_fifth(tmp_path: Path) -> None:
    found = judge(log(tmp_path, [8.0] * 8 + [6.0, 4.0], [100] * 10))
    assert (found["verdict"], found["loss_contrastive"]) == ("healthy", 5.0)
    assert "5.00" in found["explanation"] and "8.30" in found["explanation"]


def with_heads(file: Path, *others: Path) -> Path:
    """The numbers of several logs as those of the heads of one run, and the first one's as their means."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, other in enumerate((file, *others), start=1):
        for row, line in zip(rows, other.read_text().splitlines(), strict=True):
            row.update({f"head{number}_{name}": value for name, value in json.loads(line).items()})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_worst_head_decides(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    healthy = log(folders[0], [8.2, 7.0, 5.0, 3.0], [150, 140, 130, 120])
    still = log(folders[1], [8.2, 8.2, 8.2, 8.17], [150] * 4)
    collapsed = log(folders[2], [8.2, 7.0, 5.0, 4.0], [20, 15, 9, 3.5])
    found = judge(with_heads(healthy, still, collapsed))
    assert found["verdict"] == "collapsed" and found["loss_contrastive"] == 3.0
    assert found["verdicts"] == ["healthy", "not learning", "collapsed"]
    assert found["explanation"].startswith("head 3 of 3: contrastive loss 4.00")


def test_heads_that_are_all_healthy(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = log(tmp_path / "other", [8.2, 7.0, 5.0, 4.0], [150] * 4)
    found = judge(with_heads(log(tmp_path, [8.2, 7.0, 5.0, 3.0], [150] * 4), other))
    assert (found["verdict"], found["verdicts"]) == ("healthy", ["healthy", "healthy"])
    assert found["explanation"].startswith("head 1 of 2: contrastive loss 3.00")


def test_regression_alone_has_no_contrast_to_judge(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "loss_box_reg": 1.0}) + "\n")
    assert judge(file)["verdict"] == "no contrast"


def test_the_box_loss_is_told(tmp_path: Path) -> None:
    file = log(tmp_path, [8.0] * 10, [100] * 10)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [0.9, *[1.0] * 7, 1.5, 1.7]  # the last fifth: 1.6
    file.write_text(
        "".join(json.dumps({**line, "loss_box_reg": loss}) + "\n" for line, loss in zip(lines, losses, strict=True))
    )
    assert judge(file)["explanation"].endswith("; box regression loss 1.60 (at the start 0.90)")
