"""Random backbone weights in published layouts, for the scripts of the paper's tables with SMOKE=1."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import models

Tensors = dict[str, Tensor]


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
    soco = {**prefixed(resnet, "module.encoder."), "module.predictor.linear1.weight": beside}
    torch.save({"model": soco}, folder / "soco.pt")
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


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under longer names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
