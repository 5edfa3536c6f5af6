"""The perceptron of methods that follow BYOL, and the momentum copies that move behind what is trained."""

from collections.abc import Iterable

import torch
from torch import nn


def build_projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build the projector or predictor of BYOL: a hidden layer with batch norm and ReLU, and a linear one."""
    hidden = nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)
    return nn.Sequential(*hidden, nn.Linear(hidden_dim, out_dim))


@torch.no_grad()
def follow(pairs: Iterable[tuple[nn.Module, nn.Module]], coefficient: float) -> None:
    """Move momentum copies towards the trained modules: k = m * k + (1 - m) * q.

    Only parameters: norm statistics come from the copies' own forward passes. What is frozen, or shared by both, stays.

    Args:
        pairs: trained module and its copy.
        coefficient: m.
    """
    moved = [
        (k, q)
        for module, copied in pairs
        for k, q in zip(copied.parameters(), module.parameters(), strict=True)
        if k is not q and q.requires_grad
    ]
    if moved:
        torch._foreach_lerp_([k for k, _ in moved], [q for _, q in moved], 1.0 - coefficient)
