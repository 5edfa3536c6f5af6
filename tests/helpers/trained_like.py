"""Detectors that find a lot, without having been trained."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.detectors import Detector

# Mean and spread of what the layers put out: scores from nearly 0 to nearly 1, most of them low, and boxes that lie
# across each other. Offsets of the second stage count in tenths.
_OUTPUTS = {
    "class_predictor": (-4.0, 1.5),
    "rpn.objectness": (-2.0, 2.0),
    "rpn.deltas": (0.0, 0.3),
    "box_predictor": (0.0, 0.3),
    "box_predictor.sides": (3.5, 0.7),
    "box_predictor.centerness": (0.5, 1.0),
    "mask_predictor": (0.0, 2.0),
}
_SHARED = {"class_predictor": (0.0, 2.0), "box_predictor": (0.0, 1.5)}  # where classes exclude each other: softmax


@torch.no_grad()
def let_find_much(model: Detector, images: ImageBatch) -> Detector:
    """Set norms by the statistics of some images, and scale the last layers so that their outputs spread."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all calls
            module.train()
    model.extract(images)
    model.eval()
    has_softmax = any(isinstance(module, nn.Linear) for module in model.class_predictor.modules())
    for full_name, module in model.named_modules():
        name = re.sub(r"\.\d+$", "", full_name)  # the same for all heads of a cascade
        wanted = (_SHARED if has_softmax else {}).get(name, _OUTPUTS.get(name))
        if wanted is not None and isinstance(module, nn.Conv2d | nn.Linear):
            _rescale(module, wanted, lambda: model.detect(images))
    return model


def _rescale(layer: nn.Conv2d | nn.Linear, wanted: tuple[float, float], run: Callable[[], object]) -> None:
    """Let the outputs of a layer in a run have a mean and a spread."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output.flatten()))
    run()
    handle.remove()
    if not seen or not (spread := torch.cat(seen).std()) > 0:
        return
    mean, factor = torch.cat(seen).mean(), wanted[1] / spread
    layer.weight.mul_(factor)
    assert layer.bias is not None
    layer.bias.copy_((layer.bias - mean) * factor + wanted[0])
