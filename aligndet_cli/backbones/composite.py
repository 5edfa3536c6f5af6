"""Two copies of a backbone, of which the first one's maps lead the second: CBNet v2.

Source: Liang et al., "CBNet: A Composite Backbone Network Architecture for Object Detection", TIP 2022, with dense
higher-level composition, and its released code: a Swin's link is a 1x1 convolution, or the map itself where the width
stays, so that link works from the start; a ResNet's is a 1x1 convolution with a batch norm that keeps its statistics,
and its lead takes the first stage over from the assistant, as in `faster_rcnn_cbv2d1_r50_fpn_1x_coco`.
"""

from typing import Self

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

from aligndet_cli.backbones.interface import ASSISTANT, COMPOSITE, Backbone, StagedBackbone

# Number of the first stage that the lead has of its own.
_FIRST_OF_LEAD = {"resnet": 1, "swin": 0}


class CompositeBackbone(Backbone):
    """An assistant and a lead, whose stages also get what the assistant has made at their level and above.

    Args:
        assistant, lead: two backbones of one kind; the lead loses what it takes over from the assistant.
    """

    def __init__(self, assistant: StagedBackbone, lead: StagedBackbone) -> None:
        super().__init__(f"{COMPOSITE}{assistant.name}", assistant.channels)
        self.family, self.classifier = assistant.family, assistant.classifier
        self.first_of_lead = _FIRST_OF_LEAD[assistant.family]
        widths = list(assistant.channels.values())
        places = range(len(widths))
        links = [
            [_link(width, lead.input_width(place), with_norm=lead.family == "resnet") for width in widths[place:]]
            if place >= self.first_of_lead
            else []
            for place in places
        ]
        _drop(lead, [*lead.stem(), *(part for stage in lead.stages()[: self.first_of_lead] for part in stage)])
        self.assistant, self.lead = assistant, lead
        # links[i][j]: from the assistant's map of level i + j to the input of the lead's stage i
        self.links = nn.ModuleList(nn.ModuleList(of_stage) for of_stage in links)

    def forward(self, pixels: Tensor, *, with_assistant: bool = False) -> dict[str, Tensor]:
        """Return the maps of the lead (B, C, H, W) by level; see `Backbone.forward`.

        Args:
            with_assistant: also return the assistant's, by `ASSISTANT` and level.
        """
        hidden = self.assistant.begin(pixels)
        start, maps = hidden, []
        for place in range(len(self.channels)):
            if place == self.first_of_lead:
                start = hidden
            one, hidden = self.assistant.run_stage(place, hidden)
            maps.append(one)
        hidden, of_lead = start, maps[: self.first_of_lead]
        for place in range(self.first_of_lead, len(self.channels)):
            one, hidden = self.lead.run_stage(place, self._linked(place, maps, hidden))
            of_lead.append(one)
        by_level = dict(zip(self.channels, of_lead, strict=True))
        if with_assistant:
            by_level |= {ASSISTANT + level: one for level, one in zip(self.channels, maps, strict=True)}
        return by_level

    def _linked(self, place: int, maps: list[Tensor], hidden: Tensor) -> Tensor:
        """Return the input of a stage of the lead (B, C, H, W) with what the assistant's maps add to it."""
        links, size = self.links[place], hidden.shape[-2:]
        assert isinstance(links, nn.ModuleList)
        for link, one in zip(links, maps[place:], strict=True):
            part = link(one)
            hidden = hidden + (part if part.shape[-2:] == size else interpolate(part, size, mode="nearest"))
        return hidden

    def stem(self) -> list[nn.Module]:
        """Return the stem of the assistant; the lead has none."""
        return self.assistant.stem()

    def stages(self) -> list[list[nn.Module]]:
        """Return the stages of both; links belong to none, so they train whatever is frozen, as in CBNet."""
        pairs = zip(self.assistant.stages(), self.lead.stages(), strict=True)
        return [[*of_assistant, *of_lead] for of_assistant, of_lead in pairs]

    def only_for(self, level: str) -> list[nn.Module]:
        """Return the modules of the lead that only this level needs; links need all of the assistant."""
        return self.lead.only_for(level)

    def fix_norms(self) -> None:
        """Fix the norms of both backbones; those of links train on: they begin at zero, so fixed ones link nothing."""
        super().fix_norms()
        self.links.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `Backbone` does, but keep the norms of links in eval mode."""
        super().train(mode)
        for module in self.links.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def _link(in_width: int, width: int, *, with_norm: bool) -> nn.Module:
    """Build a link, which adds nothing at first unless it is the map itself."""
    if with_norm:
        norm = nn.BatchNorm2d(width)
        nn.init.zeros_(norm.weight)
        return nn.Sequential(nn.Conv2d(in_width, width, 1, bias=False), norm)
    if in_width == width:
        return nn.Identity()
    conv = nn.Conv2d(in_width, width, 1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _drop(network: nn.Module, parts: list[nn.Module]) -> None:
    """Put nothing in the place of some modules of a network."""
    for name, module in list(network.named_modules()):
        if any(module is part for part in parts):
            network.set_submodule(name, nn.Identity())
