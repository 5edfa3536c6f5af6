"""How fast a GPU trains, where the time of a step goes, and what the host waits for.

    python tests/benchmarks/gpu.py [--minutes 7.5] [--detectors retinanet ...] [--modes eager compile] [--output FOLDER]

A cell is a detector in one stage, eager or compiled, at 640 to 800 px in bf16, with COCO's sizes and the loader. The
most telling cells come first, those for which no time is left are named. `report.json` and `report.md` are written
after each cell: images/s, memory, share of the card's peak, the split of a step into parts (there a GPU is waited for
after every part, so they add up to more than a step), the ten slowest kernels, and every line that makes the host wait.

`--device cpu` runs it in a toy size, to see that it runs.
"""

import argparse
import contextlib
import gc
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`
from aligndet_cli.backbones import BackboneConfig  # noqa: E402
from aligndet_cli.config import DataConfig, RuntimeConfig  # noqa: E402
from aligndet_cli.data.dataset import ImageSet  # noqa: E402
from aligndet_cli.data.open import open_images  # noqa: E402
from aligndet_cli.detectors import DETECTORS, detr, fcos, retinanet  # noqa: E402
from aligndet_cli.detectors.parts import rpn, two_stage  # noqa: E402
from aligndet_cli.processes.devices import Process  # noqa: E402
from aligndet_cli.tools.bench.clock import StepClock  # noqa: E402
from aligndet_cli.tools.bench.images import write_coco  # noqa: E402
from aligndet_cli.tools.bench.measure import BenchSteps, clock_of  # noqa: E402
from aligndet_cli.tools.bench.plan import BenchConfig, BenchPlan, StageName, bench_batches  # noqa: E402
from aligndet_cli.training.learner import build_learner  # noqa: E402
from aligndet_cli.training.recipe import MULTI_SCALE  # noqa: E402
from aligndet_cli.training.records import peak_memory  # noqa: E402
from helpers.gpu_report import SPLIT, Cell, Figures, Mode, line_of, write  # noqa: E402
from helpers.host_reads import host_reads  # noqa: E402
from helpers.small_detectors import NARROW  # noqa: E402

FAMILIES = ("retinanet", "faster-rcnn", "fcos", "detr", "mask-rcnn")  # most telling first
STAGES: tuple[StageName, ...] = ("pretrain-box", "finetune")
MODES: tuple[Mode, ...] = ("eager", "compile")
# Dense bf16 FLOP/s, by NVIDIA's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# Seconds that a cell takes at most; without them it is not begun.
CELL_S = {"eager": 40, "compile": 120}
TIMED_S, FEWEST = 4.0, 4  # seconds and least number of the steps of a cell
EPOCH = 8  # batches of drawn images
NUM_KERNELS = 10
MOST_OF_TRACE = 4000  # characters
# What makes out which candidates are trained on what. The rest outside of networks are losses.
MATCHING: tuple[tuple[Any, str], ...] = (
    (retinanet.RetinaNet, "assign"),
    (fcos.FCOS, "assign"),
    (detr.DETR, "assign"),
    (rpn.RPN, "assign"),
    (rpn.RPN, "propose_scored"),
    (retinanet, "sample_each_image"),
    (rpn, "sample_each_image"),
    (fcos, "sample_each_image"),
    (two_stage, "sample_rois"),
)


@contextlib.contextmanager
def matching_apart(clock: StepClock) -> Iterator[None]:
    """Let the clock tell the matching from the losses, in the block."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.enter()
            result = function(*args, **kwargs)
            clock.leave("matching")
            return result

        return call

    clock.seconds["matching"] = 0.0
    with contextlib.ExitStack() as patches:
        for owner, name in MATCHING:
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield


@dataclass
class Bench:
    """The machine, the images, and what was measured so far."""

    device: torch.device
    batch_size: int
    images: ImageSet
    output: Path
    until: float
    command: str
    figures: list[Figures] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)

    @property
    def is_toy(self) -> bool:
        return self.device.type == "cpu"

    def plan(self, cell: Cell) -> BenchPlan:
        """The stage as it is by default, at 640 to 800 px."""
        runtime = RuntimeConfig(
            accelerator="cpu" if self.is_toy else "gpu",
            precision="32-true" if self.is_toy else "bf16-mixed",
            compile=cell.mode == "compile",
            num_workers=0 if self.is_toy else "auto",
        )
        config = BenchConfig(
            stage=cell.stage,
            detector=NARROW[cell.detector] if self.is_toy else {"family": cell.detector},
            backbone=BackboneConfig(name="resnet18" if self.is_toy else "resnet50"),
            batch_size=self.batch_size,
            short_side=(64,) if self.is_toy else MULTI_SCALE,
            long_side=96 if self.is_toy else 1333,
            runtime=runtime,
        )
        return BenchPlan(config, self.images, cell.stage)

    def measure(self, cell: Cell) -> None:
        """Measure a cell. What goes wrong is part of the report: the others are measured all the same."""
        figures = Figures(cell)
        self.figures.append(figures)
        try:
            self._fill(figures)
        except OutOfTime:
            figures.problem = "the time was over"
            raise
        except Exception as error:
            figures.problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            figures.trace_of_problem = traceback.format_exc()[-MOST_OF_TRACE:]
        finally:
            gc.collect()
            torch.compiler.reset()
            if not self.is_toy:
                torch.cuda.empty_cache()

    def _fill(self, figures: Figures) -> None:
        plan, process = self.plan(figures.cell), Process(device=str(self.device))
        views = plan.build_views()
        if not self.is_toy:
            torch.cuda.reset_peak_memory_stats(self.device)
        learner = build_learner(views, plan.rates, plan.settings, plan.config.runtime, process)
        with contextlib.closing(bench_batches(plan, 10_000, process)) as batches:
            steps = BenchSteps(learner, batches, plan.settings, process)
            began = time.perf_counter()
            steps.take(3)
            figures.first_steps_s = time.perf_counter() - began
            self._time(steps, figures)
            figures.memory_gb = peak_memory(self.device) / 1e9
            if (clock := clock_of(plan.config, learner, views)) is not None:
                self._split(steps, clock, figures)
                with FlopCounterMode(display=False) as counter:
                    steps.take(1)
                figures.gflop_per_image = counter.get_total_flops() / self.batch_size / 1e9
            else:
                figures.gflop_per_image = self._gflop_of_eager(figures.cell)
            if figures.gflop_per_image is not None and figures.images_per_s is not None:
                figures.tflops = figures.gflop_per_image * figures.images_per_s / 1e3
            waits = host_reads(lambda: steps.take(1), self.device)
            # The watch over divergence is read before a line of the log only; here, after the step.
            figures.host_waits = {place: count for place, count in waits.most_common() if "divergence" not in place}
            self._trace(steps, figures)

    def _time(self, steps: BenchSteps, figures: Figures) -> None:
        taken: list[float] = []
        waited, began = 0.0, time.perf_counter()
        while len(taken) < FEWEST or time.perf_counter() - began < (0 if self.is_toy else TIMED_S):
            seconds, waiting = steps.take(FEWEST)
            taken += [seconds / FEWEST]
            waited += waiting
        mean = statistics.fmean(taken)
        figures.images_per_s, figures.step_ms = self.batch_size / mean, 1e3 * mean
        figures.spread_ms = 1e3 * (max(taken) - min(taken))
        figures.waiting = waited / (FEWEST * sum(taken))

    def _split(self, steps: BenchSteps, clock: StepClock, figures: Figures) -> None:
        with matching_apart(clock):
            steps.take(FEWEST, clock)
        seconds = {**clock.seconds, "losses": clock.seconds["matching and losses"]}
        figures.parts_ms = {part: 1e3 * seconds[part] / FEWEST for part in SPLIT}

    def _gflop_of_eager(self, cell: Cell) -> float | None:
        same = (f for f in self.figures if f.cell == Cell(cell.detector, cell.stage, "eager"))
        return next((f.gflop_per_image for f in same), None)

    def _trace(self, steps: BenchSteps, figures: Figures) -> None:
        activities = [ProfilerActivity.CPU] if self.is_toy else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as trace:
            steps.take(2)
        # A span with a name, such as that of the optimizer, covers the kernels in it, on a GPU, too.
        events = [event for event in trace.key_averages() if not event.is_user_annotation]
        if self.is_toy:
            rows = [(event.key, event.self_cpu_time_total, event.count) for event in events]
        else:
            kernels = [event for event in events if event.device_type == DeviceType.CUDA]
            rows = [(event.key, event.self_device_time_total, event.count) for event in kernels]
            assert figures.step_ms is not None
            figures.busy = sum(time for _, time, _ in rows) / 2 / 1e3 / figures.step_ms
        rows.sort(key=lambda row: -row[1])
        figures.kernels = [(name[:100], time / 2 / 1e3, -(-count // 2)) for name, time, count in rows[:NUM_KERNELS]]


class OutOfTime(BaseException):
    """The time is over, in the middle of a cell. No `Exception`: torch.compile would take it for one of the model's."""


@contextlib.contextmanager
def ending(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once the time is over."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def cells_of(families: Sequence[str], stages: Sequence[StageName], modes: Sequence[Mode]) -> list[Cell]:
    """All cells: those that take seconds first, then those that wait for a compiler."""
    return [Cell(family, stage, mode) for mode in modes for family in families for stage in stages]


def run(bench: Bench, cells: Sequence[Cell]) -> None:
    """Measure cells while there is time, and write the report after each."""
    machine = describe(bench)
    left = list(cells)
    with contextlib.suppress(OutOfTime), ending(max(bench.until - time.monotonic(), 1)):
        for cell in cells:
            if not bench.is_toy and time.monotonic() + CELL_S[cell.mode] > bench.until:
                continue
            left.remove(cell)
            bench.measure(cell)
            bench.left_out = left
            write(bench.output, machine, bench.figures, bench.left_out)
            print(line_of(bench.figures[-1]), flush=True)
    bench.left_out = left
    write(bench.output, machine, bench.figures, bench.left_out)


def describe(bench: Bench) -> dict[str, Any]:
    """The card and its speed in products of bf16 matrices, and versions."""
    commit = ""
    with contextlib.suppress(OSError):  # a copy of the files alone, without git
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    name = "a CPU, toy size" if bench.is_toy else torch.cuda.get_device_name(bench.device)
    return {
        "card": name,
        "peak_tflops": next((peak / 1e12 for card, peak in PEAKS.items() if card in name), None),
        "matrix_tflops": measure_products(bench.device) / 1e12,
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "command": bench.command,
        "batch_size": bench.batch_size,
        "precision": "32-true" if bench.is_toy else "bf16-mixed",
    }


def measure_products(device: torch.device) -> float:
    """FLOP/s of large products of bf16 matrices."""
    side, times = (128, 2) if device.type == "cpu" else (8192, 20)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for count in (3, times):
        began = time.perf_counter()
        for _ in range(count):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
    return times * 2 * side**3 / (time.perf_counter() - began)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="all in all")
    parser.add_argument("--detectors", nargs="+", choices=sorted(DETECTORS), default=list(FAMILIES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    is_toy = arguments.device == "cpu"
    if not is_toy and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu runs a toy size")
    batch_size = 2 if is_toy else arguments.batch_size
    with tempfile.TemporaryDirectory(prefix="aligndet-gpu-") as folder:
        write_coco(Path(folder), EPOCH * batch_size)
        images = open_images(DataConfig(root=Path(folder)), purpose="train", with_masks=True)
        device = torch.device("cpu" if is_toy else "cuda:0")
        command = " ".join(["python tests/benchmarks/gpu.py", *sys.argv[1:]])
        bench = Bench(device, batch_size, images, arguments.output, until, command)
        run(bench, cells_of(arguments.detectors, arguments.stages, arguments.modes))
    print((arguments.output / "report.md").read_text())


if __name__ == "__main__":
    main()
