"""Memory that a training step needs at least, from shapes alone: the model is on torch's meta device, without memory.

Counted are weights, gradients and the optimizer's state, and what layers keep for the backward pass. Losses, and what
lives for the moment of one layer, come on top.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models.swin_transformer import SwinTransformerBlock

from aligndet_cli.backbones.swin import Swin
from aligndet_cli.data.batch import PAD_DIVISOR, ImageBatch
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.fcos import FCOS
from aligndet_cli.detectors.interface import Detector, Features
from aligndet_cli.detectors.parts.mask_head import MaskedRCNN
from aligndet_cli.detectors.parts.two_stage import RCNN, heads_of
from aligndet_cli.detectors.retinanet import RetinaNet
from aligndet_cli.finetune.views import LabelledViews
from aligndet_cli.pretrain_box.methods.aligndet import TwoViews
from aligndet_cli.training.footprint import gigabytes

_IMAGES = 2  # batch norm cannot do with one where a map is a single cell
_STATES = {"sgd": 1, "adamw": 2}  # copies of each trained weight that the optimizer keeps


@dataclass(frozen=True)
class Need:
    """Bytes of a step in 32 bits.

    Attributes:
        num_parameters: of the model with its momentum copies.
        fixed: weights, gradients and the optimizer's state.
        per_image: kept for the backward pass of an image.
        largest: height and width of that image, for people.
    """

    num_parameters: int
    fixed: int
    per_image: int
    largest: str

    def of(self, batch: int) -> int:
        """Return the bytes of a step with so many images."""
        return self.fixed + batch * self.per_image

    def most_images(self, budget: int) -> int:
        """Return the number of images of a step that so many bytes hold."""
        return max(budget - self.fixed, 0) // self.per_image

    def describe(self, batch: int) -> str:
        """Return the parts of the need of so many images in words."""
        return (
            f"{self.num_parameters / 1e6:.0f} million parameters; a step needs {gigabytes(self.fixed)} for weights, "
            f"gradients and optimizer and {gigabytes(self.per_image)} for an image of {self.largest}, so at least "
            f"{gigabytes(self.of(batch))} with {batch} (in 32 bits; bf16-mixed keeps about half for images)"
        )


def need_of(build: Callable[[], TwoViews | LabelledViews], optimizer: str) -> Need:
    """Return the memory of the steps of a stage, whose module `build` makes; nothing of it is computed."""
    with torch.device("meta"):
        views = build()
        views.train()
        assert views.largest_hw is not None
        height, width = views.largest_hw
        padded = [-(-side // PAD_DIVISOR) * PAD_DIVISOR for side in (height, width)]
        images = ImageBatch(torch.empty(_IMAGES, 3, *padded), ((height, width),) * _IMAGES)
        kept = _Kept(views)
        with _without_recompute(views) as recomputed, kept.watch(recomputed):
            if isinstance(views, TwoViews):
                pretext = views.pretext
                with torch.set_grad_enabled(not pretext.freeze_backbone):
                    features = pretext.online.extract(images, with_assistant=True)
                _run(pretext.online, features, is_pretraining=True)
            else:
                _run(views.model, views.model.extract(images, with_assistant=True), is_pretraining=False)
    parameters = list(views.parameters())
    weights = sum(value.nbytes for value in [*parameters, *views.buffers()])
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return Need(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        fixed=weights + (1 + _STATES[optimizer]) * trained,
        per_image=kept.bytes() // _IMAGES,
        largest=f"{height}x{width}",
    )


class _Kept:
    """The tensors that layers keep, each storage once; those of blocks that run again only while one does."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {_storage_of(value) for value in [*model.parameters(), *model.buffers()]}
        self.sizes: dict[int, int] = {}
        self.storages: list[torch.UntypedStorage] = []  # held, so that no number stands for two
        self.of_blocks: list[int] = []

    @contextmanager
    def watch(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Count what is kept while the body runs; `blocks` are those that run again."""
        before: list[dict[int, int]] = []

        def begin(_block: nn.Module, arguments: tuple[Tensor]) -> None:
            self._keep(arguments[0])
            before.append(dict(self.sizes))

        def end(_block: nn.Module, _arguments: tuple[Tensor], _output: Tensor) -> None:
            earlier = before.pop()
            self.of_blocks.append(sum(self.sizes.values()) - sum(earlier.values()))
            self.sizes = earlier

        handles = [block.register_forward_pre_hook(begin) for block in blocks]
        handles += [block.register_forward_hook(end) for block in blocks]
        with saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        number = _storage_of(tensor)
        if number not in self.weights and number not in self.sizes:
            self.storages.append(tensor.untyped_storage())
            self.sizes[number] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes(self) -> int:
        """Return the sum, with the largest block that runs again."""
        return sum(self.sizes.values()) + max(self.of_blocks, default=0)


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _without_recompute(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Let Swins that run their blocks again keep everything, and give these blocks to the body."""
    swins = [module for module in model.modules() if isinstance(module, Swin) and module.recompute]
    for swin in swins:
        swin.recompute = False
    yield [block for swin in swins for block in swin.modules() if isinstance(block, SwinTransformerBlock)]
    for swin in swins:
        swin.recompute = True


def _run(model: Detector, features: Features, *, is_pretraining: bool) -> None:
    """Run all layers that train on the features of `_IMAGES`; R-CNNs have as many RoIs as they sample at most."""
    for one in features.one_by_one():
        if isinstance(model, DETR):
            model.predict(model.decode(one))
        elif isinstance(model, RetinaNet):
            pyramid = model.neck(one.maps)
            model.predict_logits(pyramid)
            model.predict_deltas(pyramid)
        elif isinstance(model, FCOS):
            pyramid = model.neck(one.maps)
            class_maps = [model.head.class_tower(level) for level in pyramid]
            for class_map in class_maps:
                model.class_predictor(class_map)
            model.predict_centerness(class_maps)
            model.predict_log_sides(pyramid)
        else:
            assert isinstance(model, RCNN)
            model.rpn(model.pyramid(one.maps).levels)
            _run_heads(model, is_pretraining=is_pretraining)


def _run_heads(model: RCNN, *, is_pretraining: bool) -> None:
    config = model.config
    sampling = config.pretext_sampling().rois if is_pretraining else config.sampling()[1]
    channels, size = config.neck_channels, config.pool_size
    for head in heads_of(model):
        pooled = torch.empty(_IMAGES * sampling.num_samples, channels, size, size, requires_grad=True)
        features = head.layers(pooled)
        head.class_predictor(features)
        head.box_predictor(features)
    if isinstance(model, MaskedRCNN) and not is_pretraining:
        num_masks = _IMAGES * int(sampling.num_samples * sampling.positive_fraction)
        for branch in model.mask_branches():
            branch.features(torch.empty(num_masks, channels, branch.pool_size, branch.pool_size, requires_grad=True))
