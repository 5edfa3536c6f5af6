"""Write a detector as an ONNX file that onnxruntime runs to the same detections as ours."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligndet_cli.backbones.build import family_of
from aligndet_cli.backbones.from_timm import has_windows
from aligndet_cli.config import DataConfig
from aligndet_cli.data.batch import PAD_DIVISOR, ImageBatch
from aligndet_cli.data.loaders import load_image
from aligndet_cli.data.open import open_images
from aligndet_cli.data.toy import draw_toy_image
from aligndet_cli.data.transforms import MEAN, STD, normalise, pad_to_batch, resize, resized_hw
from aligndet_cli.detectors.checkpoint import LoadedDetector
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.errors import AlignDetError, ConfigError, RunError
from aligndet_cli.tools.conversion.onnx_check import Comparison, compare
from aligndet_cli.tools.conversion.onnx_graph import Graph, WithNMS
from aligndet_cli.tools.conversion.onnx_nms import translations

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NUM_IMAGES = 3  # of the comparison
SCALES = (1.0, 0.8, 0.6)  # of their sizes
_EXAMPLE_HW = (160, 256)  # to trace the graph with; any other size will do
_OUTPUTS = ("boxes", "scores", "class_ids", "masks")


@dataclass(frozen=True)
class OnnxOptions:
    """Choices of an export.

    Attributes:
        with_nms: see `Graph`.
        size_hw: height and width of the only image that the file takes; None: any number of images of any size.
    """

    with_nms: bool = True
    size_hw: tuple[int, int] | None = None

    def check(self, family: str, backbone: str) -> None:
        """Make sure that a family with a backbone can be exported so.

        Raises:
            ConfigError: it cannot, or packages are missing.
        """
        missing = [package for package in PACKAGES if find_spec(package) is None]
        if missing:
            raise ConfigError(f"--to onnx: {' and '.join(missing)} not installed; run pip install 'aligndet[onnx]'")
        if self.size_hw is None and (family_of(backbone) == "swin" or has_windows(backbone)):
            raise ConfigError(
                f"--to onnx: the windows of {backbone} change with the size of images; name one size by "
                "--image-size HEIGHTxWIDTH"
            )
        if not self.with_nms and family == "detr":
            raise ConfigError("--no-with-nms: detr has no NMS; leave it out")
        if not self.with_nms and family in ("mask-rcnn", "cascade-mask-rcnn", "htc"):
            raise ConfigError(f"--no-with-nms: masks are made of the boxes that NMS leaves; export {family} with NMS")


def export_onnx(
    detector: LoadedDetector, file: Path, options: OnnxOptions, images: Sequence[Tensor]
) -> tuple[str, Comparison]:
    """Write an ONNX file, run it, and compare it with the detector; a file that differs is not kept.

    Args:
        images: (3, H, W) uint8 RGB, for the comparison.

    Returns:
        A sentence on the use of the file, and the comparison.

    Raises:
        RunError: the file finds something else than the detector.
    """
    import onnxruntime

    temporary = file.with_name(f".{file.name}.tmp")
    try:
        outputs = _write(detector, temporary, options)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        batches = comparison_batches(images, detector.resolution, options.size_hw)
        assert isinstance(detector.model, WithNMS | DETR)
        comparison = compare(detector.model, session, batches, with_nms=options.with_nms)
        if comparison.mistakes:
            raise RunError(
                f"{file}: not written, onnxruntime finds something else than we do: {len(comparison.mistakes)} "
                f"differences, the first: {comparison.mistakes[0]}; please report it"
            )
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    shape = "1, 3, {}, {}".format(*options.size_hw) if options.size_hw else "B, 3, H, W"
    rest = "" if options.with_nms else "; suppress boxes by class and take the best yourself"
    return f"onnxruntime: pixels ({shape}) and sizes (B, 2) to {', '.join(outputs)}{rest}", comparison


def _write(detector: LoadedDetector, file: Path, options: OnnxOptions) -> tuple[str, ...]:
    """Write the file, and return the names of its outputs."""
    outputs = _OUTPUTS if detector.has_masks else _OUTPUTS[:3]
    num_images, size_hw = (1, options.size_hw) if options.size_hw else (2, _EXAMPLE_HW)
    example = torch.zeros(num_images, 3, *size_hw), torch.tensor([size_hw] * num_images)
    shapes: Any = None
    if options.size_hw is None:
        batch, *sides = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
        shapes = ({0: batch, 2: PAD_DIVISOR * sides[0], 3: PAD_DIVISOR * sides[1]}, {0: batch})
    graph = Graph(detector.model, len(detector.categories), with_nms=options.with_nms).eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(graph, example, dynamic_shapes=shapes),
            input_names=["pixels", "sizes"],
            output_names=outputs,
            custom_translation_table=translations(),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_about(detector))
    if options.size_hw is None:
        _name_axes(program.model.graph)
    program.save(file, external_data=False)
    return outputs


def _name_axes(graph: Any) -> None:
    """Give the axes of any length names that say what they are."""
    from onnx_ir import Shape

    pixels, sizes = graph.inputs
    pixels.shape, sizes.shape = Shape(["batch", 3, "height", "width"]), Shape(["batch", 2])
    for output in graph.outputs:
        output.shape = Shape(["batch", *output.shape[1:]])


def _about(detector: LoadedDetector) -> dict[str, str]:
    """Return what one needs to know to use the file, as JSON by name."""
    about = {
        "names": [category.name for category in detector.categories],
        "resolution": detector.resolution,
        "mean": MEAN,
        "std": STD,
    }
    return {name: json.dumps(value) for name, value in about.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what PyTorch's exporter says of its own work."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "torch.export")]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for one in loggers:
                one.setLevel(logging.ERROR)
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def comparison_images(data: DataConfig | None) -> tuple[list[Tensor], str]:
    """Return three images (3, H, W) uint8 RGB to compare detections in, and where they come from.

    They are from a run's data, of different sizes if there are such; drawn pictures if the data is not known or gone.
    """
    reason = "the run does not say what it was trained on"
    if data is not None:
        try:
            image_set = open_images(data, purpose="val")
            chosen = np.linspace(0, len(image_set) - 1, NUM_IMAGES).round().astype(int).tolist()
            return [load_image(image_set, index) for index in chosen], f"{NUM_IMAGES} images of {image_set.root}"
        except AlignDetError as error:
            reason = str(error)
    drawn = [draw_toy_image(np.random.default_rng(seed), (480, 640), max_objects=6)[0] for seed in range(NUM_IMAGES)]
    images = [torch.from_numpy(pixels).permute(2, 0, 1).contiguous() for pixels in drawn]
    return images, f"{NUM_IMAGES} drawn pictures ({reason})"


def comparison_batches(
    images: Sequence[Tensor], resolution: tuple[int, int], size_hw: tuple[int, int] | None
) -> list[ImageBatch]:
    """Return images in three sizes: the first two in one batch, the others alone; for a file of one size, all alone.

    Args:
        images: (3, H, W) uint8 RGB.
        resolution: short and long side of the largest.
        size_hw: height and width of the file's only image, with padding; None: any.
    """
    views = []
    for image, scale in zip(images, SCALES, strict=True):
        height, width = image.shape[-2:]
        if size_hw is not None:
            scale *= min(size_hw[0] / height, size_hw[1] / width)
            view_hw = (max(int(height * scale), 1), max(int(width * scale), 1))
        else:
            short_side, long_side = (max(round(side * scale), 1) for side in resolution)
            view_hw = resized_hw((height, width), short_side, long_side)
        views.append(normalise(resize(image, view_hw)))
    if size_hw is None:
        return [pad_to_batch(views[:2]), *(pad_to_batch([view]) for view in views[2:])]
    return [_padded(view, size_hw) for view in views]


def _padded(view: Tensor, size_hw: tuple[int, int]) -> ImageBatch:
    pixels = torch.zeros(1, 3, *size_hw)
    height, width = view.shape[-2:]
    pixels[0, :, :height, :width] = view
    return ImageBatch(pixels, ((height, width),))
