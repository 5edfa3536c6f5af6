"""PCA and k-means over features on disk, with a few thousand rows in memory at a time, resumable after every step.

All linear algebra runs on one BLAS thread: sums inside a matrix product depend on how it is split over threads, and
clusters must not depend on the number of cores. Projection and assignment, whose blocks of rows are independent, give
the blocks to threads instead. Results still depend on the kind of CPU, since BLAS chooses its kernels by it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import IncrementalPCA
from threadpoolctl import threadpool_limits

from aligndet_cli.arrays import save_arrays
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.cluster.rows import DoneMarks, RowFile, Watch, map_in_order, row_ranges, shuffled_batches
from aligndet_cli.errors import ConfigError

# Rows per step of the incremental PCA, an SVD of (rows + pca_dim, C) in float64. Fewer rows take less memory, more rows
# less time per row: at C = 2,048, 8,192 rows take 0.8 GB and 1.1 ms per row, 4,096 rows 0.6 GB and 1.5 ms.
_PCA_ROWS = 8192
_KMEANS_ROWS = 4096
# Rows per independent block. Each thread has a block in memory, in float16 and float32.
_BLOCK_ROWS = 2048
_PCA_STATE = ("components_", "mean_", "var_", "singular_values_", "n_samples_seen_", "n_components_")


@dataclass(frozen=True)
class Projection:
    """Fitted PCA.

    Attributes:
        mean: (C,) float32.
        components: (D, C) float32, orthonormal rows.
        explained: (D,) float64, share of the features' variance along each component.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    explained: NDArray[np.float64]

    def __call__(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Project (N, C) features of any float dtype to (N, D) float32."""
        centred: NDArray[np.float32] = features.astype(np.float32) - self.mean
        return np.asarray(centred @ self.components.T, np.float32)


@dataclass(frozen=True)
class Members:
    """Clusters of M proposals.

    Attributes:
        labels: (M,) int32 cluster id of each proposal.
        distances: (M,) float32 squared distance of each proposal to its centroid; all 0 if unknown.
        k: number of clusters.
    """

    labels: NDArray[np.int32]
    distances: NDArray[np.float32]
    k: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(k,) int64 number of members of each cluster."""
        return np.bincount(self.labels, minlength=self.k).astype(np.int64)


@dataclass(frozen=True)
class Clustering(Members):
    """Clusters found by k-means in D PCA dimensions.

    Attributes:
        centroids: (k, D) float32.
        variance: mean squared distance of the projected features to their mean, as it would be with one cluster.
    """

    centroids: NDArray[np.float32]
    variance: float


def check_sizes(num_rows: int, num_channels: int, config: ClusterConfig) -> None:
    """Refuse sizes that cannot be clustered.

    Raises:
        ConfigError: fewer proposals than clusters, or more PCA dimensions than proposals or channels.
    """
    if num_rows < config.k:
        raise ConfigError(
            f"cluster: {num_rows:,} proposals cannot make {config.k} clusters; use --k {max(num_rows, 1)} or less, "
            "or make proposals for more images"
        )
    if config.pca_dim > num_channels:
        raise ConfigError(
            f"cluster: the backbone's features have {num_channels} dimensions; "
            f"use --pca-dim {num_channels} or less instead of {config.pca_dim}"
        )
    if config.pca_dim > num_rows:
        raise ConfigError(
            f"cluster: {num_rows:,} proposals span fewer than {config.pca_dim} dimensions; "
            f"use --pca-dim {num_rows} or less, or make proposals for more images"
        )


def num_pca_rows(num_rows: int, config: ClusterConfig) -> int:
    """Return the number of rows that `fit_pca` reads."""
    return _num_rows_of(_pca_batches(num_rows, config))


def fit_pca(features: RowFile, config: ClusterConfig, folder: Path, watch: Watch) -> Projection:
    """Fit scikit-learn's incremental PCA to the features, from the last saved step on.

    Args:
        features: (M, C) rows.
        folder: keeps `pca-state.npz` between steps.
    """
    batches = _pca_batches(features.num_rows, config)
    state_file = folder / "pca-state.npz"
    estimator, done = IncrementalPCA(config.pca_dim), 0
    if state_file.exists():
        with np.load(state_file) as state:
            done = int(state["done"])
            for name in _PCA_STATE:
                setattr(estimator, name, state[name][()])
        watch.resumed(_num_rows_of(batches[:done]))
    with threadpool_limits(1, user_api="blas"):
        for batch in batches[done:]:
            rows = features.read_ranges(batch).astype(np.float32)
            with np.errstate(invalid="ignore"):  # 0 / 0 in an attribute that is not used, if all features are equal
                estimator.partial_fit(rows, check_input=False)
            done += 1
            save_arrays(state_file, {"done": done, **{name: getattr(estimator, name) for name in _PCA_STATE}})
            watch.finished(len(rows))
    mean, components = (np.ascontiguousarray(part, np.float32) for part in (estimator.mean_, estimator.components_))
    return Projection(mean, components, _explained_share(estimator))


def project(features: RowFile, projection: Projection, projected: RowFile, config: ClusterConfig, watch: Watch) -> None:
    """Write the projection of all (M, C) rows to `projected` (M, D); blocks that are finished are skipped."""
    blocks = row_ranges(features.num_rows, _BLOCK_ROWS)
    marks = DoneMarks(projected.path.with_suffix(".done"), len(blocks))
    if not marks.path.exists():
        projected.create()
        marks.create()
    is_done = marks.read()
    watch.resumed(_num_rows_of([[block for block, done in zip(blocks, is_done, strict=True) if done]]))
    todo = np.flatnonzero(~is_done).tolist()
    with threadpool_limits(1, user_api="blas"):
        found = map_in_order(lambda index: projection(features.read(*blocks[index])), todo, config.num_threads)
        for index, rows in zip(todo, found, strict=True):
            projected.write(blocks[index][0], rows)
            marks.mark(index)
            watch.finished(len(rows))


def fit_kmeans(projected: RowFile, config: ClusterConfig, folder: Path, watch: Watch) -> NDArray[np.float32]:
    """Return the (k, D) float32 centroids of scikit-learn's mini-batch k-means, fitted from the last epoch on.

    As in scikit-learn, clusters with hardly any members are restarted at random rows, but not in the last epoch, so
    that centroids settle.

    Args:
        projected: (M, D) float32 rows.
        folder: keeps `kmeans-state.npz` between epochs.
    """
    state_file = folder / "kmeans-state.npz"
    batch_rows, random = max(_KMEANS_ROWS, 16 * config.k), np.random.RandomState(config.seed)
    estimator = MiniBatchKMeans(
        config.k, batch_size=batch_rows, init_size=batch_rows, compute_labels=False, random_state=random, n_init=1
    )
    done = _restore_kmeans(estimator, random, state_file)
    watch.resumed(done * projected.num_rows)
    with threadpool_limits(1, user_api="blas"):
        for epoch in range(done, config.kmeans_epochs):
            estimator.reassignment_ratio = 0.01 if epoch < config.kmeans_epochs - 1 else 0.0
            rng = np.random.default_rng((config.seed, 1, epoch))
            for batch in shuffled_batches(projected.num_rows, batch_rows, rng):
                rows = projected.read_ranges(batch)
                estimator.partial_fit(rows)
                watch.finished(len(rows))
            save_arrays(state_file, {"done": epoch + 1, **_kmeans_state(estimator, random)})
    return np.ascontiguousarray(estimator.cluster_centers_, dtype=np.float32)


def assign(projected: RowFile, centroids: NDArray[np.float32], config: ClusterConfig, watch: Watch) -> Clustering:
    """Assign every row of `projected` (M, D) to the nearest of the (k, D) centroids."""
    labels = np.empty(projected.num_rows, np.int32)
    distances = np.empty(projected.num_rows, np.float32)
    blocks = row_ranges(projected.num_rows, _BLOCK_ROWS)
    half_norms = 0.5 * np.einsum("ij,ij->i", centroids, centroids)  # (k,)
    total, total_squares = np.zeros(projected.num_columns), 0.0

    def nearest(block: tuple[int, int]) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float64], float]:
        rows = projected.read(*block)
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), so the nearest centroid has the largest bracket.
        block_labels = np.argmax(rows @ centroids.T - half_norms, axis=1)
        offsets = rows - centroids[block_labels]  # exact: the formula above loses digits near 0
        block_distances = np.einsum("ij,ij->i", offsets, offsets)
        squares = float(np.square(rows).sum(dtype=np.float64))
        return block_labels, block_distances, rows.sum(axis=0, dtype=np.float64), squares

    with threadpool_limits(1, user_api="blas"):
        found = map_in_order(nearest, blocks, config.num_threads)
        for (start, stop), (block_labels, block_distances, block_sum, block_squares) in zip(blocks, found, strict=True):
            labels[start:stop], distances[start:stop] = block_labels, block_distances
            total += block_sum
            total_squares += block_squares
            watch.finished(stop - start)
    mean = total / projected.num_rows
    variance = max(total_squares / projected.num_rows - float(mean @ mean), 0.0)
    return Clustering(labels, distances, len(centroids), centroids, variance)


