import torch

from aligndet_cli.detectors.parts.matching import BACKGROUND, IGNORED
from aligndet_cli.detectors.parts.sampling import sample_positives_first


def test_sampling_takes_positives_first() -> None:
    matched = torch.tensor([BACKGROUND, 3, IGNORED, BACKGROUND, 0, BACKGROUND])
    assert sample_positives_first(matched, 100).tolist() == [1, 4, 0, 3, 5]
    three = sample_positives_first(matched, 3).tolist()
    assert three[:2] == [1, 4] and three[2] in (0, 3, 5)
    assert set(sample_positives_first(matched, 1).tolist()) < {1, 4}


def test_sampling_limits_the_share_of_positives() -> None:
    matched = torch.tensor([0, 1, 2, BACKGROUND, BACKGROUND, BACKGROUND, 3, IGNORED])
    chosen = sample_positives_first(matched, 5, positive_fraction=0.5).tolist()  # 2 of 4 positives, all background
    assert set(chosen[:2]) < {0, 1, 2, 6} and sorted(chosen[2:]) == [3, 4, 5]


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[sample_positives_first(torch.full((10,), BACKGROUND), 3)] += 1
    # 600 expected each, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert (counts - 600).abs().max() < 5 * 20.5
