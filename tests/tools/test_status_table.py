"""The table of `status` in terminals of any width."""

import pytest
from rich.console import Console

from aligndet_cli.tools.status import StatusRow, status_table

ROWS = [
    StatusRow("proposals", "train2017", "complete", (), "", "347.7 boxes per image in 292 images"),
    StatusRow("pretrain-box", "retinanet-resnet50-from-swav", "interrupted", (), "", "started 2026-11-26T17:17"),
    StatusRow(
        "finetune",
        "retinanet-resnet50-backbone-f1-p5",
        "complete",
        ("pretrain-box/retinanet-resnet50-from-swav", "proposals/train2017"),
        "",
        "loss 0.404 (at the start 1.09)",
    ),
]


def printed(width: int) -> tuple[list[str], list[str]]:
    console = Console(width=width, color_system=None)
    table, left_out = status_table(ROWS, width)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()], left_out


@pytest.mark.parametrize(
    ("width", "left_out"),
    # 42 letters of a name, 11 of a state, 41 of what it was made from, 24 of a result, and twice that two between them
    [
        (126, []),
        (125, ["result"]),
        (100, ["result"]),
        (99, ["made from"]),
        (83, ["made from"]),
        (82, ["made from", "result"]),
        (60, ["made from", "result"]),
    ],
)
def test_columns_go_before_names_are_touched(width: int, left_out: list[str]) -> None:
    lines, gone = printed(width)
    assert gone == left_out and max(map(len, lines)) <= width
    for row in ROWS:
        whole = [line for line in lines if line.startswith(f"{row.stage}/{row.run}")]
        assert len(whole) == 1 and row.state in whole[0]
        if "made from" not in left_out:
            assert all(any(name in line for line in lines) for name in row.made_from)
        if "result" not in left_out:
            assert all(word in "\n".join(lines) for word in row.remark.split())


@pytest.mark.parametrize("width", [40, 25])
def test_a_name_that_is_too_long_is_folded(width: int) -> None:
    lines, _ = printed(width)
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    text = "".join(line.split("  ")[0] for line in lines)
    for row in ROWS:
        assert f"{row.stage}/{row.run}" in text
