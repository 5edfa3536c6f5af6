"""A detector that takes images and targets as torchvision's detectors do, and images of any kind to predict."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from aligndet_cli.api.images import AnyImage, as_pixels, one_by_one
from aligndet_cli.data.batch import NO_CLASS
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.loaders import batch_of
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, make_batch
from aligndet_cli.detectors import Detector, semantic_classes_of
from aligndet_cli.detectors.checkpoint import DetectorFile, kept_state, write_detector
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.parts.mask_head import paste_probabilities
from aligndet_cli.detectors.results import rescale_boxes
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.files import check_output_file
from aligndet_cli.finetune.initial import Initial
from aligndet_cli.finetune.views import Resolution
from aligndet_cli.training.loop import too_small_for_norms


class ImageDetector(nn.Module):
    """A detector family behind the interface of torchvision's detectors.

    Labels are torchvision's, where 0 is background. They are the category ids of the label files (1 to 90 for COCO),
    all raised alike where these begin below 1 (by one for YOLO); without names of classes they are 1 to
    `num_classes` - 1.

    Attributes:
        model: the family's module, see `aligndet_cli.detectors.Detector`.
        names: class names by label.
        short_sides, long_side: short sides in pixels one of which is drawn in training, and limit of the long side.
        test_sides: short and long side in pixels that images are resized to in evaluation mode.
    """

    def __init__(
        self,
        model: Detector,
        categories: Sequence[Category],
        initial: Initial,
        resolution: Resolution,
        test_sides: tuple[int, int],
    ) -> None:
        super().__init__()
        self.model, self.categories, self._initial = model, tuple(categories), initial
        self.short_sides, self.long_side = resolution.short_sides, resolution.long_side
        self.test_sides = test_sides
        self._class_ids = labels_of(categories)
        self.names = {label: categories[class_id].name for label, class_id in self._class_ids.items()}

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses by name in training mode, and the detections of each image in evaluation mode.

        Images are resized and normalised here, as torchvision's detectors do; flips and other changes are the
        caller's.

        Args:
            images: (3, H, W) each, float in 0..1 or uint8, RGB, of any sizes.
            targets: for each image `boxes` (N, 4) xyxy in pixels, `labels` (N,) int64 and, for detectors with masks,
                `masks` (N, H, W), and for those with a semantic branch `pixel_classes` (H, W), integers, 255 for none.
                Other entries are ignored, and all of it in evaluation mode.

        Returns:
            Scalar losses, already weighted; or see `predict`, without a limit of the score, on the detector's device.

        Raises:
            DataError: an image or a target is none of these.
            ConfigError: training mode without targets, or weights that are no longer of float32.
            RunError: a single image that is too small for batch norm.
        """
        self._check_weights()
        pixels = [as_pixels(image, f"images[{number}]").to(self.device) for number, image in enumerate(images)]
        if not self.training:
            return self._detect(pixels)
        if targets is None:
            raise ConfigError("the detector is in training mode: give targets, or call its eval() first")
        targets = list(targets)
        if len(targets) != len(pixels) or not pixels:
            raise DataError(f"{len(pixels)} images, but {len(targets)} targets; give one per image")
        samples = [
            self._sample(number, image, target)
            for number, (image, target) in enumerate(zip(pixels, targets, strict=True))
        ]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            batch, of_images = make_batch(samples, [self._draw_view() for _ in samples], self.device)
        try:
            losses: dict[str, Tensor] = self.model(batch, of_images)
        except ValueError as error:
            known = too_small_for_norms(error)
            if known is None:
                raise
            raise known from error
        return losses

    @torch.no_grad()
    def predict(
        self, images: AnyImage | Iterable[AnyImage], *, score: float = 0.3, batch_size: int = 1
    ) -> list[dict[str, Tensor]]:
        """Detect in images of any kind; the numbers are those of `aligndet predict` and `aligndet evaluate`.

        Args:
            images: one image or any iterable of them: paths, (H, W, 3) uint8 arrays in RGB, Pillow's images (turned
                upright by their EXIF), or (3, H, W) tensors, float in 0..1 or uint8.
            score: least score of what is kept, 0 to 1.
            batch_size: images per forward pass; padding to the largest may change the last digits.

        Returns:
            For each image, best first, on the CPU: `boxes` (N, 4) xyxy in pixels of the image, `scores` (N,) in 0..1,
            `labels` (N,) int64 (see `names`) and, if the detector predicts them, `masks` (N, 1, H, W), probabilities.

        Raises:
            DataError: an image cannot be read.
            ConfigError: a setting is out of its range, or the weights are no longer of float32.
        """
        if not (isinstance(score, Real) and 0 <= score <= 1 and isinstance(batch_size, Integral) and batch_size >= 1):
            raise ConfigError(
                f"score={score!r}, batch_size={batch_size!r}: write a score of 0 to 1, and a whole number of images"
            )
        self._check_weights()
        modes = [(module, module.training) for module in self.modules()]  # of each: callers may keep norms fixed
        self.eval()
        try:
            found: list[dict[str, Tensor]] = []
            for chunk in _chunks(one_by_one(images), batch_size):
                first = len(found)
                pixels = [as_pixels(image, f"images[{first + place}]") for place, image in enumerate(chunk)]
                for one in self._detect([image.to(self.device) for image in pixels], score):
                    found.append({name: value.cpu() for name, value in one.items()})
            return found
        finally:
            for module, mode in modes:
                module.training = mode

    def save(self, file: str | Path) -> None:
        """Write the detector as a fine-tuned `weights.pt`, for `load`, `aligndet predict --weights` and others.

        Raises:
            ConfigError: the file cannot be written.
        """
        check_output_file(Path(file))
        content = DetectorFile(
            stage="finetune",
            detector=self._initial.detector,
            backbone=self._initial.backbone,
            categories=self.categories,
            resolution=self.test_sides,
            state_dict=kept_state(self.model, "finetune"),
            recipe=self._initial.recipe.name,
            backbone_training=self._initial.training,
        )
        write_detector(Path(file), content)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def _check_weights(self) -> None:
        weight = next(self.model.parameters())
        if weight.is_meta or weight.dtype != torch.float32:
            place = "on the device meta" if weight.is_meta else f"of {weight.dtype}"
            raise ConfigError(f"the detector has weights {place}, not of float32; for less memory use torch.autocast")

    def _draw_view(self) -> ViewParams:
        """Draw a short side from torch's generator, if there is a choice."""
        choice = int(torch.randint(len(self.short_sides), ())) if len(self.short_sides) > 1 else 0
        return ViewParams(self.short_sides[choice], self.long_side)

    def _sample(self, number: int, image: Tensor, target: Mapping[str, Any]) -> Sample:
        name, (height, width) = f"targets[{number}]", image.shape[1:]
        if not isinstance(target, Mapping):
            raise DataError(f"{name}: is of type {type(target).__name__}; give a dictionary with boxes and labels")
        boxes, labels = (_tensor_of(target, key, name) for key in ("boxes", "labels"))
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != (len(boxes),):
            raise DataError(
                f"{name}: boxes {tuple(boxes.shape)} with labels {tuple(labels.shape)}; give (N, 4) and (N,)"
            )
        if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
            raise DataError(f"{name}: boxes are {boxes.format.name}; convert them to XYXY: x1, y1, x2, y2")
        boxes, labels = boxes.cpu().float(), labels.cpu()
        sides = boxes[:, 2:] - boxes[:, :2]
        if not (boxes.isfinite().all() and (sides > 0).all()):
            row = int((~(boxes.isfinite().all(1) & (sides > 0).all(1))).nonzero()[0])
            raise DataError(f"{name}: box {row} is {boxes[row].tolist()}; give x1, y1, x2, y2 with x2 > x1 and y2 > y1")
        inside = (boxes[:, :2] < torch.tensor([width, height])).all(1) & (boxes[:, 2:] > 0).all(1)
        if not inside.all():
            row = int((~inside).nonzero()[0])
            raise DataError(
                f"{name}: box {row} is {boxes[row].tolist()}, outside of its image, {width} wide and {height} high"
            )
        unknown = [label for label in labels.tolist() if label not in self._class_ids]
        if unknown:
            raise DataError(f"{name}: label {unknown[0]} is none of {self._known_labels()}")
        class_ids = torch.tensor([self._class_ids[label] for label in labels.tolist()], dtype=torch.int64)
        masks = None
        if self._initial.recipe.needs_masks:
            masks = _tensor_of(target, "masks", name).to(self.device) > 0
            if masks.shape != (len(boxes), height, width):
                raise DataError(f"{name}: masks {tuple(masks.shape)}; give {(len(boxes), int(height), int(width))}")
        pixel_classes = self._pixel_classes(target, name, (int(height), int(width)))
        return Sample(number, number, image, boxes, class_ids, masks, pixel_classes)

    def _pixel_classes(self, target: Mapping[str, Any], name: str, size_hw: tuple[int, int]) -> Tensor | None:
        """Return the (H, W) uint8 classes of pixels on the device; None without a semantic branch."""
        num_classes = semantic_classes_of(self._initial.detector)
        if not num_classes:
            return None
        classes = _tensor_of(target, "pixel_classes", name).to(self.device)
        if classes.shape != size_hw:
            raise DataError(f"{name}: pixel_classes {tuple(classes.shape)}; give {size_hw}")
        wrong = classes[((classes < 0) | (classes >= num_classes)) & (classes != NO_CLASS)]
        if len(wrong):
            raise DataError(
                f"{name}: pixel_classes has {wrong[0].item()}; give 0 to {num_classes - 1}, and {NO_CLASS} for none"
            )
        return classes.to(torch.uint8)

    def _known_labels(self) -> str:
        labels = sorted(self._class_ids)
        shown = f"{labels[0]} to {labels[-1]}" if labels == list(range(labels[0], labels[-1] + 1)) else f"{labels}"
        return f"the detector's, {shown}; 0 is background, and num_classes counts it, as in torchvision"

    def _detect(self, images: Sequence[Tensor], score: float = 0.0) -> list[dict[str, Tensor]]:
        """Return the detections in (3, H, W) uint8 images on the device, as `evaluate` finds them."""
        if not images:
            return []
        with torch.autocast(self.device.type, enabled=False):
            batch, sizes = batch_of(images, self.test_sides, self.device)
        return [
            self._in_pixels_of_the_original(found, view_hw, size_hw, score)
            for found, view_hw, size_hw in zip(self.model.detect(batch), batch.sizes_hw, sizes, strict=True)
        ]

    def _in_pixels_of_the_original(
        self, found: Detections, view_hw: tuple[int, int], size_hw: tuple[int, int], score: float
    ) -> dict[str, Tensor]:
        labels = torch.zeros(len(self.categories), dtype=torch.int64)  # 0: an output that stands for no class
        labels[list(self._class_ids.values())] = torch.tensor(list(self._class_ids))
        found_labels = labels.to(found.boxes.device)[found.class_ids]
        kept = (found.scores >= score) & (found_labels > 0)
        boxes = rescale_boxes(found.boxes[kept], view_hw, size_hw).float()
        shown = {"boxes": boxes, "labels": found_labels[kept], "scores": found.scores[kept]}
        if found.masks is not None:
            shown["masks"] = _pasted(found.masks[kept], boxes, size_hw)
        return shown


