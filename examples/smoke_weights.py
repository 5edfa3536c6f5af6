"""Random weights in published layouts, for the scripts of the paper's tables with SMOKE=1.

Backbones, and the detectors that SoCo, UP-DETR and DETReg pre-train.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class RCNNSize:
    """Widths of the pyramid and of the fully connected layer, and the number of convolutions before that."""

    channels: int = 256
    convs: int = 4
    features: int = 1024


@dataclass(frozen=True)
class DETRSize:
    """Widths of the transformer and of its perceptrons, and numbers of layers, heads and queries."""

    dim: int = 256
    inner: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    queries: int = 100


# As smoke_settings.toml has them.
SMALL_RCNN = RCNNSize(channels=64, convs=1, features=32)
SMALL_DETR = DETRSize(dim=32, inner=32, encoder_layers=1, decoder_layers=2, queries=10)


def main(folder: Path) -> None:
    """Write a file for each layout: ResNet-18 but for `mobilenet_v2.pt`, `swin_t.pt` and `simmim.pt` (Swin-T)."""
    torch.save(random_weights(models.mobilenet_v2), folder / "mobilenet_v2.pt")
    resnet = random_weights(models.resnet18)
    torch.save(resnet, folder / "imagenet.pt")
    resnet = {name: tensor for name, tensor in resnet.items() if not name.startswith("fc.")}
    beside = torch.zeros(1)
    torch.save({"state_dict": prefixed(resnet, "module.encoder_q.")}, folder / "moco.pt")
    detco = {**prefixed(resnet, "encoder_q."), "encoder_k.conv1.weight": beside}
    torch.save({"state_dict": detco}, folder / "detco.pt")
    pixpro = {**prefixed(resnet, "module.encoder."), "module.value_transform.weight": beside}
    torch.save({"model": pixpro}, folder / "pixpro.pt")
    torch.save({**prefixed(resnet, "module."), "module.prototypes.weight": beside}, folder / "swav.pt")
    densecl = {**prefixed(resnet, "backbone."), "encoder_q.0.conv1.weight": beside}
    torch.save({"state_dict": densecl}, folder / "densecl.pt")
    slotcon = {**prefixed(resnet, "module.encoder_k."), "module.grouping_k.slot_embed.weight": beside}
    torch.save({"model": slotcon}, folder / "slotcon.pt")
    for name, epoch in (("soco", 400), ("soco_coco", 530)):
        torch.save({"model": soco(resnet, SMALL_RCNN), "epoch": epoch}, folder / f"{name}.pt")
    torch.save({"model": up_detr(resnet, SMALL_DETR), "epoch": 59}, folder / "up_detr.pt")
    torch.save({"model": detreg(resnet, SMALL_DETR, pre_norm=True), "epoch": 59}, folder / "detreg.pt")
    torch.save(random_weights(models.swin_t), folder / "swin_t.pt")
    swin = {official_name(name): tensor for name, tensor in random_weights(models.swin_t).items()}
    torch.save({"model": {**prefixed(swin, "encoder."), "encoder.mask_token": beside}}, folder / "simmim.pt")


def random_weights(build: Callable[[], torch.nn.Module]) -> Tensors:
    """What a network of torchvision begins with, the same each time."""
    torch.manual_seed(0)
    return build().state_dict()


def official_name(name: str) -> str:
    """A tensor of torchvision's Swin as microsoft/Swin-Transformer calls it."""
    name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
    name = name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
    parts = name.split(".")
    if parts[0] != "features":
        return name
    stage, is_merging = divmod(int(parts[1]) - 1, 2)
    return ".".join(["layers", str(stage), "downsample" if is_merging else "blocks", *parts[2:]])


