"""Classification of the image by a linear layer on the pooled features."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from aligndet_cli.backbones import Backbone
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View, embed
from aligndet_cli.training.embeddings import embedding_health


class Supervised(ImageMethod):
    """Backbone and classifier of `num_classes`."""

    def __init__(self, backbone: Backbone, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.channels["c5"], num_classes)

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the cross-entropy of one view for class ids (B,)."""
        assert class_ids is not None, "prepare asks for classes"
        features = embed(self.backbone, views[0].pixels)
        logits = self.fc(features).float()  # (B, K)
        shown = {
            "chance": logits.new_tensor(float(logits.shape[1])).log(),
            "accuracy": (logits.detach().argmax(dim=1) == class_ids).float().mean(),
        }
        if with_health:
            shown |= embedding_health(normalize(features.detach().float(), dim=1))
        return {"loss_cls": cross_entropy(logits, class_ids)}, shown
