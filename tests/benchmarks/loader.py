"""What it costs to open COCO-sized labels and proposals, and how fast images come out of the loader. Not a test.

    python tests/benchmarks/loader.py --images 118000 --boxes 860000 --proposals 10000000 --workers 2
        [--photos path/to/minicoco/train2017]

Labels with polygons, proposals and a few hundred 640x480 JPEGs, or photos of your own, under as many names as there are
images go to a temporary folder. Each line is measured in a fresh process, so that its peak memory is its own. On a
shared machine seconds vary; those of the CPU less so. The loader hands over images at full size, so the sizes of views
and batches do not matter to it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from aligndet_cli.artifacts.proposals import STORE_FILES, ImageProposals, write_store
from aligndet_cli.config import DataConfig
from aligndet_cli.data.images import read_size_hw
from aligndet_cli.data.open import open_images
from aligndet_cli.workspace import Workspace

if TYPE_CHECKING:
    from aligndet_cli.data.loaders import SampleStream

SizeHW = tuple[int, int]
SIZE_HW = (480, 640)
NUM_FILES = 256
POLYGON_NUMBERS = 64
WARM_UP = 4
LABELS = ("open", "open with masks")
STREAMS = ("pretrain-box", "finetune")


def main() -> None:
    """Make the data, then measure each line in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--proposals", type=int, default=10_000_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="JPEGs to load in place of drawn ones")
    parser.add_argument("--keep", type=Path, help="make the data here, or use what is here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        stage, workers = arguments.one
        print(json.dumps(measure(arguments, stage, int(workers))))
        return
    with tempfile.TemporaryDirectory(prefix="aligndet-") as temporary:
        arguments.keep = arguments.keep or Path(temporary)
        if not (arguments.keep / "workspace").exists():
            make_data(arguments)
        for what in LABELS:
            for time_of in ("first time", "again"):
                show(f"{what}, {time_of}", in_process(arguments, what, 0))
        for stage in STREAMS:
            for workers in arguments.workers:
                show(f"load {stage}, {workers} workers", in_process(arguments, stage, workers))


def in_process(arguments: argparse.Namespace, stage: str, workers: int) -> dict[str, float]:
    """Measure one line in a fresh process."""
    sizes = ("images", "boxes", "proposals", "batch_size", "batches")
    command = [sys.executable, __file__, "--keep", str(arguments.keep), "--one", stage, str(workers)]
    for name in sizes:
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNDET_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


def show(title: str, numbers: dict[str, float]) -> None:
    """Print one line."""
    print(f"{title:<33}" + "  ".join(f"{name} {value:,.2f}" for name, value in numbers.items()), flush=True)


def measure(arguments: argparse.Namespace, stage: str, workers: int) -> dict[str, float]:
    """Body of the process that measures one line."""
    workspace = Workspace(arguments.keep / "workspace")
    if stage in STREAMS:
        return measure_loading(arguments, workspace, stage, workers)
    began, cpu = time.perf_counter(), time.process_time()
    images = open_images(
        DataConfig(root=arguments.keep / "data"),
        purpose="train",
        with_masks=stage == "open with masks",
        index_dir=workspace.index_dir,
    )
    assert len(images) == arguments.images and len(images.boxes) == arguments.boxes
    peak = peak_mib()
    return {"s": time.perf_counter() - began, "CPU-s": time.process_time() - cpu, "peak MiB": peak}


def measure_loading(arguments: argparse.Namespace, workspace: Workspace, stage: str, workers: int) -> dict[str, float]:
    """Seconds to the first batch, images/s after it, and memory of the loader's processes."""
    from aligndet_cli.data.loaders import batches_of_run
    from aligndet_cli.processes.devices import Process

    began = time.perf_counter()
    stream = open_stream(arguments, workspace, stage)
    prepared = time.perf_counter()
    batches = batches_of_run(
        stream,
        arguments.batch_size,
        steps=range(arguments.batches + WARM_UP * max(workers, 1)),
        seed=0,
        num_workers=workers,
        process=Process(),
    )
    next(batches)
    first = time.perf_counter()
    for _ in range(WARM_UP * max(workers, 1) - 1):  # what was decoded ahead
        next(batches)
    own = [memory_mib(pid) for pid in children_of(os.getpid())]
    workers_cpu = [cpu_s(pid) for pid in children_of(os.getpid())]
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    for _ in range(arguments.batches):
        count += len(next(batches))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    workers_cpu = [cpu_s(pid) - before for pid, before in zip(children_of(os.getpid()), workers_cpu, strict=True)]
    worker = {name: max(each[name] for each in own) for name in own[0]} if own else {}
    return {
        "prepare s": prepared - began,
        "first batch s": first - began,
        "images/s": count / seconds,
        "images/CPU-s": count / (cpu + sum(workers_cpu)),
        "main process CPU-ms per image": 1000 * cpu / count,
        **{f"worker {name} MiB": value for name, value in worker.items()},
        "main RSS MiB": memory_mib(os.getpid())["RSS"],
    }


def open_stream(arguments: argparse.Namespace, workspace: Workspace, stage: str) -> "SampleStream":
    """The images of a stage with their boxes, as the stage opens them."""
    from aligndet_cli.data.loaders import LabelBoxes, SampleStream
    from aligndet_cli.pretrain_box import stage as pretrain_box

    if stage == "finetune":
        images = open_images(DataConfig(root=arguments.keep / "data"), purpose="train", index_dir=workspace.index_dir)
        return SampleStream(images, range(len(images)), LabelBoxes(images), "fail")
    config = pretrain_box.PretrainBoxConfig.model_validate(
        {
            "backbone": {"name": "resnet18", "weights": "none"},
            "runtime": {"accelerator": "cpu"},
            # What a step takes is found out beforehand, and is not measured here.
            "training": {"steps": 1, "batch_size": 1},
            "views": {"short_side": [64], "long_side": 96},
        }
    )
    plan = pretrain_box.prepare(config, workspace)
    return SampleStream(plan.image_set, plan.indices, plan.boxes, "fail")


def children_of(pid: int) -> list[int]:
    """Pids of direct children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_s(pid: int) -> float:
    """CPU seconds of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> dict[str, float]:
    """RSS counts shared pages in full, PSS by the share of each process, USS not at all."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        fields[name.rstrip(":")] = int(value) / 1024
    return {
        "RSS": fields["Rss"],
        "PSS": fields["Pss"],
        "USS": fields["Private_Clean"] + fields["Private_Dirty"],
    }


def peak_mib() -> float:
    """Largest RSS of this process so far. (Not `ru_maxrss`, which starts with that of the process that started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def make_data(arguments: argparse.Namespace) -> None:
    """A COCO root, and a workspace with a finished proposals run on it."""
    rng = np.random.default_rng(0)
    root = arguments.keep / "data"
    folder = root / "train2017"
    folder.mkdir(parents=True)
    names = [f"{number:012d}.jpg" for number in range(arguments.images)]
    if arguments.photos:
        photos = sorted(arguments.photos.glob("*.jpg"))
        for photo, name in zip(photos, names, strict=False):
            shutil.copyfile(photo, folder / name)
    else:
        for name in names[:NUM_FILES]:
            draw_jpeg(folder / name, rng)
    sizes_hw = [read_size_hw(file) for file in sorted(folder.iterdir())]
    for number in range(len(sizes_hw), len(names)):
        os.link(folder / names[number % len(sizes_hw)], folder / names[number])
    images = [(name, sizes_hw[number % len(sizes_hw)]) for number, name in enumerate(names)]
    write_labels(root / "annotations" / "instances_train2017.json", images, arguments.boxes, rng)
    write_proposals(arguments, images, rng)


def draw_jpeg(file: Path, rng: np.random.Generator) -> None:
    """Blobs of all sizes and some grain: about as many bytes as a photo (0.1 MB)."""
    height, width = SIZE_HW
    image = np.zeros((height, width, 3), dtype=np.float32)
    for scale in (8, 32, 128):
        small = rng.uniform(0, 255, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        image += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) / 3
    image += rng.normal(0, 8, image.shape)
    cv2.imwrite(str(file), np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 85])


def random_boxes(count: int, size_hw: SizeHW, rng: np.random.Generator) -> np.ndarray:
    """(count, 4) float32 xyxy inside the image, with at least 8 pixels a side."""
    height, width = size_hw
    corner = rng.uniform(0, 1, (count, 2)) * (width - 16, height - 16)
    side = 8 + rng.uniform(0, 1, (count, 2)) * ((width - 8, height - 8) - corner)
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def write_labels(file: Path, files: list[tuple[str, SizeHW]], num_boxes: int, rng: np.random.Generator) -> None:
    """A COCO json with one polygon per box."""
    file.parent.mkdir()
    height, width = (min(sides) for sides in zip(*(size_hw for _, size_hw in files), strict=True))  # within all images
    boxes = random_boxes(num_boxes, (height, width), rng).round(2).tolist()
    owners, classes = rng.integers(len(files), size=num_boxes).tolist(), rng.integers(80, size=num_boxes).tolist()
    polygons = rng.uniform(0, height, (1000, POLYGON_NUMBERS)).round(2).tolist()
    with file.open("w") as handle:
        images = [
            {"id": number, "file_name": name, "height": size_hw[0], "width": size_hw[1]}
            for number, (name, size_hw) in enumerate(files)
        ]
        categories = [{"id": number, "name": f"class {number}"} for number in range(80)]
        handle.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            entry = {
                "id": number + 1,
                "image_id": owners[number],
                "category_id": classes[number],
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "area": round((x2 - x1) * (y2 - y1) / 2, 2),
                "iscrowd": 0,
                "segmentation": [polygons[number % 1000]],
            }
            handle.write((", " if number else "") + json.dumps(entry))
        handle.write("]}")
    settled = time.time() - 60  # an index is not kept of a file that has just changed
    os.utime(file, (settled, settled))


def write_proposals(arguments: argparse.Namespace, files: list[tuple[str, SizeHW]], rng: np.random.Generator) -> None:
    """A finished run of `proposals` on these images."""
    from aligndet_cli.proposals.stage import ProposalsConfig

    data = DataConfig(root=arguments.keep / "data")
    fingerprint = open_images(data, purpose="train").fingerprint
    workspace = Workspace(arguments.keep / "workspace")
    config = ProposalsConfig(data=data)
    output = workspace.plan_output("proposals", "train2017", config, {"data": fingerprint})
    per_image = arguments.proposals // len(files)

    def images() -> Iterator[ImageProposals]:
        for number, (name, size_hw) in enumerate(files):
            yield ImageProposals(number, name, size_hw, random_boxes(per_image, size_hw, rng))

    output.partial.mkdir(parents=True)
    output.begin(config)
    write_store(output.partial, images())
    output.complete({}, content=STORE_FILES)


if __name__ == "__main__":
    main()
