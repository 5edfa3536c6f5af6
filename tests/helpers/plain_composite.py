"""A second, plain implementation of a composite's dense links: cell by cell, in Python's floats, as the paper puts it.

Layers of the two backbones are those under test; how the assistant's maps reach the lead is written anew.

Source: Liang et al., CBNet (TIP 2022), equation 6: the input of the lead's stage l is the output of its stage before,
and the sum of g(x^i) over all stages i >= l of the assistant, where g is a 1x1 convolution, a norm and a resizing.
"""

import torch
from torch import Tensor, nn

from aligndet_cli.backbones import CompositeBackbone

Cells = list[list[list[float]]]  # row, column, channel


def cells_of(maps: Tensor) -> Cells:
    return maps.permute(1, 2, 0).tolist()


def project(link: nn.Module, cell: list[float]) -> list[float]:
    """What a link makes of one cell."""
    if isinstance(link, nn.Identity):
        return cell
    conv = link[0] if isinstance(link, nn.Sequential) else link
    rows = conv.weight[:, :, 0, 0].tolist()
    values = [sum(w * v for w, v in zip(row, cell, strict=True)) for row in rows]
    if conv.bias is not None:
        return [value + bias for value, bias in zip(values, conv.bias.tolist(), strict=True)]
    norm = link[1]
    numbers = zip(
        *(getattr(norm, name).tolist() for name in ("running_mean", "running_var", "weight", "bias")), strict=True
    )
    return [
        (value - mean) / (variance + norm.eps) ** 0.5 * scale + shift
        for value, (mean, variance, scale, shift) in zip(values, numbers, strict=True)
    ]


@torch.no_grad()
def lead_maps(backbone: CompositeBackbone, pixels: Tensor) -> list[Tensor]:
    """The lead's maps (1, C, H, W), finest first, of one image (1, 3, H, W)."""
    hidden, of_assistant, inputs = backbone.assistant.begin(pixels), [], []
    for stage in range(4):
        inputs.append(hidden)
        output, hidden = backbone.assistant.run_stage(stage, hidden)
        of_assistant.append(output)
    found = []
    # A Swin's lead begins with the assistant's patches; a ResNet's with its first stage.
    own = 1 if hasattr(backbone.assistant, "layer1") else 0
    found += of_assistant[:own]
    hidden = inputs[own]
    for stage in range(own, 4):
        mine = cells_of(hidden[0])
        height, width = len(mine), len(mine[0])
        total = [[list(cell) for cell in row] for row in mine]
        for number, other in enumerate(of_assistant[stage:]):
            link, theirs = backbone.links[stage][number], cells_of(other[0])
            projected = [[project(link, cell) for cell in row] for row in theirs]
            for y in range(height):
                for x in range(width):
                    cell = projected[y * len(theirs) // height][x * len(theirs[0]) // width]
                    total[y][x] = [a + b for a, b in zip(total[y][x], cell, strict=True)]
        output, hidden = backbone.lead.run_stage(stage, torch.tensor(total).permute(2, 0, 1)[None])
        found.append(output)
    return found
