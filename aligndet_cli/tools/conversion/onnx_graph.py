"""Detectors as ONNX graphs: the network and the decoding of its boxes, for one image of a fixed size.

The graph does not choose boxes or suppress overlapping ones, since their number depends on the image.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import LoadedDetector
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.fcos import FCOS
from aligndet_cli.detectors.parts.box_coder import decode_boxes
from aligndet_cli.detectors.parts.cells import grids_of
from aligndet_cli.detectors.retinanet import RetinaNet
from aligndet_cli.errors import ConfigError, WeightsError

PACKAGES = ("onnx", "onnxscript")


class Graph(nn.Module):
    """Network from pixels to the boxes and scores of all N anchors, points or queries of one image.

    Raises:
        WeightsError: a two-stage detector, whose number of boxes depends on the image.
    """

    def __init__(self, model: Detector, size_hw: tuple[int, int]) -> None:
        super().__init__()
        if not isinstance(model, RetinaNet | FCOS | DETR):
            raise WeightsError(
                "--to onnx: the number of boxes that an R-CNN looks at changes from image to image, and ONNX has no "
                "place for that; export it --to torchvision or mmdet"
            )
        self.model: RetinaNet | FCOS | DETR = model
        self.size_hw = size_hw

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes and scores.

        Args:
            pixels: (1, 3, H, W) ImageNet-normalised RGB.

        Returns:
            (N, 4) boxes, xyxy in pixels, and (N, K) scores in 0..1; scores not above the detector's threshold are 0.
        """
        images = ImageBatch(pixels, (self.size_hw,))
        if isinstance(self.model, RetinaNet):
            return _run_retinanet(self.model, images)
        return _run_fcos(self.model, images) if isinstance(self.model, FCOS) else _run_detr(self.model, images)


def export_onnx(detector: LoadedDetector, file: Path, size_hw: tuple[int, int]) -> str:
    """Write a detector as an ONNX file, and return a sentence on its use.

    Raises:
        ConfigError: packages are missing.
        WeightsError: a two-stage detector.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"--to onnx: {' and '.join(missing)} not installed; run pip install 'aligndet[onnx]'")
    graph = Graph(detector.model, size_hw)
    temporary = file.with_name(f".{file.name}.tmp")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every operation that it does not fold
    torch.onnx.export(
        graph.eval(),
        (torch.zeros(1, 3, *size_hw),),
        temporary,
        input_names=["pixels"],
        output_names=["boxes", "scores"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    temporary.replace(file)
    return (
        f"onnx: pixels (1, 3, {size_hw[0]}, {size_hw[1]}) normalised RGB -> boxes (N, 4) xyxy, scores (N, "
        f"{len(detector.categories)}); keep scores above 0, {_remaining(graph.model)}"
    )


def _remaining(model: RetinaNet | FCOS | DETR) -> str:
    if isinstance(model, DETR):
        return "the best class of each box"
    config = model.config
    return f"then suppress boxes of a class at IoU {config.nms_iou:g} and take the best {config.max_detections}"


def _run_retinanet(model: RetinaNet, images: ImageBatch) -> tuple[Tensor, Tensor]:
    pyramid = model.neck(model.extract(images).maps)
    scores = torch.cat([_rows(level, model.num_slots) for level in model.predict_logits(pyramid)]).sigmoid()
    deltas = torch.cat([_rows(level, model.num_slots) for level in model.predict_deltas(pyramid)])
    boxes = decode_boxes(deltas, model.anchors(grids_of(pyramid)), images.sizes_hw[0])
    return boxes, torch.where(scores > model.config.score_threshold, scores, 0.0)


def _run_fcos(model: FCOS, images: ImageBatch) -> tuple[Tensor, Tensor]:
    pyramid = model.neck(model.extract(images).maps)
    class_maps = [model.head.class_tower(level) for level in pyramid]
    scores = torch.cat([_rows(model.class_predictor(level), 1) for level in class_maps]).sigmoid()
    centerness = torch.cat([_rows(level, 1) for level in model.predict_centerness(class_maps)]).sigmoid()
    sides = torch.cat([_rows(level, 1) for level in model.predict_log_sides(pyramid)]).exp()
    points = model.points(grids_of(pyramid))
    boxes = torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1)
    kept = torch.where(scores > model.config.score_threshold, scores * centerness, 0.0)
    return clip_boxes_to_image(boxes, images.sizes_hw[0]), kept


def _run_detr(model: DETR, images: ImageBatch) -> tuple[Tensor, Tensor]:
    logits, boxes = model.predict(model.decode(model.extract(images))[-1:])
    height, width = images.sizes_hw[0]
    corners = box_convert(boxes[0, 0], "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
    scores = logits[0, 0].softmax(dim=-1)[:, :-1]
    return clip_boxes_to_image(corners, images.sizes_hw[0]), scores


def _rows(level: Tensor, num_slots: int) -> Tensor:
    """Reshape (1, A*V, H, W) to (H*W*A, V), in the order of rows, columns and slots."""
    return level[0].unflatten(0, (num_slots, -1)).permute(2, 3, 0, 1).flatten(0, 2)
