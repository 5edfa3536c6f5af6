import math

import torch
from torchvision.ops import sigmoid_focal_loss


def test_focal_loss_of_torchvision_is_the_papers() -> None:
    # p = 0.2 and a positive: -0.25 * 0.8^2 * ln 0.2; the same p and a negative: -0.75 * 0.2^2 * ln 0.8.
    logit = torch.full((2,), math.log(0.2 / 0.8))
    loss = sigmoid_focal_loss(logit, torch.tensor([1.0, 0.0]), alpha=0.25, gamma=2)
    expected = [-0.25 * 0.64 * math.log(0.2), -0.75 * 0.04 * math.log(0.8)]
    torch.testing.assert_close(loss, torch.tensor(expected))