def labels_of(categories: Sequence[Category]) -> dict[int, int]:
    """Return the class id of each label, see `ImageDetector`; without outputs that stand for no class."""
    ids = {category.category_id: class_id for class_id, category in enumerate(categories) if not category.is_unused}
    raised_by = max(1 - min(ids, default=1), 0)
    return {category_id + raised_by: class_id for category_id, class_id in ids.items()}


def _pasted(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return the (N, M, M) masks of boxes as (N, 1, H, W) probabilities."""
    pasted = masks.new_zeros(len(masks), 1, *size_hw)
    for whole, mask, box in zip(pasted, masks, boxes, strict=True):
        part, (top, left) = paste_probabilities(mask, box, size_hw)
        whole[0, top : top + part.shape[0], left : left + part.shape[1]] = part
    return pasted


def _tensor_of(target: Mapping[str, Any], key: str, name: str) -> Tensor:
    value = target.get(key)
    if value is None:
        raise DataError(f"{name}: has no {key}; give a tensor, see help(ImageDetector.forward)")
    if not isinstance(value, Tensor) or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise DataError(f"{name}: {key} of {kind}; give a tensor of numbers, see help(ImageDetector.forward)")
    return value


def _chunks(images: Iterator[AnyImage], size: int) -> Iterator[list[AnyImage]]:
    while chunk := list(islice(images, size)):
        yield chunk
