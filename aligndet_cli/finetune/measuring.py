"""Evaluations while training (`--evaluate-every`): numbers for the log, the best weights, an early end."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import evaluation_batches
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.results import predict_images
from aligndet_cli.logs import logger
from aligndet_cli.metrics.measure import Metric, choose_metric, headline, measure
from aligndet_cli.processes.collectives import any_rank, wait_for_all
from aligndet_cli.processes.devices import Process
from aligndet_cli.tables import percent
from aligndet_cli.training.best import Best, BestWeights


@dataclass
class Measuring:
    """The evaluations of one run, on the main process; the others wait.

    Attributes:
        model: the detector to evaluate: the one that is trained, or the average of its weights.
        resolution: short and long side that images are resized to.
        period: steps between evaluations.
        num_steps: length of the run; its end is evaluated, too.
        patience: evaluations without a better number after which training ends; None: it never does.
        write: writes the weights of `model` to a file.
        stopped_at: finished steps where training has ended early; None: it has not.
    """

    model: Detector
    images: ImageSet
    resolution: tuple[int, int]
    has_masks: bool
    period: int
    num_steps: int
    patience: int | None
    folder: Path
    write: Callable[[Path], None]
    process: Process
    stopped_at: int | None = None
    best: BestWeights = field(init=False)

    def __post_init__(self) -> None:
        self.best = BestWeights(self.folder)

    def between(self, done: int) -> dict[str, float] | None:
        """Evaluate if it is time, and return the numbers on the main process, None on others and between."""
        if done % self.period and done != self.num_steps:
            return None
        numbers = self._evaluate(done) if self.process.is_main else None
        wait_for_all(self.process, patience_s=math.inf)  # an evaluation may take long, and all stop after it
        if self.patience is not None and any_rank(self._has_waited_enough(done), self.process):
            self.stopped_at = done
        return numbers

    def is_over(self) -> bool:
        """Return True on all processes alike if training is to end here."""
        return self.stopped_at is not None

    def _evaluate(self, done: int) -> dict[str, float]:
        is_training = self.model.training
        self.model.eval()
        batches = evaluation_batches(
            self.images,
            indices=range(len(self.images)),
            batch_size=1,
            resolution=self.resolution,
            num_workers=0,
            device=torch.device(self.process.device),
        )
        predictions = predict_images(self.model, batches, self.images, self.images.categories)
        metric = choose_metric("auto", self.images)
        metrics = measure(self.images, predictions, metric=metric, has_masks=self.has_masks).metrics
        numbers = _numbers(metrics, metric)
        logger.info(f"step {done}: " + ", ".join(f"{key} {percent(value)}" for key, value in numbers.items()))
        name, value = headline(metrics, metric)
        if value is not None:
            self.best.offer(Best(done, name, value), self.write)
        self.model.train(is_training)
        return numbers

    def _has_waited_enough(self, done: int) -> bool:
        """Return True on the main process if too many evaluations were no better, and training is not over anyway."""
        if self.patience is None or not self.process.is_main or done == self.num_steps:
            return False
        best = self.best.now
        waited = done // self.period - (best.step // self.period if best else 0)
        if waited < self.patience:
            return False
        count = f"{waited} evaluation{'s' if waited > 1 else ''} without a better"
        told = f"{best.metric} than {percent(best.value)} of step {best.step}" if best else "number"
        logger.info(f"stopped early at step {done} of {self.num_steps}: {count} {told}")
        return True


def _numbers(metrics: dict[str, Any], metric: Metric) -> dict[str, float]:
    """Return the measurable ones of AP, AP50 and AP75, of the AP of masks, and of VOC's AP."""
    numbers = {key: metrics[key] for key in ("AP", "AP50", "AP75")}
    if "segm" in metrics:
        numbers["mask_AP"] = metrics["segm"]["AP"]
    if metric == "voc":
        numbers["AP12"] = metrics["voc"]["AP12"]
    return {key: value for key, value in numbers.items() if value is not None}
