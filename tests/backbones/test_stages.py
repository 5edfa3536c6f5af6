"""Every family of backbones under detectors, and through the commands."""

from pathlib import Path

import pytest
import torch
from torchvision.models import get_model
from torchvision.models.swin_transformer import SwinTransformer

from aligndet_cli.backbones import Backbone, BackboneConfig, build_backbone
from aligndet_cli.backbones.swin import SIZES, Size
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from helpers.commandline import CHAIN, NECK, RESOLUTION, aligndet
from helpers.small_detectors import SMALL


@pytest.fixture(
    scope="module", params=["mobilenet_v2", "swin_t", "convnext_tiny", "efficientnet_b0", "efficientnet_lite0"]
)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=request.param))


@pytest.mark.parametrize("family", ["mask-rcnn", "retinanet", "detr"])  # c2..c5, c3..c5 and c5 alone
def test_losses_reach_every_trainable_parameter(backbone: Backbone, family: str) -> None:
    backbone.freeze(-1, norm_eval=False)
    model = SMALL[family].build(backbone, 3)
    model.zero_grad(set_to_none=True)
    targets = [BoxTargets(torch.tensor([[8.0, 8, 40, 50]]), torch.tensor([1]), torch.tensor([i])) for i in range(2)]
    losses = model(ImageBatch(torch.randn(2, 3, 64, 64), ((61, 64), (64, 50))), targets)
    sum(loss for name, loss in losses.items()).backward()
    # Processes that train together wait for the gradient of every parameter that is to be trained.
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin_t", "convnext_tiny"])
def test_the_commands_run_on_every_family(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Run image pre-training, box pre-training on its weights, and fine-tuning, for one step each."""
    size = Size(16, (2, 1, 1, 1), (1, 2, 4, 8))
    monkeypatch.setitem(SIZES, "swin_t", size)
    workspace = tmp_path / "w"
    aligndet("proposals", toy, "-w", workspace, *CHAIN["proposals"])
    words = ("-w", workspace, "--backbone", name, "--steps", "1", "--batch-size", "2", "-q")
    aligndet("pretrain-image", toy, *words, "--method", "moco-v2", "--set", "image_size=32")
    weights = torch.load(workspace / "pretrain-image" / f"moco-v2-{name}" / "weights.pt", weights_only=True)
    reference = (
        SwinTransformer([4, 4], size.width, list(size.depths), list(size.num_heads), [7, 7])
        if name == "swin_t"
        else get_model(name)
    )
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    # the classifier's, and of ConvNeXt the norm before it
    assert unexpected == [] and len(missing) == (4 if name == "convnext_tiny" else 2)
    detector = ("--detector", "retinanet", *NECK, *RESOLUTION)
    aligndet("pretrain-box", *words, *detector, "--backbone-weights", "workspace")
    ran = aligndet("finetune", *words, *detector, "--json").json()
    assert ran["result"]["init"] == "pretrain" and ran["result"]["matched_share"] == 1
    trained = torch.load(workspace / "finetune" / f"retinanet-{name}" / "weights.pt", weights_only=True)
    assert trained["backbone"]["name"] == name
