"""The choice of runs for the figures."""

import functools
from dataclasses import dataclass
from typing import Any

from aligndet_cli.artifacts.starts import Start, find_starts, measured_run
from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import read_json
from aligndet_cli.workspace import Artifact, Workspace


@dataclass(frozen=True)
class Evaluated:
    """A fine-tuned run, its evaluation, and what it started from."""

    run: Artifact
    evaluation: Artifact
    start: Start

    @property
    def is_pretrained(self) -> bool:
        """True if the run started from more than a backbone."""
        return self.start.kind not in ("backbone", "scratch")

    @functools.cached_property
    def pair(self) -> tuple[int, int]:
        """Fold and seed, by which runs of two starts are compared."""
        config = self.run.config()
        return int(config.get("fold", 1)), int(config["seed"])

    @functools.cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """COCO results."""
        return list(read_json(self.evaluation.folder / "predictions.json"))

    @property
    def best_threshold(self) -> float:
        """Score at which detections have the best F1."""
        return float(read_json(self.evaluation.folder / "analysis.json")["confusion"]["score_threshold"])


def find_runs(workspace: Workspace, run: str | None, compare: str | None) -> tuple[Evaluated, Evaluated]:
    """Find two runs to draw, one with pre-training and one without, evaluated on the same images.

    Args:
        run: name of the first; None: the newest pre-trained run that has a run to compare with.
        compare: name of the second; None: a run of the same detector with the backbone alone, else from scratch; of
            these one of the same fold and seed, if there is any, and the newest.

    Returns:
        the run with pre-training, and the run without.

    Raises:
        ConfigError: there are no such runs.
    """
    known = _all_evaluated(workspace)
    mine = _named(known, run, workspace, "--run") if run else [one for one in known if one.is_pretrained]
    plain = [one for one in known if not one.is_pretrained]
    others = _named(known, compare, workspace, "--compare") if compare else plain
    for one in reversed(mine):
        for other in reversed(
            sorted(others, key=functools.partial(_likeness, one))
        ):  # of equal ones, the newest is last
            if one is not other and _is_comparable(one, other, same_detector=compare is None):
                return one, other
    raise ConfigError(
        f"{workspace.root}: no two evaluations of the same images, one of a pre-trained run and one without; run "
        "`aligndet finetune --init backbone` (or scratch) and `aligndet evaluate`, or name runs by --run and --compare"
    )


def open_evaluated(one: Evaluated, workspace: Workspace) -> ImageSet:
    """Return the images of an evaluation.

    Raises:
        ConfigError: the images have changed.
        DataError: the images cannot be read.
    """
    data = DataConfig.model_validate(one.evaluation.config()["data"])
    image_set = open_images(data, purpose="val", index_dir=workspace.index_dir)
    if image_set.fingerprint != one.evaluation.manifest["inputs"]["data"]:
        raise ConfigError(f"{image_set.root}: has changed since {one.evaluation.folder} was made; evaluate again")
    return image_set


def _all_evaluated(workspace: Workspace) -> list[Evaluated]:
    """Return all evaluated runs, oldest first."""
    tuned = workspace.artifacts("finetune")
    starts = find_starts(workspace)
    found = []
    for evaluation in workspace.artifacts("evaluate"):
        run = measured_run(evaluation, tuned)
        if run is not None:
            found.append(Evaluated(run, evaluation, starts[run.name]))
    return found


def _likeness(one: Evaluated, plain: Evaluated) -> tuple[bool, bool]:
    return plain.start.kind == "backbone", plain.pair == one.pair


def _is_comparable(one: Evaluated, other: Evaluated, *, same_detector: bool) -> bool:
    families = {artifact.config()["detector"]["family"] for artifact in (one.run, other.run)}
    images = {found.evaluation.manifest["inputs"]["data"] for found in (one, other)}
    return len(images) == 1 and (len(families) == 1 or not same_detector)


def _named(known: list[Evaluated], name: str, workspace: Workspace, flag: str) -> list[Evaluated]:
    """Return the evaluations of a run, oldest first."""
    found = [one for one in known if one.run.name == name]
    if not found and workspace.find("finetune", name) is not None:
        raise ConfigError(f"{flag} {name}: not evaluated yet: run `aligndet evaluate --run {name}` first")
    if not found:
        names = ", ".join(one.run.name for one in known) or "none"
        raise ConfigError(f"{flag} {name}: no run of that name; evaluated runs here: {names}")
    return found
