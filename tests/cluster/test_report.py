"""Numbers of the report, worked out by hand."""

import numpy as np
import pytest

from aligndet_cli.cluster.kmeans import Clustering, Projection
from aligndet_cli.cluster.report import build_report, find_problems, histogram_lines, size_histogram
from aligndet_cli.cluster.sheet import nearest_rows


def make_clustering(labels: list[int], k: int, distances: list[float] | None = None) -> Clustering:
    spread = distances or [1.0] * len(labels)
    centroids = np.zeros((k, 2), np.float32)
    return Clustering(np.array(labels, np.int32), np.array(spread, np.float32), k, centroids, variance=4.0)


PROJECTION = Projection(np.zeros(3, np.float32), np.eye(2, 3, dtype=np.float32), np.array([0.5, 0.25]))


def test_report() -> None:
    report = build_report(make_clustering([0, 0, 2, 2], k=4, distances=[1, 2, 3, 2]), PROJECTION, num_images=3)
    assert report["inertia"] == 8
    assert report["inertia_per_proposal"] == 2
    assert report["explained_by_clusters"] == 0.5  # 1 - 8 / (4 proposals * variance 4)
    assert report["explained_by_pca"] == 0.75
    assert report["effective_clusters"] == pytest.approx(2)  # two clusters of one size
    assert report["dead_clusters"] == [1, 3]
    assert [entry["mean_squared_distance"] for entry in report["clusters"]] == [1.5, 0, 2.5, 0]
    assert report["size_quantiles"] == {"min": 0, "p10": 0, "median": 1, "p90": 2, "max": 2}


def test_size_histogram_counts_every_cluster_once() -> None:
    histogram = size_histogram(np.array([0, 0, 1, 2, 3, 4, 7, 9]))
    assert [(entry["from"], entry["to"], entry["clusters"]) for entry in histogram] == [
        (0, 0, 2),
        (1, 1, 1),
        (2, 3, 2),
        (4, 7, 2),
        (8, 15, 1),
    ]
    lines = list(histogram_lines(histogram))
    assert len(lines) == 5
    assert lines[0].split() == ["0", "proposals", "2", "clusters", "#" * 28]
    assert lines[1].count("#") == 14


def test_histogram_of_large_clusters_starts_at_the_first_bin_in_use() -> None:
    assert len(list(histogram_lines(size_histogram(np.array([100, 120, 300]))))) == 3  # 64-127, 128-255, 256-511


@pytest.mark.parametrize(
    ("labels", "k", "words"),
    [
        (list(range(8)), 8, []),
        ([0, 1, 2, 3, 4, 5, 6, 6], 8, ["1 of 8 clusters have no members"]),
        ([0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 12, ["holds 31%"]),
    ],
)
def test_problems(labels: list[int], k: int, words: list[str]) -> None:
    problems = find_problems(build_report(make_clustering(labels, k), PROJECTION, 1))
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


def test_nearest_rows_prefer_different_images() -> None:
    # rows 0-9 are of image 0, rows 10, 11 of image 1; nearest first by distance = row number
    clustering = make_clustering([0] * 12, k=1, distances=list(range(12)))
    assert nearest_rows(clustering, 0, np.array([0, 10, 12])) == [0, 10, 1, 2, 3, 4, 5, 6]
