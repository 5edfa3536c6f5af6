"""Quality of clusters in numbers, for `report.json`, the log and the manifest."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.cluster.kmeans import Clustering, Members, Projection

# Our rules of thumb for warnings; the paper gives none.
_MANY_DEAD = 0.05
_HUGE_CLUSTER = 0.25
_BAR_WIDTH = 28


def build_size_report(members: Members, num_images: int) -> dict[str, Any]:
    """Return statistics of the cluster sizes, as JSON values; see `build_report`."""
    sizes, num_rows = members.sizes, len(members.labels)
    shares = sizes[sizes > 0] / num_rows
    return {
        "num_proposals": num_rows,
        "num_images_with_proposals": num_images,
        "k": len(sizes),
        "effective_clusters": float(np.exp(-np.sum(shares * np.log(shares)))),
        "dead_clusters": np.flatnonzero(sizes == 0).tolist(),
        "size_quantiles": {
            name: float(np.quantile(sizes, share))
            for name, share in (("min", 0), ("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("max", 1))
        },
        "size_histogram": size_histogram(sizes),
        "clusters": [
            {"cluster_id": index, "size": int(size), "share": float(size / num_rows)}
            for index, size in enumerate(sizes)
        ],
    }


def build_report(clustering: Clustering, projection: Projection, num_images: int) -> dict[str, Any]:
    """Return the content of `report.json`.

    - `inertia` is the sum of squared distances to the centroids, which has no scale of its own.
    - `explained_by_clusters` is 1 - inertia / total variance: 0 if clusters say nothing about the features, 1 if all
      members of a cluster are equal.
    - `explained_by_pca` is the share of the features' variance that the PCA keeps.
    - `effective_clusters` is exp(entropy of the sizes): k if all clusters have the same size.
    """
    report, num_rows = build_size_report(clustering, num_images), len(clustering.labels)
    inertia = float(clustering.distances.sum(dtype=np.float64))
    sums = np.bincount(clustering.labels, weights=clustering.distances, minlength=clustering.k)
    for entry, mean_distance in zip(report["clusters"], sums / np.maximum(clustering.sizes, 1), strict=True):
        entry["mean_squared_distance"] = float(mean_distance)
    return {
        "pca_dim": len(projection.components),
        "feature_dim": len(projection.mean),
        "inertia": inertia,
        "inertia_per_proposal": inertia / num_rows,
        "explained_by_pca": float(projection.explained.sum()),
        "explained_by_clusters": 1 - inertia / (clustering.variance * num_rows) if clustering.variance > 0 else 0.0,
        **report,
    }


def size_histogram(sizes: NDArray[np.int64]) -> list[dict[str, int]]:
    """Count clusters by size, (num_clusters,) int64, in bins that double, ends included: 0, 1, 2-3, 4-7, ..."""
    num_bins = int(sizes.max()).bit_length() + 1
    bins = np.array([int(size).bit_length() for size in sizes])
    counts = np.bincount(bins, minlength=num_bins)
    return [
        {"from": 2 ** (index - 1) if index else 0, "to": 2**index - 1, "clusters": int(count)}
        for index, count in enumerate(counts)
    ]


def histogram_lines(histogram: list[dict[str, int]]) -> Iterator[str]:
    """Draw a histogram as text, one bar per bin, without the empty bins at the small end."""
    most = max(entry["clusters"] for entry in histogram)
    first = next(index for index, entry in enumerate(histogram) if entry["clusters"])
    for entry in histogram[first:]:
        low, high = f"{entry['from']:,}", f"{entry['to']:,}"
        label = low if low == high else f"{low}-{high}"
        bar = "#" * -(-entry["clusters"] * _BAR_WIDTH // most)
        yield f"  {label:>19} proposals  {entry['clusters']:>5} clusters  {bar}".rstrip()


def find_problems(report: dict[str, Any]) -> list[str]:
    """Return warnings about the clusters, one line each."""
    problems = []
    num_dead, k = len(report["dead_clusters"]), report["k"]
    if num_dead > _MANY_DEAD * k:
        problems.append(
            f"{num_dead} of {k} clusters have no members: the proposals are less varied than --k asks for; lower --k"
        )
    largest = report["size_quantiles"]["max"] / report["num_proposals"]
    if largest > max(_HUGE_CLUSTER, 2 / k):
        problems.append(
            f"one cluster holds {largest:.0%} of all proposals: features that tell little apart are usual with "
            "an untrained backbone; check --backbone-weights and sheet.jpg"
        )
    return problems
