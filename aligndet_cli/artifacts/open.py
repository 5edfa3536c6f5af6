"""A proposals artifact together with the images it was made from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError
from aligndet_cli.workspace import Artifact, Workspace

# The place of the data may differ between two commands; split and limit may not.
_NOWHERE = DataConfig().place()


def open_proposals(
    workspace: Workspace, name: str | None = None, data: DataConfig | None = None
) -> tuple[ProposalStore, ImageSet, Artifact]:
    """Open the proposals of that name (default: the newest), and the images they belong to, with their sizes.

    Args:
        data: the place of the data, if the user names it; else the place that the proposals were made from counts,
            else the place that the workspace remembers. Split and limit always come from the proposals.

    Raises:
        ConfigError: no such proposals, no data, another split or limit asked for, or the data has changed since.
        DataError: the store or the data set cannot be read.
    """
    artifact = workspace.require("proposals", name)
    store = ProposalStore(artifact.folder)
    asked = data or DataConfig()
    settings = _locate(workspace, artifact, asked)
    images = open_images(settings, purpose="train", index_dir=workspace.index_dir)
    for key, wanted, made_for in (("split", asked.split, images.split), ("limit", asked.limit, settings.limit)):
        if wanted not in (None, made_for):
            raise ConfigError(
                f"data.{key} = {wanted}: the proposals {artifact.folder} are for {key} {made_for}; "
                "leave it out, or make proposals for it first"
            )
    expected = artifact.manifest["inputs"].get("data")
    if images.fingerprint != expected:
        raise ConfigError(
            f"{images.root}: not the data that {artifact.folder} was made from (its labels or list of images differ); "
            f"name the right folder, or make proposals anew with `aligndet proposals {images.root} --force`"
        )
    if not images.has_labels:  # a plain folder does not tell the sizes
        images = replace(images, sizes_hw=_sizes_hw(store, images))
    return store, images, artifact


def _sizes_hw(store: ProposalStore, images: ImageSet) -> NDArray[np.int32]:
    """Return heights and widths (B, 2) int32 that the proposals recorded, 0 for images that they could not read."""
    rows = positions_of(images.image_ids, store.image_ids)
    known = np.array([*(entry.size_hw for entry in store.images()), (0, 0)], dtype=np.int32)
    return np.asarray(known[rows])  # -1 (not in the store) picks the last row, zeros


def _locate(workspace: Workspace, artifact: Artifact, asked: DataConfig) -> DataConfig:
    made_from: dict[str, Any] = dict(artifact.config().get("data", {}))
    remembered: dict[str, Any] = dict(workspace.recall("data") or {})
    place = asked.model_dump(mode="json")
    # The command line fills in the remembered data, which may differ from the data of these proposals.
    is_default = all(place[key] == remembered.get(key) or place[key] == _NOWHERE[key] for key in _NOWHERE)
    for source in ({} if is_default else place, made_from, remembered):
        location = {key: source.get(key) or _NOWHERE[key] for key in _NOWHERE}
        named = [location[key] for key in ("root", "annotations", "images") if location[key]]
        # A place that the user names now is always used; a recorded place that no longer exists is passed over.
        if named and (source is not made_from or Path(named[0]).exists()):
            return DataConfig.model_validate({**made_from, **location})
    raise ConfigError(
        f"{workspace.root / 'workspace.json'}: remembers no data; name it with --set data.root=FOLDER, "
        "or run `aligndet proposals DATA` again"
    )
