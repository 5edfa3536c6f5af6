"""`aligndet demo`: the five stages on drawn pictures, fine-tuned with and without pre-training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from aligndet_cli.config import Sources
from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.driver import Outcome, Request, execute
from aligndet_cli.tables import plain_table
from aligndet_cli.training.logs import logger
from aligndet_cli.workspace import Workspace

NUM_TRAIN, NUM_VAL, NUM_CLUSTERS = 128, 48, 16
METRICS = ("AP", "AP50", "AP75")
# No weights can be downloaded here, so the backbone starts from nothing and is pre-trained along with the rest. The
# model is slim and the runs are short, so the neck and head have norms and the momentum starts lower.
MODEL = (
    "backbone.name=resnet18",
    "detector.neck_channels=64",
    "detector.head_convs=2",
    "detector.neck_norm=group",
    "detector.head_norm=group",
    "training.batch_size=8",
)
PRETRAIN = (
    "freeze_backbone=false",
    "momentum=0.98",
    "training.steps=150",
    "training.lr=0.02",
    "views.short_side=[128,144,160]",
    "views.long_side=224",
    "detector.pretext_samples=256",
)
FINETUNE = (
    "training.steps=120",
    "training.lr=0.04",
    "resolution.short_side=[160]",
    "resolution.long_side=224",
)


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured: metrics without and with pre-training, and where its pictures are."""

    without: dict[str, float]
    with_pretraining: dict[str, float]
    pictures: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        delta = {key: self.with_pretraining[key] - self.without[key] for key in METRICS}
        return {
            "without": self.without,
            "with": self.with_pretraining,
            "delta": delta,
            "pictures": [str(picture) for picture in self.pictures],
        }

    def table(self) -> Table:
        """AP in percent, without, with, and the difference."""
        table = plain_table("", *METRICS)
        numbers = self.to_json()
        for title, key in (("from scratch", "without"), ("with AlignDet pre-training", "with"), ("delta", "delta")):
            sign = "+" if key == "delta" else ""
            table.add_row(title, *(f"{100 * numbers[key][metric]:{sign}.1f}" for metric in METRICS))
        return table

    def closing_lines(self) -> list[str]:
        """Where to look next."""
        return ["pictures:", *(f"  {picture}" for picture in self.pictures)]


def run_demo(folder: Path, *, seed: int) -> DemoReport:
    """Draw data, run every stage, measure twice. Run again, it goes on where it was, or shows the table at once.

    Raises:
        AlignDetError: anything a stage raises.
    """
    data = folder / f"toy-{seed}"
    if not (data / "annotations" / "instances_val2017.json").exists():
        logger.info(f"drawing {NUM_TRAIN} + {NUM_VAL} pictures into {data}")
        draw_toy_data(data, seed=seed, num_train=NUM_TRAIN, num_val=NUM_VAL)
    workspace = Workspace(folder / f"workspace-{seed}")

    def stage(name: str, *settings: str) -> Outcome:
        flags = {"data.root": ("DATA", data), "seed": ("--seed", seed)}
        return execute(Request(name, workspace, Sources(None, settings, flags)))

    proposals = stage("proposals")
    sizes = (f"k={NUM_CLUSTERS}", f"pca_dim={NUM_CLUSTERS}", "short_side=160", "long_side=224")
    clusters = stage("cluster", *sizes, "backbone.name=resnet18")
    pretrained = stage("pretrain-box", *MODEL, *PRETRAIN)
    pictures = [proposals.folder / "sheet.jpg", clusters.folder / "sheet.jpg", pretrained.folder / "plots/curves.png"]
    metrics = {}
    for init in ("scratch", "pretrain"):
        run = stage("finetune", *MODEL, *FINETUNE, f"init={init}")
        evaluation = stage("evaluate", f"run={run.folder.name}", "batch_size=8")
        assert evaluation.artifact is not None, "a stage that is done has an artifact"
        metrics[init] = {key: float(evaluation.artifact.result[key] or 0.0) for key in METRICS}
        pictures += sorted((evaluation.folder / "plots").glob("*.png"))
    return DemoReport(metrics["scratch"], metrics["pretrain"], tuple(pictures))
