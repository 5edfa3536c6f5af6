"""The semantic branch: sizes of its maps, pixels without a class, and RoIs on it."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from aligndet_cli.data.batch import NO_CLASS, BoxTargets
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.roi_head import Pyramid, pool_rois, pool_semantic, to_rois
from aligndet_cli.detectors.parts.semantic_head import SemanticHead, semantic_loss

# P2..P6 of images of 64 x 96 pixels
LEVELS = [torch.rand(2, 4, -(-64 // stride), -(-96 // stride)) for stride in (4, 8, 16, 32, 64)]


def targets_of(classes: torch.Tensor) -> list[BoxTargets]:
    none = torch.zeros(0, dtype=torch.int64)
    return [BoxTargets(torch.zeros(0, 4), none, pixel_classes=of_image) for of_image in classes]


def test_pixels_without_a_class_do_not_count() -> None:
    head = SemanticHead(4, 3)
    features, logits = head(LEVELS)
    assert features.shape == (2, 4, 8, 12) and logits.shape == (2, 3, 8, 12)
    none = torch.full((2, 64, 96), NO_CLASS, dtype=torch.uint8)
    loss = semantic_loss(logits, targets_of(none))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in head.logits.parameters())
    # One pixel of those that are looked at, and its neighbours, which are not.
    one = none.clone()
    one[1, 8:16, 16:24] = 0
    one[1, 8, 16] = 2
    expected = -logits[1, :, 1, 2].log_softmax(dim=0)[2]
    torch.testing.assert_close(semantic_loss(logits, targets_of(one)), expected)


@pytest.mark.parametrize("size", [14, 7, 3])
def test_features_are_added_to_the_roi_that_they_belong_to(size: int) -> None:
    """Also where RoIs of several levels and images come in another order than they were given."""
    config, semantic = RCNNConfig(), torch.rand(2, 4, 8, 12)
    rois = to_rois(
        [torch.tensor([[3.0, 3, 203, 180], [5, 6, 25, 30]]), torch.tensor([[0.0, 0, 20, 20], [1, 1, 90, 63]])]
    )
    plain, row = pool_rois(LEVELS, rois, size, config)
    pooled, same_row = Pyramid(LEVELS, semantic).pool(rois, size, config)
    assert torch.equal(row, same_row) and not torch.equal(row, torch.arange(4))
    alone = [adaptive_avg_pool2d(pool_semantic(semantic, rois[i : i + 1], 14, config), size) for i in range(4)]
    torch.testing.assert_close(pooled[row], plain[row] + torch.cat(alone))
