"""Names of facebookresearch/detr, and of UP-DETR and DETReg, whose DETRs are built on it.

The pre-training of these two has parts beside the detector, which they leave out of fine-tuning, too.

Source: dddzg/up-detr `models/updetr.py`, `detr_main.py`; amirbar/DETReg `models/detr.py`, `main.py`; names only.
"""

from aligndet_cli.backbones import WeightsTraining
from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.reading import Checkpoint
from aligndet_cli.tools.conversion.rules import Pretraining, Renamed, Rule, reasons_by_start, rename_all

RULES: tuple[Rule, ...] = (
    ("backbone.0.body.*", "backbone.*"),
    ("input_proj.*", "neck.*"),
    ("query_embed.*", "query_embedding.*"),
    ("class_embed.*", "class_predictor.*"),
    ("bbox_embed.layers.0.*", "box_tower.0.*"),
    ("bbox_embed.layers.1.*", "box_tower.2.*"),
    ("bbox_embed.layers.2.*", "box_predictor.*"),
    ("transformer.*", "transformer.*"),
)
# What only pre-training has, by method: reasons to leave it out by the start of its names.
_CLASSES = {"class_embed.": "classes of pre-training"}
_PARTS: dict[str, dict[str, str]] = {
    "up-detr": {
        **_CLASSES,
        "patch2query.": "makes queries of patches, which only pre-training has",
        "feature_align.": "reconstructs the features of patches, in pre-training only",
    },
    "detreg": {**_CLASSES, "feature_embed.": "predicts the embeddings of proposals, in pre-training only"},
}
_DEFORMABLE = ("transformer.level_embed", "transformer.reference_points.", "input_proj.0.")


def from_detr(checkpoint: Checkpoint, layout: str) -> Renamed:
    """Return the state dict of a DETR under our names.

    Args:
        layout: `detr`, or the method that pre-trained it.

    Raises:
        WeightsError: a DETR of another kind than ours.
    """
    file, tensors = checkpoint.file, checkpoint.tensors
    if "dc5" in file.name:
        raise WeightsError(f"{file}: a DETR with a dilated last stage (DC5), which ours has not; use the one without")
    if any(name.startswith(_DEFORMABLE) for name in tensors):
        raise WeightsError(
            f"{file}: a Deformable DETR, which is none of our detectors; use a file of a plain DETR, as DETReg's "
            "checkpoint_imagenet_detr.pth"
        )
    left_out = reasons_by_start(tensors, _PARTS.get(layout, {}))
    renamed, unknown = rename_all(tensors, RULES, left_out)
    return Renamed("detr", renamed, unknown, left_out, pretraining=_pretraining_of(layout, checkpoint.epoch))


def _pretraining_of(layout: str, epoch: int | None) -> Pretraining | None:
    """Return what is known of the pre-training; both start from SwAV's backbone, and leave it as it is."""
    if layout not in _PARTS:
        return None
    epochs = None if epoch is None else epoch + 1  # they count from 0
    return Pretraining(WeightsTraining("SwAV"), "up-detr" if layout == "up-detr" else None, epochs=epochs)
