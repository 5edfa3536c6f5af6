"""The moving average of the weights, against a few lines of plain numbers."""

import pytest
import torch
from torch import nn

from aligndet_cli.training.average import MovingAverage, decay_at


def test_the_decay_rises_to_what_was_asked_for() -> None:
    # (1 + t) / (10 + t): 1/10, 2/11, ..., 91/100, and from t = 90 on 0.91 would be passed.
    assert [decay_at(step, 0.91) for step in (0, 1, 90, 91, 10_000)] == [0.1, 2 / 11, 0.91, 0.91, 0.91]


def test_weights_and_statistics_are_averaged_and_counters_copied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
    average = MovingAverage(model, 0.99)
    expected_weight, expected_mean = 0.0, 0.0
    for step in range(5):
        with torch.no_grad():
            model[0].weight.fill_(step + 1.0)
            model[1].running_mean.fill_(10.0 * step)
            model[1].num_batches_tracked += 1
        average.update(step)
        decay = (1 + step) / (10 + step)
        expected_weight = decay * expected_weight + (1 - decay) * (step + 1.0)
        expected_mean = decay * expected_mean + (1 - decay) * 10.0 * step
    assert average.model[0].weight[0, 0].item() == pytest.approx(expected_weight)
    assert average.model[1].running_mean[0].item() == pytest.approx(expected_mean)
    assert average.model[1].num_batches_tracked.item() == 5


def test_what_is_frozen_stays_as_it_is_to_the_bit() -> None:
    model = nn.Linear(50, 50)
    average = MovingAverage(model, 0.999)
    for step in range(300):
        average.update(step)
    assert torch.equal(average.model.weight, model.weight)


def test_it_is_neither_trained_nor_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    average = MovingAverage(model, 0.9)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not average.model.training and model.training


def test_its_state_continues_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    first = MovingAverage(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    first.update(0)
    second = MovingAverage(model, 0.9)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model.weight.add_(1.0)
    for average in (first, second):
        average.update(1)
    assert torch.equal(first.model.weight, second.model.weight)
