"""The pretext task of AlignDet for all detectors: projector, momentum copy, losses, update."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torchvision.ops import StochasticDepth

from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.interface import ASSISTANT_WEIGHT, BoxCandidates, Features, weigh_assistant
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.pretrain_box.contrastive import contrastive_loss
from aligndet_cli.training.embeddings import HEAD_PREFIX, embedding_health
from aligndet_cli.training.projector import follow
from aligndet_cli.training.recipe import ProjectorRecipe, Recipe

Tasks = Literal["both", "contrastive", "regression"]
PROJECTOR_STD = 0.01  # the authors' heads: `init_cfg` of RetinaNet and FCOS, mmdetection's class predictor in R-CNN
View = tuple[ImageBatch, Sequence[BoxTargets]]


class Projector(nn.Module):
    """Two-layer MLP from classification features to embeddings, with an output layer per slot.

    Args:
        recipe: width of the hidden layer, and initial weights.
        num_slots: number of candidates at one location, which must not share an embedding (RetinaNet: 9 anchors).

    Source: AlignDet §3.2; sizes and initial weights as in the authors' heads, see `ProjectorRecipe`. Their FCOS has a
        3x3 convolution for the hidden layer; ours looks at the sampled points alone.
    """

    def __init__(self, in_dim: int, recipe: ProjectorRecipe, out_dim: int, num_slots: int) -> None:
        super().__init__()
        self.out_dim, self.num_slots = out_dim, num_slots
        self.hidden = nn.Linear(in_dim, recipe.hidden_dim)
        self.output = nn.Linear(recipe.hidden_dim, num_slots * out_dim)  # row slot * out_dim + d
        if recipe.start == "torch":
            return
        for layer in (self.hidden, self.output):
            if recipe.start == "normal":
                nn.init.normal_(layer.weight, std=PROJECTOR_STD)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, slots: Tensor) -> Tensor:
        """Return (S, D) L2-normalised float32 embeddings of (S, C) features with (S,) int64 slots."""
        hidden = self.hidden(features).relu()  # (S, hidden)
        if self.num_slots == 1:
            return normalize(self.output(hidden).float(), dim=1)
        # Grouped by slot, so that each row meets only its own (D, hidden) part of the output layer.
        order = slots.argsort(stable=True)
        counts = (slots[:, None] == torch.arange(self.num_slots, device=slots.device)).sum(dim=0).tolist()
        weights = self.output.weight.view(self.num_slots, self.out_dim, -1)
        biases = self.output.bias.view(self.num_slots, self.out_dim)
        parts = hidden[order].split(counts)
        outputs = torch.cat([linear(part, weights[slot], biases[slot]) for slot, part in enumerate(parts)])
        return normalize(outputs[order.argsort()].float(), dim=1)


class BoxPretext(nn.Module):
    """Online detector and projector, their momentum copies, and the losses between two views of images.

    The backbone of the detector is frozen and shared by both sides unless `freeze_backbone` is False.

    Args:
        detector: trained in place; its neck and head are the result of the stage.
        recipe: recipe of the detector's family.
        temperature: tau of the contrastive loss.
        tasks: losses that are used; modules that only the other task trains are frozen.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        recipe: Recipe,
        embedding_dim: int,
        projector: ProjectorRecipe,
        temperature: float,
        tasks: Tasks,
        freeze_backbone: bool,
    ) -> None:
        super().__init__()
        self.temperature, self.tasks, self.freeze_backbone = temperature, tasks, freeze_backbone
        self.momentum_follows = recipe.momentum_follows
        self.online = detector
        projectors = [
            Projector(detector.feature_dim, projector, embedding_dim, detector.num_slots) for _ in detector.head_weights
        ]
        self.projector = projectors[0] if len(projectors) == 1 else nn.ModuleList(projectors)
        untrained = [*detector.fresh_modules]
        if not (recipe.needs_clusters or detector.trains_objectness) or tasks == "contrastive":
            untrained += ["class_predictor"]
        if freeze_backbone:
            untrained += ["backbone"]
        if tasks == "contrastive":
            untrained += detector.box_branch
        if tasks == "regression":
            untrained += () if detector.trains_objectness else detector.class_branch
            _freeze(self.projector)
        _freeze(*(detector.get_submodule(name) for name in untrained))
        # A memo entry makes deepcopy keep the frozen backbone shared instead of copying it.
        memo = {id(detector.backbone): detector.backbone} if freeze_backbone else {}
        self.momentum = copy.deepcopy(detector, memo)
        self.momentum_projector = copy.deepcopy(self.projector)
        _freeze(self.momentum, self.momentum_projector)
        self.train()

    def train(self, mode: bool = True) -> "BoxPretext":
        """Set training mode, except for a frozen backbone, whose norms keep their statistics, and momentum dropout.

        The momentum side is the reference for the online side, so it goes without the noise of dropout. The official
        code has dropout on both sides (docs/differences.md 17).
        """
        super().train(mode)
        if self.freeze_backbone:
            self.online.backbone.eval()
        for module in self.momentum.modules():
            if isinstance(module, nn.Dropout | nn.MultiheadAttention | StochasticDepth):
                module.eval()
        return self

    def forward(
        self, online_view: View, momentum_view: View, *, with_health: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scalar losses of the pretext task, and scalars that are only logged, by name.

        Args:
            online_view: B images, and their proposals, (N, 4) xyxy in pixels of each image, in view 1; instance ids
                are unique in the batch.
            momentum_view: the same images and proposals in view 2.
            with_health: also return spread and effective rank of the online embeddings.

        With several heads, each has a contrast of its own; the loss is their sum by `Detector.head_weights`. So it is
        for each of two pyramids, of a composite's assistant and of its lead; those of the assistant are weighted once
        more, and come first in the numbers.

        Source: Algorithm 1; view 1 always goes through the online side, as in the official code.
        """
        (online_images, proposals), (momentum_images, momentum_proposals) = online_view, momentum_view
        if self.tasks == "regression":
            features = self._extract_online(online_images)
            found = self.online.all_candidates(features, proposals, with_losses=True)
            return weigh_assistant([one.losses for one in found]), {}
        features, momentum_features = self._extract(online_images, momentum_images)
        # The momentum side comes first, so that its memory is free again when the online side keeps its activations.
        with torch.no_grad():
            momentum = self.momentum.all_candidates(momentum_features, momentum_proposals, with_losses=False)
            keys = [pair for one in momentum for pair in embed(self.momentum_projector, one)]
        online = self.online.all_candidates(features, proposals, with_losses=self.tasks == "both")
        queries = [pair for one in online for pair in embed(self.projector, one)]
        with torch.autocast(online[-1].features.device.type, enabled=False):
            contrasts = [
                contrastive_loss(*query, *key, temperature=self.temperature)
                for query, key in zip(queries, keys, strict=True)
            ]
        healths = [embedding_health(embeddings.detach()) if with_health else {} for embeddings, _ in queries]
        shown = [contrast.shown() | health for contrast, health in zip(contrasts, healths, strict=True)]
        losses = [contrast.loss for contrast in contrasts]
        pyramids = (ASSISTANT_WEIGHT, 1.0) if len(online) == 2 else (1.0,)
        weights = [of_pyramid * of_head for of_pyramid in pyramids for of_head in self.online.head_weights]
        loss, numbers = _of_all_heads(losses, shown, weights)
        return {"loss_contrastive": loss, **weigh_assistant([one.losses for one in online])}, numbers

    @torch.no_grad()
    def update_momentum(self, coefficient: float) -> None:
        """Move the momentum parameters towards the online ones, see `follow`; those in `momentum_follows` are copied.

        Only parameters, as in the official hook.
        """
        follow([(self.online, self.momentum), (self.projector, self.momentum_projector)], coefficient)
        for name in self.momentum_follows:
            self.momentum.get_parameter(name).copy_(self.online.get_parameter(name))

    def _extract(self, online: ImageBatch, momentum: ImageBatch) -> tuple[Features, Features]:
        """Return the features of both views; a frozen backbone takes both at once if their shapes are equal."""
        if not self.freeze_backbone:
            with torch.no_grad():
                momentum_features = self.momentum.extract(momentum, with_assistant=True)
            return self.online.extract(online, with_assistant=True), momentum_features
        if online.pixels.shape != momentum.pixels.shape:
            return self._extract_online(online), self._extract_online(momentum)
        both = ImageBatch(torch.cat([online.pixels, momentum.pixels]), online.sizes_hw + momentum.sizes_hw)
        return self._extract_online(both).split(len(online.sizes_hw))

    def _extract_online(self, images: ImageBatch) -> Features:
        # Not inference mode, since the neck saves these maps for its weight gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.online.extract(images, with_assistant=True)


def embed(projector: nn.Module, candidates: BoxCandidates) -> list[tuple[Tensor, Tensor]]:
    """Return the (S, D) embeddings and (S,) instance ids of the candidates of each head.

    Args:
        projector: a `Projector`, or the list of those of several heads.
        candidates: of one view.
    """
    projectors = projector if isinstance(projector, nn.ModuleList) else [projector]
    counts = candidates.num_per_head or (len(candidates.features),)
    parts = (part.split(counts) for part in (candidates.features, candidates.slots, candidates.instance_ids))
    return [(of_head(features, slots), ids) for of_head, features, slots, ids in zip(projectors, *parts, strict=True)]


def _of_all_heads(
    losses: Sequence[Tensor], shown: Sequence[dict[str, Tensor]], weights: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the heads' losses, and numbers to log: their means, and with a prefix those of a head.

    The chance level is summed as the losses are.
    """
    if len(losses) == 1:
        return losses[0], shown[0]
    shares = send(weights, losses[0].device)
    means = {
        name: (torch.stack([numbers[name].float() for numbers in shown]) * shares).sum()
        / (1.0 if name == "chance" else sum(weights))
        for name in shown[0]
    }
    of_heads = {
        f"{HEAD_PREFIX}{number}_{name}": value
        for number, (loss, numbers) in enumerate(zip(losses, shown, strict=True), start=1)
        for name, value in {"loss_contrastive": loss.detach(), **numbers}.items()
    }
    return (torch.stack(list(losses)) * shares).sum(), means | of_heads


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)
