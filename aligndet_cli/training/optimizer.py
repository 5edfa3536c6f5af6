"""Build the optimizer of a recipe."""

import torch
from torch import nn

from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Rates

SGD_MOMENTUM = 0.9  # the authors' schedule_1x.py
# Without decay if norms have none; torchvision's names in Swin and ConvNeXt, and timm's.
UNDECAYED = ("relative_position_bias_table", "layer_scale", "gamma", "pos_embed", "cls_token", "reg_token")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, rates: Rates, settings: LoopSettings, process: Process) -> torch.optim.Optimizer:
    """Build the recipe's optimizer, with the trainable parameters in groups by backbone, bias, constant rate and decay.

    A group's `lr_scale` multiplies the learning rate of the step, or `base_lr` if `constant_lr` is set.

    Source: mmcv `DefaultOptimizerConstructor`; as there, the shift of a norm is not a bias. Its Swin configs find
    norms by name, we by class.
    """
    of_norms = {
        id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    groups: dict[tuple[bool, bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts, is_of_norm = name.split("."), id(parameter) in of_norms
            is_bias = parts[-1] == "bias" and not is_of_norm
            decays = rates.decays_norms or not (is_of_norm or parts[-1] in UNDECAYED)
            key = ("backbone" in parts, is_bias, not set(parts).isdisjoint(rates.constant_lr), decays)
            groups.setdefault(key, []).append(parameter)
    options = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay * (rates.bias_decay_scale if is_bias else 1.0) * decays,
            "lr_scale": (rates.backbone_lr_scale if is_backbone else 1.0) * (rates.bias_lr_scale if is_bias else 1.0),
            "constant_lr": is_constant,
        }
        for (is_backbone, is_bias, is_constant, decays), parameters in groups.items()
    ]
    fused = process.device.startswith("cuda") or None
    if rates.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=settings.base_lr, fused=fused)
    return torch.optim.SGD(options, lr=settings.base_lr, momentum=SGD_MOMENTUM, fused=fused)
