"""What the machine around the search costs: workers, backends, memory, and how all of it grows with the images.

    python tests/benchmarks/proposals_scale.py                       # 1 and 2 workers, processes and threads
    python tests/benchmarks/proposals_scale.py --images 100 1000 10000 --workers 2 --backends processes

Draws JPEGs of 640x480 into a temporary folder. Every line is a process of its own; lines are interleaved and repeated,
and the best of them is shown. CPU times are of all processes together. On a machine with other work, read the last
column instead of images/s: what the CPU time per image, and the share of time in which workers were not waiting for
work, make of free cores.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.proposals import stage
from aligndet_cli.workspace import Workspace

SIZE_HW = (480, 640)
TICK = os.sysconf("SC_CLK_TCK")


def draw_image(seed: int) -> NDArray[np.uint8]:
    """(480, 640, 3) uint8: some thirty shapes with a texture on a background with a coarse one."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 190, (12, 16, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(coarse, SIZE_HW[::-1], interpolation=cv2.INTER_CUBIC))
    for _ in range(30):
        centre, axes = rng.integers(0, [640, 480]).tolist(), rng.integers(15, 120, 2).tolist()
        colour = rng.integers(0, 256, 3).tolist()
        if rng.random() < 0.5:
            cv2.ellipse(image, centre, axes, int(rng.integers(180)), 0, 360, colour, -1)
        else:
            cv2.rectangle(image, centre, (centre[0] + axes[0], centre[1] + axes[1]), colour, -1)
    texture = cv2.resize(rng.integers(0, 30, (*[side // 2 for side in SIZE_HW], 3), dtype=np.uint8), SIZE_HW[::-1])
    return np.asarray(cv2.add(image, texture), dtype=np.uint8)


def draw_folder(folder: Path, num_images: int) -> None:
    """Write the JPEGs that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(num_images):
        file = folder / f"{seed:06d}.jpg"
        if not file.exists():
            cv2.imwrite(str(file), draw_image(seed), [cv2.IMWRITE_JPEG_QUALITY, 90])


def children() -> list[str]:
    """Process ids of the workers."""
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def cpu_seconds(pid: str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Watch:
    """How much of the time the workers were busy, between the first image and the last tenth."""

    def __init__(self, backend: str, num_workers: int, num_images: int) -> None:
        # The second look comes before the workers run out of images.
        self.backend, self.num_workers, self.num_left = backend, num_workers, num_images * 9 // 10
        self.snapshots: list[tuple[float, float]] = []

    def advance(self) -> None:
        """Call after each image."""
        self.num_left -= 1
        if not self.snapshots or not self.num_left:
            self.snapshots.append((time.monotonic(), sum(map(busy_seconds, self.threads()))))

    def threads(self) -> list[str]:
        """Folders in /proc of the threads that do the work."""
        if self.num_workers == 1:
            return ["/proc/self"]
        if self.backend == "threads":
            return [str(task) for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
        return [f"/proc/{pid}" for pid in children()]

    def share(self) -> float:
        """Of the time, from 0 to 1."""
        (began, busy_before), (ended, busy_after) = self.snapshots
        return (busy_after - busy_before) / (ended - began) / self.num_workers


def busy_seconds(thread: str) -> float:
    """Time that a thread ran or would have run, had there been a free core."""
    running, waiting = Path(f"{thread}/schedstat").read_text().split()[:2]
    return (int(running) + int(waiting)) / 1e9


def peak_mb(pid: str) -> float:
    """Most memory that a process has had, including pages that it shares with others."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Body of the process that measures one line. Compiling and the start of the workers are timed apart."""
    runtime = {"num_workers": arguments.workers[0]}
    settings = {name: getattr(arguments, name) for name in ("mode", "working_size") if getattr(arguments, name)}
    config = {"runtime": runtime, "backend": arguments.backends[0], **settings}
    folder = arguments.folder

    def plan_of(name: str, num_images: int) -> stage.Plan:
        data = {"root": folder / "images", "format": "folder", "limit": num_images}
        validated = stage.ProposalsConfig.model_validate({**config, "data": data, "name": name})
        return stage.prepare(validated, Workspace(folder / "workspace"), force=True)

    def find(plan: stage.Plan) -> dict[str, float]:
        watch = Watch(arguments.backends[0], arguments.workers[0], len(plan.image_set))
        append = stage.Journal.append
        stage.Journal.append = lambda journal, found: (append(journal, found), watch.advance())
        began, cpu = time.monotonic(), time.process_time() + sum(map(cpu_seconds, children()))
        stage._find_missing(plan, "none")
        ended = time.process_time() + sum(map(cpu_seconds, children()))
        stage.Journal.append = append
        return {"wall_s": time.monotonic() - began, "cpu_s": ended - cpu, "busy": watch.share()}

    with (warm := plan_of("warm", 16)).output.lock():
        warm.output.begin(warm.config)
        start_s = find(warm)["wall_s"]
    plan = plan_of(f"of-{os.getpid()}", arguments.images[0])
    with plan.output.lock():
        plan.output.begin(plan.config)
        numbers = find(plan)
        worker_mb = max((peak_mb(pid) for pid in children()), default=0.0)
        began = time.process_time()
        stage._finish(plan, stage._records(plan))
    finish_s = time.process_time() - began
    shutil.rmtree(plan.output.folder)
    return {**numbers, "start_s": start_s, "finish_s": finish_s, "worker_mb": worker_mb, "main_mb": peak_mb("self")}


def measure_apart(arguments: argparse.Namespace, folder: Path, line: tuple[int, str, int]) -> dict[str, Any]:
    num_images, backend, num_workers = line
    words = ["--one", "--folder", str(folder), "--images", str(num_images), "--workers", str(num_workers)]
    words += ["--backends", backend]
    words += ["--mode", arguments.mode] if arguments.mode else []
    words += ["--working-size", str(arguments.working_size)] if arguments.working_size else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, __file__, *words], check=True, stdout=-1, text=True, env=environment)
    return dict(json.loads(ran.stdout))


def main() -> None:
    """Print a table with one line per combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[200])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backends", nargs="+", default=["processes", "threads"])
    parser.add_argument("--mode", help="of the search; the stage's default")
    parser.add_argument("--working-size", type=int, help="of the search; the stage's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the drawn images for another time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(measure(arguments)))
        return
    lines = [(n, b, w) for n in arguments.images for b in arguments.backends for w in arguments.workers]
    runs: dict[tuple[int, str, int], list[dict[str, Any]]] = {line: [] for line in lines}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        draw_folder(folder / "images", max(arguments.images))
        for _ in range(arguments.repeats):
            for line in lines:
                runs[line].append(measure_apart(arguments, folder, line))
    print(
        "images  backend    workers  images/s  CPU ms/image  + finish  start s  worker MB  main MB  busy  on free cores"
    )
    for (num_images, backend, num_workers), found in runs.items():
        best = {key: min(run[key] for run in found) for key in found[0]}
        cpu = statistics.median(run["cpu_s"] for run in found) / num_images
        busy = statistics.median(run["busy"] for run in found)
        print(
            f"{num_images:6}  {backend:<9}  {num_workers:7}  {num_images / best['wall_s']:8.1f}  {1000 * cpu:12.2f}"
            f"  {1000 * best['finish_s'] / num_images:8.2f}  {best['start_s']:7.1f}  {best['worker_mb']:9.0f}"
            f"  {best['main_mb']:7.0f}  {busy:4.0%}  {num_workers * busy / cpu:10.1f}/s"
        )


if __name__ == "__main__":
    main()
