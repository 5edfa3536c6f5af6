from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.artifacts.proposals import ImageProposals, ProposalStore, write_store
from aligndet_cli.proposals import pictures
from aligndet_cli.proposals.pictures import draw_histograms


def bars_of(store: ProposalStore, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[tuple[float, int]], str]]:
    """By file: (left edge, height) of each bar that is not empty, and what the legend says."""
    figures = {}
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: figures.update({file.name: figure}))
    draw_histograms(Path("plots"), store)
    drawn = {}
    for name, figure in figures.items():
        [axes] = figure.axes
        assert axes.get_xlabel() and axes.get_ylabel()
        assert all(tick == int(tick) for tick in axes.get_yticks())  # there is no half an image
        bars = [(round(bar.get_x(), 3), round(bar.get_height())) for bar in axes.patches if bar.get_height()]
        drawn[name] = bars, ", ".join(axes.get_legend_handles_labels()[1])
    return drawn


def store_of(folder: Path, counts: list[int]) -> ProposalStore:
    """Boxes twice as wide as high, of 32 x 16 pixels and one of 128 x 64 for each image with any."""
    boxes = [np.array([[0, 0, 32, 16]] * (count - 1) + [[0, 0, 128, 64]] * (count > 0)) for count in counts]
    images = [
        ImageProposals(number, f"{number}.jpg", (400, 400), found.reshape(-1, 4).astype(np.float32))
        for number, found in enumerate(boxes)
    ]
    write_store(folder, images)
    return ProposalStore(folder)


def test_every_proposal_is_in_one_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = bars_of(store_of(tmp_path, [0, 3, 3, 5]), monkeypatch)
    assert list(drawn) == ["count.png", "size.png", "aspect.png"]
    # A bar of its own for each number of proposals, around it; the median of 0, 3, 3 and 5 is 3.
    assert drawn["count.png"] == ([(-0.5, 1), (2.5, 2), (4.5, 1)], "median 3")
    # Eight boxes of sqrt(512) = 22.63 pixels, and three of sqrt(8192) = 90.51 in the last of 40 bars.
    (first, low), (last, high) = drawn["size.png"][0]
    assert (low, high) == (8, 3) and first == pytest.approx(22.627, abs=0.001)
    assert last + (90.510 - 22.627) / 40 == pytest.approx(90.510, abs=0.01)
    assert drawn["size.png"][1] == "median 22.6"
    assert sum(height for _, height in drawn["aspect.png"][0]) == 11 and drawn["aspect.png"][1] == "median 2"


def test_nothing_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = bars_of(store_of(tmp_path, [0, 0]), monkeypatch)
    assert drawn == {"count.png": ([(-0.5, 2)], "median 0"), "size.png": ([], ""), "aspect.png": ([], "")}