def soco(resnet: Tensors, size: RCNNSize, *, prefix: str = "module.") -> Tensors:
    """A Mask R-CNN as SoCo saves it: twice, with all of it in batch norm, and with what embeds boxes."""
    channels = size.channels
    widths = [len(resnet[f"layer{stage}.0.downsample.0.weight"]) for stage in (2, 3, 4)]
    widths = [widths[0] // 2, *widths]
    parts: dict[str, nn.Module] = {"head.fc1": nn.Linear(channels * 49, size.features)}
    for level, width in enumerate(widths):
        parts[f"neck.lateral_convs.{level}.conv"] = nn.Conv2d(width, channels, 1, bias=False)
        parts[f"neck.fpn_convs.{level}.conv"] = nn.Conv2d(channels, channels, 3, bias=False)
        parts |= {f"neck.{kind}_convs.{level}.bn": nn.BatchNorm2d(channels) for kind in ("lateral", "fpn")}
    for number in range(1, size.convs + 1):
        parts[f"head.conv{number}"] = nn.Conv2d(channels, channels, 3, bias=False)
        parts[f"head.bn{number}"] = nn.BatchNorm2d(channels)
    parts |= {f"projector.{name}": part for name, part in embedder(size.features).items()}
    trained = prefixed(resnet, "encoder.") | state_of(parts)
    copies = {f"{name.partition('.')[0]}_k.{name.partition('.')[2]}": value for name, value in trained.items()}
    predictor = state_of({f"predictor.{name}": part for name, part in embedder(32).items()})
    return prefixed({**trained, **copies, **predictor}, prefix)


def embedder(width: int) -> dict[str, nn.Module]:
    """SoCo's projector, or its predictor."""
    return {"linear1": nn.Linear(width, 48), "bn1": nn.BatchNorm1d(48), "linear2": nn.Linear(48, 32)}


def detr(resnet: Tensors, size: DETRSize, *, classes: int, pre_norm: bool) -> Tensors:
    """A DETR as facebookresearch/detr saves it, whose frozen norms count no batches."""
    dim = size.dim
    shape = (dim, size.heads, size.inner)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(*shape),
        size.encoder_layers,
        norm=nn.LayerNorm(dim) if pre_norm else None,
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*shape), size.decoder_layers, norm=nn.LayerNorm(dim))
    width = len(resnet["layer4.0.downsample.0.weight"])
    parts = {"transformer.encoder": encoder, "transformer.decoder": decoder}
    parts |= {"query_embed": nn.Embedding(size.queries, dim), "input_proj": nn.Conv2d(width, dim, 1)}
    parts |= {"class_embed": nn.Linear(dim, classes + 1), **perceptron("bbox_embed", dim, dim, dim, 4)}
    body = {name: value for name, value in resnet.items() if not name.endswith("num_batches_tracked")}
    return prefixed(body, "backbone.0.body.") | state_of(parts)


def up_detr(resnet: Tensors, size: DETRSize) -> Tensors:
    """What UP-DETR's pre-training saves."""
    width = len(resnet["layer4.0.downsample.0.weight"])
    parts = {"patch2query": nn.Linear(width, size.dim), **perceptron("feature_align", size.dim, size.dim, width)}
    return detr(resnet, size, classes=2, pre_norm=True) | state_of(parts)


def detreg(resnet: Tensors, size: DETRSize, *, pre_norm: bool) -> Tensors:
    """What DETReg's pre-training saves."""
    parts = perceptron("feature_embed", size.dim, size.dim, 2 * size.dim)
    return detr(resnet, size, classes=91, pre_norm=pre_norm) | state_of(parts)


def perceptron(name: str, *widths: int) -> dict[str, nn.Module]:
    """Linear layers as DETR's MLP names them."""
    return {f"{name}.layers.{n}": nn.Linear(*pair) for n, pair in enumerate(zip(widths, widths[1:], strict=False))}


def state_of(parts: dict[str, nn.Module]) -> Tensors:
    """The tensors of modules by their full names."""
    return {f"{name}.{leaf}": value for name, part in parts.items() for leaf, value in part.state_dict().items()}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under longer names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
