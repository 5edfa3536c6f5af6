"""What the tests of tests/gpu share: the device, a detector on it and the same on the CPU, and how they compare.

`ALIGNDET_GPU_TESTS_ON=cpu pytest tests/gpu` runs them where there is no GPU. Then the weights of the second detector
differ in the last bits, as results of a GPU do.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, make_batch
from aligndet_cli.detectors import Detector, DetectorConfig
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.parts.two_stage import RCNN
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.placement import place
from aligndet_cli.training.trial import draw_samples
from helpers.small_detectors import SMALL
from helpers.trained_like import let_find_much

IS_CPU = os.environ.get("ALIGNDET_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if IS_CPU else "cuda:0")
PROCESS = Process(device=str(DEVICE))
ACCELERATOR = ("--accelerator", "cpu" if IS_CPU else "gpu")
ROUNDING = 2.0**-24  # of float32
NUM_CLASSES = 3
SIZES_HW = ((96, 128), (128, 90))
# Nothing is drawn: the generators of a CPU and a GPU draw differently.
_ALL = dict.fromkeys(("pretext_samples", "pretext_rpn_samples", "rpn_samples", "roi_samples"), 9999)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def undrawn(family: str) -> DetectorConfig:
    """The small configuration of a family, without any choice at random."""
    config = SMALL[family]
    return config.model_copy(update={name: value for name, value in _ALL.items() if name in type(config).model_fields})


def draw(family: str, num_boxes: int = 7) -> list[Sample]:
    """Two images with boxes, and masks if the family trains on them."""
    with_masks = SMALL[family].RECIPE.needs_masks
    return draw_samples(2, SIZES_HW, num_boxes=num_boxes, num_classes=NUM_CLASSES, with_masks=with_masks)


def batch_of(samples: Sequence[Sample], short_side: int = 96, **more: Any) -> tuple[ImageBatch, list[BoxTargets]]:
    """The images as they are, or resized, on the CPU."""
    return make_batch(samples, [ViewParams(short_side, 160)] * len(samples), torch.device("cpu"), **more)


@dataclass
class Pair:
    """A detector on the CPU, and its copy on the device, which decides as the first did, see `decide_alike`."""

    reference: Detector
    other: Detector
    images: ImageBatch
    targets: list[BoxTargets]
    decided: list[Any]

    def on_device(self) -> tuple[ImageBatch, list[BoxTargets]]:
        return moved((self.images, self.targets))


def build_pair(family: str) -> Pair:
    """Detectors that find much, and what to find it in."""
    torch.manual_seed(0)
    images, targets = batch_of(draw(family))
    model = undrawn(family).build(build_backbone(BackboneConfig(name="resnet18")), NUM_CLASSES)
    reference = let_find_much(model, images)
    other = copied(reference)
    return Pair(reference, other, images, targets, decide_alike(reference, other))


def copied(model: ModuleT) -> ModuleT:
    """A copy on the device; on a CPU with other last bits."""
    other = copy.deepcopy(model)
    place(other, PROCESS)
    if IS_CPU:
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + ROUNDING * torch.randn_like(parameter))
    return other


def decide_alike(reference: Detector, other: Detector) -> list[Any]:
    """Let `other` propose and match as `reference` did, call by call: the last bit of a score must not decide.

    Returns what was decided and not yet taken.
    """
    decided: list[Any] = []
    method = next((name for name in ("propose", "assign") if hasattr(_decider(reference), name)), None)
    if method is not None:
        recorded = getattr(_decider(reference), method)
        object.__setattr__(
            _decider(reference), method, lambda *a, **k: decided.append(recorded(*a, **k)) or decided[-1]
        )
        object.__setattr__(_decider(other), method, lambda *_, **__: moved(decided.pop(0)))
    return decided


def _decider(model: Detector) -> nn.Module | None:
    """What decides by scores: the RPN of R-CNNs, DETR itself. The others match by places alone."""
    if isinstance(model, RCNN):
        return model.rpn
    return model if isinstance(model, DETR) else None


def moved(value: Any) -> Any:
    """Tensors, batches, targets and sequences of them on the device."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, ImageBatch):
        return replace(value, pixels=moved(value.pixels))
    if isinstance(value, BoxTargets):
        parts = (value.boxes, value.class_ids, value.instance_ids, value.masks)
        return BoxTargets(*(None if part is None else moved(part) for part in parts))
    return type(value)(moved(one) for one in value)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """The same scalars, up to a share of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].detach().cpu().float(),
            value.detach().cpu().float(),
            rtol=tolerance,
            atol=tolerance / 100,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_gradients(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    """The gradients of each child differ by no more than a share of their length.

    A unit that is zero but for the last bit passes its gradient on one side alone: 1 % is where that ends.
    """
    for name, child in expected.named_children():
        pairs = list(zip(found.get_submodule(name).parameters(), child.parameters(), strict=True))
        assert all((a.grad is None) == (b.grad is None) for a, b in pairs), name
        ours, theirs = (_in_a_row(pair[side].grad for pair in pairs) for side in (0, 1))
        length = theirs.norm()
        assert (ours - theirs).norm() <= tolerance * length, f"{name}: {(ours - theirs).norm() / length:.2g}"


def _in_a_row(gradients: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([torch.zeros(1), *(g.detach().cpu().double().flatten() for g in gradients if g is not None)])


def share_found(found: Detections, expected: Detections, *, pixels: float, score: float) -> float:
    """Share of the expected detections that have a twin: of their class, and alike in all sides and the score."""
    if not len(expected.boxes):
        return 1.0
    distance = (expected.boxes[:, None] - found.boxes.cpu()).abs().amax(dim=2)  # (E, F)
    is_twin = (distance <= pixels) & (expected.class_ids[:, None] == found.class_ids.cpu())
    is_twin &= (expected.scores[:, None] - found.scores.cpu()).abs() <= score
    if found.masks is not None and expected.masks is not None:
        is_twin &= (expected.masks[:, None] - found.masks.cpu()).abs().flatten(2).amax(dim=2) <= 100 * score
    return float(is_twin.any(dim=1).float().mean())
