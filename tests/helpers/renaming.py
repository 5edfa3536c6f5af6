"""Weights under other names, as other libraries save them."""

from torch import Tensor

Tensors = dict[str, Tensor]


def renamed(weights: Tensors, *words: tuple[str, str]) -> Tensors:
    """Replace each word of the tensors' names by its partner, one after the other."""
    found = {}
    for name, value in weights.items():
        for word, other in words:
            name = name.replace(word, other)
        found[name] = value
    return found