def _pca_batches(num_rows: int, config: ClusterConfig) -> list[list[tuple[int, int]]]:
    # The first step needs at least pca_dim rows; a shuffled batch always has at least half of its size.
    batch_rows = max(_PCA_ROWS, 4 * config.pca_dim)
    batches = shuffled_batches(num_rows, batch_rows, np.random.default_rng((config.seed, 0)))
    limit = num_rows if config.pca_samples is None else config.pca_samples
    return batches[: max(1, -(-limit // batch_rows))]


def _num_rows_of(batches: list[list[tuple[int, int]]]) -> int:
    return sum(stop - start for batch in batches for start, stop in batch)


def _explained_share(estimator: IncrementalPCA) -> NDArray[np.float64]:
    # Not scikit-learn's own attribute: it divides by the total variance, which is 0 if all features are equal.
    total = float(np.sum(estimator.var_)) * float(estimator.n_samples_seen_)
    squares = np.asarray(estimator.singular_values_, np.float64) ** 2
    return squares / total if total > 0 else np.zeros_like(squares)


def _kmeans_state(estimator: MiniBatchKMeans, random: np.random.RandomState) -> dict[str, Any]:
    """Return everything that the next `partial_fit` depends on, as arrays (no pickle).

    Besides the settings, that is all that fitting has added to the estimator, under scikit-learn's names.
    """
    settings, (_, keys, *rest) = estimator.get_params(), random.get_state()
    added = {name: value for name, value in vars(estimator).items() if name not in settings and value is not random}
    state = {f"fitted.{name}": value for name, value in added.items()}
    return {**state, "version": sklearn.__version__, "random_keys": keys, "random_rest": np.array(rest)}


def _restore_kmeans(estimator: MiniBatchKMeans, random: np.random.RandomState, file: Path) -> int:
    """Load a saved state into a new estimator and its random number generator; return the number of finished epochs.

    Nothing is loaded if nothing was saved, or by another version of scikit-learn.
    """
    if not file.exists():
        return 0
    with np.load(file) as state:
        if state.get("version") != sklearn.__version__:
            return 0
        for name in state.files:
            if name.startswith("fitted."):
                setattr(estimator, name.removeprefix("fitted."), state[name][()])
        position, has_gauss, gauss = state["random_rest"]
        random.set_state(("MT19937", state["random_keys"], int(position), int(has_gauss), gauss))
        return int(state["done"])
