"""A second round: the boxes that a pre-trained run finds, merged with earlier proposals. Free of torch at import."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.errors import ConfigError
from aligndet_cli.proposals.filters import FilterRules, has_allowed_ratio, has_allowed_size, is_valid, nms
from aligndet_cli.workspace import Artifact, Workspace

RUN_INPUT, EARLIER_INPUT = "run", "merged proposals"  # among the inputs of the manifest
_VIEWS_OF_PAPER = {"short_side": [800], "long_side": 1333}
FROM_RUN, FROM_EARLIER = 0, 1  # sources of boxes in `origins.npy`


@dataclass(frozen=True)
class EarlierBoxes:
    """Proposals of a data set by position in it.

    Attributes:
        rows: (images,) int64 position of each image in the store; -1 for images that are not in it.
    """

    store: ProposalStore
    rows: NDArray[np.int64]

    def of(self, index: int) -> NDArray[np.float32]:
        """Return the boxes (N, 4) of the image at a position."""
        row = int(self.rows[index])
        return self.store.boxes_of(row) if row >= 0 else np.zeros((0, 4), dtype=np.float32)


@dataclass(frozen=True)
class Finder:
    """A pre-trained run that finds boxes.

    Attributes:
        name: of the run.
        weights: its `weights.pt`.
        content_hash: of the weights.
        resolution: short and long side that images are resized to, the largest of the run's views.
    """

    name: str
    weights: Path
    content_hash: str
    resolution: tuple[int, int]


@dataclass(frozen=True)
class Round:
    """The run and the proposals that a second round is made from; `earlier` is None if there is nothing to merge."""

    finder: Finder
    earlier: Artifact | None

    def inputs(self) -> dict[str, str]:
        """Return the hashes of run and earlier proposals, for the manifest."""
        merged = self.earlier.content_hash if self.earlier is not None else "none"
        return {RUN_INPUT: self.finder.content_hash, EARLIER_INPUT: merged}

    def boxes_for(self, image_set: ImageSet) -> EarlierBoxes | None:
        """Open the earlier proposals; None if there are none to merge with."""
        if self.earlier is None:
            return None
        store = ProposalStore(self.earlier.folder)
        return EarlierBoxes(store, positions_of(image_set.image_ids, store.image_ids))


def plan_round(workspace: Workspace, run: str, merge: str | None, image_set: ImageSet, own_name: str) -> Round:
    """Find the run and the proposals to merge its boxes with.

    Args:
        merge: proposals of the same images by name, or `none`. None: those that the run was trained on if they are of
            these images, else the newest of these images that are not from a run.
        own_name: of the proposals that are made, which are not merged with themselves.

    Raises:
        ConfigError: no such run or proposals, a run that trained no boxes, or proposals of other images.
        WeightsError: the weights cannot be read, or have no score to tell objects with.
    """
    artifact = workspace.require("pretrain-box", run)
    settings = artifact.config()
    if settings.get("tasks") == "contrastive":
        raise ConfigError(
            f"--from-run {run}: was pre-trained on contrast alone, so its boxes are random; name another run"
        )
    from aligndet_cli.detectors.checkpoint import load_finder

    weights = artifact.folder / "weights.pt"
    load_finder(weights)  # raises where a worker would
    views = settings.get("views", _VIEWS_OF_PAPER)  # an imported run does not say
    resolution = max(views["short_side"]), views["long_side"]
    finder = Finder(artifact.name, weights, artifact.content_hash, resolution)
    return Round(finder, _find_earlier(workspace, artifact, merge, image_set, own_name))


def _find_earlier(
    workspace: Workspace, run: Artifact, merge: str | None, image_set: ImageSet, own_name: str
) -> Artifact | None:
    if merge == "none":
        return None
    if merge is not None:
        named = workspace.require("proposals", merge)
        if named.manifest["inputs"].get("data") != image_set.fingerprint:
            raise ConfigError(
                f"--merge {merge}: the proposals {named.folder} are not of these images ({image_set.root}, split "
                f"{image_set.split}); name others, or write none"
            )
        return named
    fitting = [
        found
        for found in workspace.artifacts("proposals")
        if found.manifest["inputs"].get("data") == image_set.fingerprint and found.name != own_name
    ]
    of_run = [found for found in fitting if found.content_hash == run.manifest["inputs"].get("proposals")]
    searched = [found for found in fitting if RUN_INPUT not in found.manifest["inputs"]]
    chosen = of_run or searched
    if not chosen:
        raise ConfigError(
            f"--from-run {run.name}: no proposals of these images ({image_set.root}, split {image_set.split}) to merge "
            "its boxes with: run `aligndet proposals` for them first, or use --merge none"
        )
    return chosen[-1]


def merge_boxes(
    found: NDArray[np.float32],
    scores: NDArray[np.float32],
    earlier: NDArray[np.float32],
    size_hw: tuple[int, int],
    rules: FilterRules,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Merge the boxes that a run found, as far as they pass the rules, with earlier ones, which are taken as they are.

    The two lists take turns, best first, the run's first: neither is the better one on all kinds of photographs
    (examples/second-round.md). Then a box is left out if its IoU with one before it is greater than `rules.nms`.

    Args:
        found: (F, 4) xyxy in pixels.
        scores: (F,).
        earlier: (E, 4) xyxy in pixels, best first.
        size_hw: height and width of the image.
        rules: see `FilterRules`.

    Returns:
        (N, 4) boxes, best first, and (N, 2) origins: score (0 for earlier boxes) and `FROM_RUN` or `FROM_EARLIER`.
    """
    passes = is_valid(found) & has_allowed_ratio(found, rules.max_ratio)
    passes &= has_allowed_size(found, size_hw, rules.min_size, rules.max_size)
    found, scores = found[passes], scores[passes]
    order = np.argsort(-scores, kind="stable")
    order = order[nms(found[order], rules.nms)]
    found, scores = found[order], scores[order]
    boxes = np.concatenate([found, earlier])
    origins = np.zeros((len(boxes), 2), dtype=np.float32)
    origins[: len(found), 0] = scores
    origins[len(found) :, 1] = FROM_EARLIER
    turns = np.concatenate([2 * np.arange(len(found)), 2 * np.arange(len(earlier)) + 1]).argsort(kind="stable")
    kept = turns[nms(boxes[turns], rules.nms)][: rules.max_per_image]
    return boxes[kept], origins[kept]
