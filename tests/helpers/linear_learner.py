"""A run of the training loop that takes no time, in one process or several. See `test_change_of_devices.py`."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.data.loaders import StreamSampler
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import Learner, LoopSettings, train
from aligndet_cli.training.placement import wrap
from aligndet_cli.training.schedules import Schedule

BATCH, NUM_STEPS = 4, 9
ASPECTS = np.array([1.5, 0.75, 1.5, 1.5, 0.75, 1.0, 1.3])  # of 7 images
PLAN = SimpleNamespace(config=SimpleNamespace(runtime=RuntimeConfig()))


class LeastSquares(nn.Module):
    """Mean over samples of a squared error, so that the mean over two halves is the mean over all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 1)

    def forward(self, samples: Sequence[Any], _step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        features = torch.stack([image(sample.index) for sample in samples])
        return {"loss_cls": (self.linear(features).squeeze(1) - features.sum(dim=1)).square().mean()}, {}


def image(index: int) -> Tensor:
    return torch.rand(5, generator=torch.Generator().manual_seed(index))


def run(_plan: Any, process: Process, folder: Path, stop_after: int | None) -> None:
    """Train until the end, or until a SIGTERM that comes in step `stop_after`; notes who saw which image when."""
    task = LeastSquares()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    learner = Learner(model=wrap(task, process), optimizer=optimizer, state={"task": task})
    settings = LoopSettings(Schedule(NUM_STEPS, 0, ()), base_lr=0.1, weight_decay=0.0, seed=0)

    def batches_from(start: int) -> Iterator[list[Any]]:
        sampler = StreamSampler(ASPECTS, BATCH, seed=5, start_step=start, num_steps=NUM_STEPS, process=process)
        for step, places in enumerate(sampler, start=start):
            with (folder / "order.jsonl").open("a") as handle:
                handle.write(json.dumps([step, process.rank, places]) + "\n")
            if step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield [SimpleNamespace(position=position, index=row, skipped=()) for position, row in places]

    train(learner, batches_from, settings, folder, process)
    if process.is_main:
        torch.save(task.state_dict(), folder / "weights.pt")
