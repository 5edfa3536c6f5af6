"""SoCo's pre-training: backbone, feature pyramid and box head of a Faster or Mask R-CNN, all with batch norm.

Its files come in three forms: as the program saves them, and converted for detectron2 and mmdetection. All see RGB
images with torchvision's mean and deviation, and have their strides in the 3x3 convolutions.

Source: hologerry/SoCo `contrast/models/{SoCo_FPN,fpn,fast_rcnn_conv_fc_head}.py` and its converters; names only.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from aligndet_cli.backbones import WeightsTraining
from aligndet_cli.detectors.parts.two_stage import RCNN
from aligndet_cli.tools.conversion import mmdet, published_detectron2
from aligndet_cli.tools.conversion.reading import Checkpoint
from aligndet_cli.tools.conversion.rules import Pretraining, Renamed, Rule, reasons_by_start, rename_all

FAMILIES = ("mask-rcnn", "faster-rcnn")  # the first, unless the user says otherwise
_BLOCKS = (("conv", 0), ("bn", 1))
RULES: tuple[Rule, ...] = (
    ("encoder.*", "backbone.*"),
    *(
        (f"neck.{theirs}_convs.#.{part}.*", f"neck.pyramid.{ours}_blocks.#.{place}.*")
        for theirs, ours in (("lateral", "inner"), ("fpn", "layer"))
        for part, place in _BLOCKS
    ),
    *((f"head.{part}{n + 1}.*", f"head.convs.{n}.{place}.*") for n in range(8) for part, place in _BLOCKS),
    ("head.fc1.*", "head.fc.*"),
)
_TRAINED = ("backbone.", "neck.", "head.")
_MMDET_RULES = tuple(rule for rule in mmdet.RULES["faster-rcnn"] if rule[1].startswith(_TRAINED))
# The converter for detectron2 leaves out the names of the parts of a detector.
_DETECTRON2_RULES = tuple(
    (re.sub(r"^(backbone\.bottom_up|backbone|roi_heads)\.", "", theirs), ours)
    for theirs, ours in published_detectron2.RULES["faster-rcnn"]
    if ours.startswith(_TRAINED)
)
_UNUSED = {
    **{f"{name}_k.": "momentum copy of the detector" for name in ("encoder", "neck", "head", "projector")},
    **{f"{name}.": "embeds boxes, in pre-training only" for name in ("projector", "predictor")},
}


def from_soco(checkpoint: Checkpoint, family: str | None) -> Renamed:
    """Return the state dict of a detector that SoCo pre-trained under our names.

    Args:
        family: the expected one, if the user named it.
    """
    tensors = checkpoint.tensors
    left_out = reasons_by_start(tensors, _UNUSED)
    renamed, unknown = rename_all(tensors, _rules_of(tensors), left_out)
    pretraining = Pretraining(WeightsTraining("SoCo"), "soco", RCNN.box_branch, checkpoint.epoch)
    found = family if family in FAMILIES else FAMILIES[0]
    return Renamed(found, renamed, unknown, left_out, pretraining=pretraining)


def _rules_of(tensors: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    if any(name.startswith("fpn_lateral2.") for name in tensors):
        return _DETECTRON2_RULES
    return _MMDET_RULES if any(name.startswith("roi_head.") for name in tensors) else RULES
