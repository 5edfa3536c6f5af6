"""SimSiam: each view predicts the embedding of the other, which gets no gradient."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from aligndet_cli.backbones import Backbone
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View, embed
from aligndet_cli.training.embeddings import embedding_health


class SimSiam(ImageMethod):
    """Backbone, projector and predictor.

    Args:
        backbone: trained in place.
        embedding_dim: D of the projector and predictor.
        bottleneck_dim: hidden width of the predictor.

    Source: Chen & He, CVPR 2021, Algorithm 1 and official code: a 3-layer projector as wide as the backbone, batch
        norm in all its layers, the last without scale and shift; a 2-layer predictor.
    """

    def __init__(self, backbone: Backbone, *, embedding_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        width = backbone.channels["c5"]
        self.backbone = backbone
        self.projector = nn.Sequential(
            *_hidden(width, width),
            *_hidden(width, width),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )
        self.predictor = nn.Sequential(
            *_hidden(embedding_dim, bottleneck_dim), nn.Linear(bottleneck_dim, embedding_dim)
        )

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of two views, (B, 3, S, S) each, -1 at best; classes are not used."""
        first, second = (self.projector(embed(self.backbone, view.pixels)) for view in views)  # (B, D)
        loss = simsiam_loss(self.predictor(first), second, self.predictor(second), first)
        return {"loss_similarity": loss}, embedding_health(normalize(first.detach().float())) if with_health else {}


def simsiam_loss(predicted_of_second: Tensor, second: Tensor, predicted_of_first: Tensor, first: Tensor) -> Tensor:
    """Return the negative cosine similarity, a mean over both directions; `first` and `second` get no gradient.

    All are (B, D): the embeddings of each view, and their predictions from the other view.

    Source: SimSiam eqs. 1-2.
    """
    forth = cosine_similarity(predicted_of_second.float(), second.detach().float(), dim=1).mean()
    back = cosine_similarity(predicted_of_first.float(), first.detach().float(), dim=1).mean()
    return -(forth + back) / 2


def _hidden(in_dim: int, out_dim: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU(inplace=True)
