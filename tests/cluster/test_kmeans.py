"""PCA and k-means over files: right answers, small memory, and the same bytes after any interruption."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn
from sklearn.decomposition import PCA

from aligndet_cli.cluster import kmeans
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.cluster.kmeans import assign, check_sizes, fit_kmeans, fit_pca, project
from aligndet_cli.cluster.rows import RowFile, Watch, row_ranges, shuffled_batches
from aligndet_cli.errors import ConfigError, Preempted
from aligndet_cli.logs import Progress
from aligndet_cli.processes.signals import StopSignal


class StopAfter(StopSignal):
    """Asks for a stop at the n-th check, as a signal at that moment would."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.checks = checks

    def raise_if_requested(self) -> None:
        self.checks -= 1
        if self.checks < 0:
            raise Preempted("test")


def settings_of(num_threads: int = 0, **settings: int) -> ClusterConfig:
    return ClusterConfig.model_validate({"runtime": {"num_workers": num_threads}, **settings})


def silent(stop: StopSignal | None = None) -> Watch:
    return Watch(Progress("test", 1, mode="none"), stop or StopSignal())


def write_features(path: Path, values: np.ndarray) -> RowFile:
    features = RowFile(path, "<f2", *values.shape)
    features.create()
    features.write(0, values.astype(np.float16))
    return features


