"""What pictures cost: the curves of a long log, and their share of a run. Run: `python tests/benchmarks/figures.py`."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from aligndet_cli.config import Sources
from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.driver import Request, execute
from aligndet_cli.training.curves import plot_comparison, plot_curves
from aligndet_cli.workspace import Workspace

NUM_STEPS, BUDGET_S, BUDGET_SHARE = 90_000, 2.0, 0.03
REPEATS = 5
# Smaller than the demo, and any other run: its pictures cost the same however long it is.
MODEL = ("backbone.name=resnet18", "detector.neck_channels=64", "detector.head_convs=2", "training.batch_size=8")
PRETRAIN = ("topk=15", "detector.pretext_samples=256", "training.steps=150", "views.long_side=224")
STAGES = {
    "proposals": (),
    "cluster": ("k=16", "pca_dim=16", "short_side=160", "long_side=224", "backbone.name=resnet18"),
    "pretrain-box": (*MODEL, *PRETRAIN, "views.short_side=[128,144,160]"),
    "finetune": (
        *MODEL,
        "init=pretrain",
        "training.steps=120",
        "resolution.short_side=[160]",
        "resolution.long_side=224",
    ),
    "evaluate": ("batch_size=8",),
}
# What draws in each stage, where the stage finds it.
DRAWING = {
    "proposals": (
        "proposals.artifact.draw_proposal_sheet",
        "proposals.artifact.draw_histograms",
        "proposals.artifact.draw_recall",
    ),
    "cluster": ("cluster.stage.draw_cluster_sheet", "cluster.stage.draw_sizes"),
    "pretrain-box": ("pretrain_box.stage._draw",),
    "finetune": ("finetune.stage.plot_curves",),
    "evaluate": ("evaluate.stage.draw_plots",),
}


def write_log(file: Path) -> None:
    """As pre-training logs it, a line for every step."""
    values = np.random.default_rng(0).uniform(0.5, 1.0, (NUM_STEPS, 8))
    keys = ("loss_contrastive", "loss_box_reg", "lr", "grad_norm", "positive_similarity", "negative_similarity")
    with file.open("w") as lines:
        for step, row in enumerate(values.tolist(), 1):
            line = {"step": step, **dict(zip((*keys, "embedding_rank", "contrast_accuracy"), row, strict=True))}
            lines.write(json.dumps(line | {"chance": 8.3}) + "\n")


def cpu_of(draw: Callable[[], None]) -> list[float]:
    """CPU seconds of each call."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        draw()
        seconds.append(time.process_time() - start)
    return seconds


@contextmanager
def drawing_timed(names: tuple[str, ...], seconds: list[float]) -> Iterator[None]:
    """Add up the CPU seconds of functions while they are called."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.process_time() - start)

        return call

    patches = []
    for name in names:
        module, _, function = f"aligndet_cli.{name}".rpartition(".")
        __import__(module)
        patches.append(mock.patch(f"{module}.{function}", timed(getattr(sys.modules[module], function))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    """Print both, and exit 1 where one is above its budget."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "metrics.jsonl")
        runs = {name: folder / "metrics.jsonl" for name in ("a", "b")}
        one = cpu_of(lambda: plot_curves(folder / "metrics.jsonl", folder / "plots"))
        two = cpu_of(lambda: plot_comparison(runs, folder / "both.png"))
        print(f"curves of {NUM_STEPS} lines: {np.median(one):.2f} s (first {one[0]:.2f}), budget {BUDGET_S:g} s")
        print(f"curves of two of them: {np.median(two):.2f} s (first {two[0]:.2f})")
        is_slow = max(one) > BUDGET_S
        draw_toy_data(folder / "toy", seed=0, num_train=480, num_val=96)
        workspace, drawn_of_all, cpu_of_all = Workspace(folder / "workspace"), 0.0, 0.0
        for stage, settings in STAGES.items():
            flags = {
                "data.root": ("DATA", folder / "toy"),
                "runtime.num_workers": ("", 0 if stage != "proposals" else 1),
            }
            sources, drawn, start = Sources(None, settings, flags), list[float](), time.process_time()
            with drawing_timed(DRAWING[stage], drawn):
                execute(Request(stage, workspace, sources))
            spent = time.process_time() - start
            drawn_of_all, cpu_of_all = drawn_of_all + sum(drawn), cpu_of_all + spent
            print(f"{stage:<13} {sum(drawn):6.2f} s of {spent:7.1f} s for pictures: {sum(drawn) / spent:.1%}")
        share = drawn_of_all / cpu_of_all
        print(f"all together  {drawn_of_all:6.2f} s of {cpu_of_all:7.1f} s: {share:.1%}, budget {BUDGET_SHARE:.0%}")
        sys.exit(is_slow or share > BUDGET_SHARE)


if __name__ == "__main__":
    main()
