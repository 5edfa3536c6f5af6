"""LARS beside what SoCo does: rescale the gradients, then a plain SGD."""

import pytest
import torch
from torch import nn

from aligndet_cli.training.optimizer import LARS


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def test_steps_are_those_of_sgd_on_rescaled_gradients() -> None:
    ours, theirs = layers(), layers()
    lars = LARS(ours.parameters(), lr=0.5)
    lars.param_groups[0]["weight_decay"] = 0.01
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9)
    inputs, wanted = torch.randn(11, 5), torch.randn(11, 3)
    for _ in range(4):
        for model, optimizer in ((ours, lars), (theirs, sgd)):
            optimizer.zero_grad()
            (model(inputs) - wanted).square().mean().backward()
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                length, steepness = float(parameter.detach().norm()), float(parameter.grad.norm())
                share = 0.001 * length / (steepness + 0.01 * length + 1e-8)
                parameter.grad = (parameter.grad + 0.01 * parameter.detach()) * share
        for optimizer in (lars, sgd):
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_step_by_hand() -> None:
    # |w| = 5 and |g| = 10 without decay: a share of 0.001 * 5 / 10 of the gradient, and its whole for a vector.
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    matrix.grad, vector.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([6.0, 8.0])
    optimizer = LARS([matrix, vector], lr=1.0)
    optimizer.step()
    assert matrix.detach()[0].tolist() == pytest.approx([3 - 0.003, 4 - 0.004])
    assert vector.detach().tolist() == [-3.0, -4.0]
    # Weights that are all zero are changed by the gradient as it is.
    zero = nn.Parameter(torch.zeros(1, 2))
    zero.grad = torch.tensor([[1.0, 2.0]])
    LARS([zero], lr=1.0).step()
    assert zero.detach().tolist() == [[-1.0, -2.0]]


def test_a_saved_state_goes_on_alike() -> None:
    model = nn.Linear(3, 2)
    optimizer = LARS(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    other = LARS(model.parameters(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        pair = (one.state[parameter]["momentum_buffer"] for one in (optimizer, other))
        assert torch.equal(*pair)