def blobs(seed: int, num_rows: int, num_channels: int, num_blobs: int) -> tuple[np.ndarray, np.ndarray]:
    """Well separated blobs (M, C) and the blob of each row (M,), in random order."""
    rng = np.random.default_rng(seed)
    owners = rng.integers(num_blobs, size=num_rows)
    centres = rng.normal(scale=10, size=(num_blobs, num_channels))
    return centres[owners] + rng.normal(scale=0.5, size=(num_rows, num_channels)), owners


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few hundred rows make several steps of every pass."""
    for name, rows in (("_PCA_ROWS", 64), ("_KMEANS_ROWS", 64), ("_BLOCK_ROWS", 80)):
        monkeypatch.setattr(kmeans, name, rows)


def run_all(folder: Path, features: RowFile, settings: ClusterConfig, stop: StopSignal | None = None) -> list[bytes]:
    watch = silent(stop)
    projection = fit_pca(features, settings, folder, watch)
    projected = RowFile(folder / "projected.f32", "<f4", features.num_rows, settings.pca_dim)
    project(features, projection, projected, settings, watch)
    centroids = fit_kmeans(projected, settings, folder, watch)
    found = assign(projected, centroids, settings, watch)
    arrays = (projection.mean, projection.components, projection.explained, centroids, found.labels, found.distances)
    return [array.tobytes() for array in arrays] + [np.float64(found.variance).tobytes()]


def test_blobs_are_found(tmp_path: Path) -> None:
    values, owners = blobs(0, num_rows=611, num_channels=13, num_blobs=5)
    settings = settings_of(k=5, pca_dim=4, kmeans_epochs=20)
    features = write_features(tmp_path / "features.f16", values)
    projection = fit_pca(features, settings, tmp_path, silent())
    projected = RowFile(tmp_path / "projected.f32", "<f4", 611, 4)
    project(features, projection, projected, settings, silent())
    centroids = fit_kmeans(projected, settings, tmp_path, silent())
    found = assign(projected, centroids, settings, silent())
    # 5 centres span 4 dimensions, so nothing but the noise is lost and every cluster is one blob.
    assert projection.explained.sum() > 0.97
    assert len(set(zip(found.labels.tolist(), owners.tolist(), strict=True))) == 5
    # Inside a blob, 4 dimensions of noise with variance 0.25 are left.
    assert found.distances.mean() == pytest.approx(4 * 0.25, rel=0.15)
    assert found.variance == pytest.approx(projected.read(0, 611).var(axis=0).sum(), rel=1e-5)


def test_pca_agrees_with_the_exact_one(tmp_path: Path, small_steps: None) -> None:
    # A spectrum that falls off clearly: the incremental PCA drops hardly anything between its steps.
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(500, 11)) * 2.0 ** -np.arange(11)) @ np.linalg.qr(rng.normal(size=(11, 11)))[0]
    features = write_features(tmp_path / "features.f16", values + 3)
    found = fit_pca(features, settings_of(k=2, pca_dim=4), tmp_path, silent())
    exact = PCA(4).fit(features.read(0, 500).astype(np.float64))
    np.testing.assert_allclose(found.mean, exact.mean_, atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(found.components * exact.components_, axis=1)), 1, atol=2e-3)
    np.testing.assert_allclose(found.explained, exact.explained_variance_ratio_, rtol=0.01)


def test_labels_are_the_nearest_centroids(tmp_path: Path, small_steps: None) -> None:
    rng = np.random.default_rng(2)
    rows, centroids = rng.normal(size=(157, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    projected = RowFile(tmp_path / "projected.f32", "<f4", 157, 3)
    projected.create()
    projected.write(0, rows)
    found = assign(projected, centroids, settings_of(k=7, pca_dim=3), silent())
    table = np.square(rows[:, None] - centroids).sum(axis=2)  # (157, 7)
    np.testing.assert_array_equal(found.labels, table.argmin(axis=1))
    np.testing.assert_allclose(found.distances, table.min(axis=1), rtol=1e-5)


def test_interrupted_at_every_step_gives_the_same_bytes(tmp_path: Path, small_steps: None) -> None:
    values, _ = blobs(3, num_rows=211, num_channels=11, num_blobs=9)
    settings = settings_of(k=5, pca_dim=4, pca_samples=100, kmeans_epochs=3, seed=7)
    expected_folder = tmp_path / "expected"
    expected_folder.mkdir()
    expected = run_all(expected_folder, write_features(expected_folder / "features.f16", values), settings)
    for checks in range(100):
        folder = tmp_path / str(checks)
        folder.mkdir()
        features = write_features(folder / "features.f16", values)
        try:
            run_all(folder, features, settings, StopAfter(checks))
        except Preempted:
            pass
        else:
            break
        assert run_all(folder, features, settings) == expected
        shutil.rmtree(folder)
    # 2 PCA steps, 3 blocks, 3 epochs of 2 to 4 steps, 3 blocks: the loop must really have stopped in all of them.
    assert 2 + 3 + 3 * 2 + 3 <= checks <= 2 + 3 + 3 * 4 + 3


def test_what_another_scikit_learn_began_is_fitted_anew(
    tmp_path: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, _ = blobs(6, num_rows=211, num_channels=11, num_blobs=9)
    projected = RowFile(tmp_path / "projected.f32", "<f4", *values.shape)
    projected.create()
    projected.write(0, values.astype(np.float32))
    settings, progress = settings_of(k=5, pca_dim=11, kmeans_epochs=3), Progress("test", 1, mode="none")
    expected = fit_kmeans(projected, settings, tmp_path, Watch(progress, StopSignal()))
    assert progress.done == 3 * 211
    np.testing.assert_array_equal(fit_kmeans(projected, settings, tmp_path, silent()), expected)
    monkeypatch.setattr(sklearn, "__version__", "another")
    progress = Progress("test", 1, mode="none")
    np.testing.assert_array_equal(fit_kmeans(projected, settings, tmp_path, Watch(progress, StopSignal())), expected)
    assert (progress.start, progress.done) == (0, 3 * 211)


def test_result_depends_on_seed_but_not_on_threads(tmp_path: Path, small_steps: None) -> None:
    values, _ = blobs(4, num_rows=307, num_channels=11, num_blobs=9)
    results = []
    for run, (seed, num_threads) in enumerate([(0, 0), (0, 3), (1, 0)]):
        folder = tmp_path / str(run)
        folder.mkdir()
        settings = settings_of(k=5, pca_dim=4, kmeans_epochs=2, seed=seed, num_threads=num_threads)
        results.append(run_all(folder, write_features(folder / "features.f16", values), settings))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_all_rows_equal(tmp_path: Path, small_steps: None) -> None:
    features = write_features(tmp_path / "features.f16", np.full((107, 5), 2.0))
    labels = run_all(tmp_path, features, settings_of(k=3, pca_dim=2, kmeans_epochs=2))[4]
    assert set(np.frombuffer(labels, np.int32).tolist()) <= {0, 1, 2}


def test_k_equal_to_number_of_rows(tmp_path: Path) -> None:
    values, _ = blobs(5, num_rows=7, num_channels=5, num_blobs=7)
    labels = run_all(tmp_path, write_features(tmp_path / "features.f16", values), settings_of(k=7, pca_dim=5))[4]
    assert sorted(np.frombuffer(labels, np.int32).tolist()) == list(range(7))


@pytest.mark.parametrize(
    ("num_rows", "num_channels", "settings", "flag"),
    [
        (9, 512, settings_of(k=10, pca_dim=4), "--k 9"),
        (2000, 512, settings_of(k=5, pca_dim=513), "--pca-dim 512"),
        (300, 512, settings_of(k=5, pca_dim=301), "--pca-dim 300"),
    ],
)
def test_too_few(num_rows: int, num_channels: int, settings: ClusterConfig, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        check_sizes(num_rows, num_channels, settings)


def test_check_sizes_accepts_the_limit() -> None:
    check_sizes(10, 4, settings_of(k=10, pca_dim=4))


@pytest.mark.parametrize("num_rows", [1, 255, 256, 257, 1000, 5003])
@pytest.mark.parametrize("batch_rows", [64, 512, 4096])
def test_shuffled_batches_hold_every_row_once(num_rows: int, batch_rows: int) -> None:
    batches = shuffled_batches(num_rows, batch_rows, np.random.default_rng(0))
    rows = [row for batch in batches for start, stop in batch for row in range(start, stop)]
    assert sorted(rows) == list(range(num_rows))
    sizes = [sum(stop - start for start, stop in batch) for batch in batches]
    assert min(sizes) >= min(num_rows, batch_rows) / 2
    assert max(sizes) < 2 * batch_rows + 256


def test_row_ranges() -> None:
    assert row_ranges(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert row_ranges(0, 3) == []
