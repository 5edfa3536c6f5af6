"""The methods of `pretrain-image`, one file each."""

from dataclasses import dataclass

from aligndet_cli.backbones import Backbone
from aligndet_cli.backbones.teacher import Teacher
from aligndet_cli.pretrain_image.config import PretrainImageConfig
from aligndet_cli.pretrain_image.method import ImageMethod
from aligndet_cli.pretrain_image.methods.byol import BYOL
from aligndet_cli.pretrain_image.methods.dense_cl import DenseCL
from aligndet_cli.pretrain_image.methods.distill import Distill
from aligndet_cli.pretrain_image.methods.moco import MoCo
from aligndet_cli.pretrain_image.methods.pixpro import PixPro
from aligndet_cli.pretrain_image.methods.simsiam import SimSiam
from aligndet_cli.pretrain_image.methods.supervised import Supervised
from aligndet_cli.pretrain_image.recipes import RECIPES


@dataclass(frozen=True)
class Inputs:
    """Parts that a method is built from, beside the settings of the stage and the backbone.

    Attributes:
        queue_size: of methods with a queue.
        num_classes: of the images, 0 without classes.
        teacher: of `distill`.
    """

    queue_size: int
    num_classes: int
    teacher: Teacher | None


def build_method(config: PretrainImageConfig, backbone: Backbone, inputs: Inputs) -> ImageMethod:
    """Build the method that the settings name around a backbone, which it trains in place."""
    recipe = RECIPES[config.method]
    dim, hidden_dim = config.embedding_dim or recipe.embedding_dim, config.hidden_dim or recipe.hidden_dim
    match config.method:
        case "simsiam":
            return SimSiam(backbone, embedding_dim=dim, bottleneck_dim=max(dim // 4, 1))
        case "moco-v2":
            return MoCo(backbone, embedding_dim=dim, queue_size=inputs.queue_size, temperature=config.temperature)
        case "dense-cl":
            return DenseCL(backbone, embedding_dim=dim, queue_size=inputs.queue_size, temperature=config.temperature)
        case "byol":
            return BYOL(backbone, embedding_dim=dim, hidden_dim=hidden_dim)
        case "pixpro":
            return PixPro(backbone, embedding_dim=dim, hidden_dim=hidden_dim)
        case "distill":
            assert inputs.teacher is not None, "prepare has checked it"
            return Distill(backbone, inputs.teacher.build())
        case "supervised":
            return Supervised(backbone, num_classes=inputs.num_classes)
