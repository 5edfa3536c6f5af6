"""How time and memory of PCA and k-means grow with the number of proposals. Run it, it is not a test.

    python tests/benchmarks/cluster.py --rows 250000 500000 1000000 --channels 2048

Features are drawn (256 blobs with a falling spectrum) and written to a temporary folder: 2 bytes per number. Each
size runs in a fresh process, so that its peak memory is its own. Compare the ratios, not the seconds.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.cluster.kmeans import assign, fit_kmeans, fit_pca, project
from aligndet_cli.cluster.rows import RowFile, Watch, row_ranges
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.logs import Progress
from aligndet_cli.processes.signals import StopSignal

PASSES = ("pca", "projection", "k-means", "assignment")


def draw_features(file: Path, num_rows: int, num_channels: int) -> RowFile:
    """Seeded features, written a block at a time."""
    features = RowFile(file, "<f2", num_rows, num_channels)
    features.create()
    rng = np.random.default_rng(0)
    spectrum = (np.arange(num_channels) + 1.0) ** -0.5
    centres = rng.standard_normal((256, num_channels)) * spectrum
    for start, stop in row_ranges(num_rows, 8192):
        noise = rng.standard_normal((stop - start, num_channels), dtype=np.float32) * spectrum
        features.write(start, centres[rng.integers(256, size=stop - start)] + 0.5 * noise)
    return features


def measure(folder: Path, features: RowFile, settings: ClusterConfig) -> dict[str, float]:
    """CPU seconds of each pass, wall-clock seconds and peak memory of this process in GB."""
    watch = Watch(Progress("benchmark", features.num_rows, mode="none"), StopSignal())
    projected = RowFile(folder / "projected.f32", "<f4", features.num_rows, settings.pca_dim)
    began = time.monotonic()
    moments = [time.process_time()]
    projection = fit_pca(features, settings, folder, watch)
    moments.append(time.process_time())
    project(features, projection, projected, settings, watch)
    moments.append(time.process_time())
    centroids = fit_kmeans(projected, settings, folder, watch)
    moments.append(time.process_time())
    assign(projected, centroids, settings, watch)
    moments.append(time.process_time())
    seconds = {name: float(moments[index + 1] - moments[index]) for index, name in enumerate(PASSES)}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {**seconds, "cpu": moments[-1] - moments[0], "wall": time.monotonic() - began, "memory": memory}


def run_one(arguments: argparse.Namespace) -> None:
    """Body of the process that measures one size."""
    settings = ClusterConfig(
        k=arguments.k,
        pca_dim=arguments.pca_dim,
        pca_samples=arguments.pca_samples or None,
        kmeans_epochs=arguments.epochs,
        runtime=RuntimeConfig(num_workers=arguments.threads),
    )
    features = RowFile(arguments.folder / "features.f16", "<f2", arguments.rows[0], arguments.channels)
    sys.stdout.write(json.dumps(measure(arguments.folder, features, settings)))


def main() -> None:
    """Print a table with one line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 40_000, 80_000])
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--pca-dim", type=int, default=256)
    parser.add_argument("--pca-samples", type=int, default=0, help="0 = all rows; the stage's default is 262144")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        run_one(arguments)
        return
    titles = (*(f"{name} s" for name in PASSES), "CPU s", "per row", "wall s", "memory GB")
    sys.stdout.write(f"{'proposals':>10}" + "".join(f"{title:>14}" for title in titles) + "\n")
    first_per_row = None
    for num_rows in arguments.rows:
        folder = Path(tempfile.mkdtemp(prefix="aligndet-benchmark-"))
        try:
            draw_features(folder / "features.f16", num_rows, arguments.channels)
            command = [sys.executable, __file__, *sys.argv[1:], "--rows", str(num_rows), "--folder", str(folder)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        finally:
            shutil.rmtree(folder)
        per_row = found["cpu"] / num_rows
        first_per_row = first_per_row or per_row
        cells = [f"{found[name]:.1f}" for name in (*PASSES, "cpu")]
        cells += [f"x{per_row / first_per_row:.2f}", f"{found['wall']:.1f}", f"{found['memory']:.2f}"]
        sys.stdout.write(f"{num_rows:>10,}" + "".join(f"{cell:>14}" for cell in cells) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
