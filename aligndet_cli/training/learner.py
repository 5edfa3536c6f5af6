"""From a stage's module that turns samples into losses to the loop: the same for every training stage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.data.loaders import SampleStream, batches_of_run
from aligndet_cli.data.sample import Sample
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loggers import Loggers
from aligndet_cli.training.loop import Learner, LoopSettings, train
from aligndet_cli.training.optimizer import build_optimizer
from aligndet_cli.training.placement import compile_parts, place, wrap
from aligndet_cli.training.recipe import Rates


class ViewLosses(nn.Module):
    """Base of the modules that draw views of samples and return the losses on them, see `Learner.model`.

    Attributes:
        largest_hw: height and width of the largest images there are, for people.
    """

    largest_hw: tuple[int, int] | None = None

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Return the modules whose children `--compile` compiles."""
        return tuple(self.children())

    def layers(self) -> Sequence[Sequence[nn.Module]]:
        """Return the layers of the backbone that is trained, see `Backbone.layers`."""
        return ()

    def after_step(self, step: int) -> None:
        """Do nothing after an optimizer step; a momentum update goes here."""


def build_learner(
    views: ViewLosses, rates: Rates, settings: LoopSettings, runtime: RuntimeConfig, process: Process
) -> Learner:
    """Return what the loop trains: the module, moved to the device of the process, and its optimizer."""
    place(views, process)
    compile_parts(views.compiled_parts(), runtime)
    return Learner(
        model=wrap(views, process),
        optimizer=build_optimizer(views, rates, settings, process, views.layers()),
        state=dict(views.named_children()),
        scaler=torch.amp.GradScaler(torch.device(process.device).type, enabled=settings.precision == "16-mixed"),
        after_step=views.after_step,
        largest_hw=views.largest_hw,
    )


@dataclass(frozen=True)
class Trainable:
    """All that the steps of a run take.

    Attributes:
        aspects: (N,) width by height of the images, see `batches_of_run`.
    """

    learner: Learner
    stream: SampleStream
    settings: LoopSettings
    aspects: NDArray[np.float64] | None = None


def build_to_try(
    make_views: Callable[[], ViewLosses],
    rates: Rates,
    settings: LoopSettings,
    runtime: RuntimeConfig,
    process: Process,
) -> Learner:
    """Return a learner whose module is made here, in the process that tries steps with it, see `Trial.build`."""
    return build_learner(make_views(), rates, settings, runtime, process)


def train_on(
    task: Trainable, runtime: RuntimeConfig, folder: Path, process: Process, loggers: Loggers | None = None
) -> None:
    """Train on the batches of a stream, see `train`; return once all processes have."""
    settings = task.settings

    def batches_from(step: int) -> Iterator[list[Sample]]:
        return batches_of_run(
            task.stream,
            settings.batch_size,
            steps=range(step, settings.schedule.num_steps),
            seed=settings.seed,
            num_workers=runtime.num_workers,
            process=process,
            aspects=task.aspects,
        )

    train(task.learner, batches_from, settings, folder, process, loggers)
    wait_for_all(process)
