"""Build the optimizer of a recipe."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Rates

SGD_MOMENTUM = 0.9  # the authors' schedule_1x.py
LARS_TRUST, LARS_EPS = 0.001, 1e-8  # hologerry/SoCo
# Without decay if norms have none; torchvision's names in Swin and ConvNeXt, and timm's.
UNDECAYED = (
    *("relative_position_bias_table", "layer_scale", "gamma", "gamma_1", "gamma_2"),
    *("pos_embed", "pos_embed_window", "cls_token", "reg_token", "dist_token"),
)
BIASES = ("bias", "q_bias", "v_bias")  # the last two of timm's EVA and DINOv3
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are as long as a small share of the weights they change, layer by layer.

    With `trust` t, weights w, gradient g and decay d, the gradient becomes t |w| / (|g| + d |w|) (g + d w). Vectors
    (biases, norms) are neither rescaled nor decayed.

    Source: You et al., 2017, eq. 6; hologerry/SoCo `contrast/lars.py`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, momentum: float = SGD_MOMENTUM, trust: float = LARS_TRUST
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; see `torch.optim.Optimizer`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = self._average(parameter, _rescaled(parameter, parameter.grad, group), group["momentum"])
                    parameter.add_(change, alpha=-group["lr"])
        return loss

    def _average(self, parameter: torch.Tensor, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
        """Return the running sum of gradients, of the shape of the parameter; see `torch.optim.SGD`."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = gradient.clone()
        else:
            state["momentum_buffer"].mul_(momentum).add_(gradient)
        average: torch.Tensor = state["momentum_buffer"]
        return average


def _rescaled(weights: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    if weights.ndim < 2:
        return gradient
    decay = group["weight_decay"]
    length, steepness = weights.norm(), gradient.norm()
    scale = group["trust"] * length / (steepness + decay * length + LARS_EPS)
    scale = torch.where((length > 0) & (steepness > 0), scale, torch.ones_like(scale))
    return (gradient + decay * weights) * scale


def build_optimizer(
    model: nn.Module,
    rates: Rates,
    settings: LoopSettings,
    process: Process,
    layers: Sequence[Sequence[nn.Module]] = (),
) -> torch.optim.Optimizer:
    """Build the recipe's optimizer, with the trainable parameters in groups of one rate and decay.

    A group's `lr_scale` multiplies the learning rate of the step, or `base_lr` if `constant_lr` is set.

    Args:
        layers: of the backbone, whose rates `settings.layer_decay` sets apart; see `Backbone.layers`.

    Source: mmcv `DefaultOptimizerConstructor`; as there, the shift of a norm is not a bias. Its Swin configs find
    norms by name, we by class.
    """
    of_norms = {
        id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    layer_scales = _layer_scales(layers, settings.layer_decay)
    groups: dict[tuple[bool, bool, bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts, is_of_norm = name.split("."), id(parameter) in of_norms
            is_bias = parts[-1] in BIASES and not is_of_norm
            decays = rates.decays_norms or not (is_of_norm or parts[-1] in UNDECAYED)
            is_constant = not set(parts).isdisjoint(rates.constant_lr)
            key = ("backbone" in parts, is_bias, is_constant, decays, layer_scales.get(id(parameter), 1.0))
            groups.setdefault(key, []).append(parameter)
    options = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay * (rates.bias_decay_scale if is_bias else 1.0) * decays,
            "lr_scale": (rates.backbone_lr_scale if is_backbone else 1.0)
            * (rates.bias_lr_scale if is_bias else 1.0)
            * layer_scale,
            "constant_lr": is_constant,
        }
        for (is_backbone, is_bias, is_constant, decays, layer_scale), parameters in groups.items()
    ]
    fused = process.device.startswith("cuda") or None
    if rates.optimizer == "lars":
        return LARS(options, lr=settings.base_lr)
    if rates.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=settings.base_lr, fused=fused)
    return torch.optim.SGD(options, lr=settings.base_lr, momentum=SGD_MOMENTUM, fused=fused)


def _layer_scales(layers: Sequence[Sequence[nn.Module]], layer_decay: float) -> dict[int, float]:
    """Return factors on learning rates by a parameter's id: that of a layer is `layer_decay` times the next one's.

    The last layer already has `layer_decay`, as in the code of ViTDet and of ConvNeXt.
    """
    return {
        id(parameter): layer_decay ** (len(layers) - place)
        for place, layer in enumerate(layers)
        for part in layer
        for parameter in part.parameters()
    }
