"""Settings of `pretrain-image`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.backbones.build import WEIGHTS_FILE
from aligndet_cli.config import Side, StageConfig
from aligndet_cli.data.loaders import OnError
from aligndet_cli.pretrain_image.recipes import MethodName
from aligndet_cli.training.settings import TrainingConfig


class ImageTrainingConfig(TrainingConfig):
    """Length and optimizer. None: the recipe of the method."""

    # auto: fewer where images are few
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Images per step over all processes; auto takes the method's."
    )


class PretrainImageConfig(StageConfig):
    """Settings of `pretrain-image`; defaults are those of each method's paper, see `recipes.py`."""

    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"teacher"}  # an input with a hash of its own

    method: MethodName = Field("simsiam", description="Method; supervised needs images in one folder per class.")
    # Its weights are those to start from; "auto" starts from nothing.
    backbone: BackboneConfig = BackboneConfig()
    teacher: Annotated[str | None, WEIGHTS_FILE] = Field(
        None, description="Network that distill learns from: a file of weights, or timm:NAME (none)."
    )
    image_size: Side = Field(224, description="Side of the square views in pixels.")
    min_area: float | None = Field(None, gt=0, le=1, description="Smallest crop as a share of the image (by method).")
    optimizer: Literal["sgd", "lars", "adamw"] | None = Field(
        None, description="Optimizer (the method's, or AdamW for short runs)."
    )
    embedding_dim: int | None = Field(None, ge=1, description="Width of an embedding (by method).")
    hidden_dim: int | None = Field(None, ge=1, description="Hidden width of byol's and pixpro's perceptrons (4096).")
    queue_size: int | None = Field(
        None, ge=1, description="Length of the queue of moco-v2 and dense-cl (65536, less for few images)."
    )
    temperature: float = Field(0.2, gt=0, description="Temperature of the contrastive loss of moco-v2 and dense-cl.")
    momentum: float | None = Field(
        None, ge=0, le=1, description="Momentum of the averaged backbone (by method, less in short runs)."
    )
    on_error: OnError = Field("skip", description="Reaction to an image that cannot be read.")
    training: ImageTrainingConfig = ImageTrainingConfig()
