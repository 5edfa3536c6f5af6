import torch

from aligndet_cli.detectors.parts.matching import BACKGROUND, IGNORED
from aligndet_cli.detectors.parts.sampling import Samples, places_in_rows, sample_each_image


def sample(*rows: list[int], num: int, fraction: float = 1.0) -> Samples:
    return sample_each_image(torch.tensor(rows), num, positive_fraction=fraction)


def test_sampling_takes_positives_first() -> None:
    matched = [BACKGROUND, 3, IGNORED, BACKGROUND, 0, BACKGROUND]
    assert sample(matched, num=100).places[0].tolist() == [1, 4, 0, 3, 5]
    three = sample(matched, num=3).places[0].tolist()
    assert three[:2] == [1, 4] and three[2] in (0, 3, 5)
    assert set(sample(matched, num=1).places[0].tolist()) < {1, 4}


def test_sampling_limits_the_share_of_positives() -> None:
    matched = [0, 1, 2, BACKGROUND, BACKGROUND, BACKGROUND, 3, IGNORED]
    samples = sample(matched, num=5, fraction=0.5)  # 2 of 4 positives, all background
    chosen = samples.places[0].tolist()
    assert set(chosen[:2]) < {0, 1, 2, 6} and sorted(chosen[2:]) == [3, 4, 5]
    assert samples.num_positives == [2] and samples.sampled_positives()[0].tolist() == chosen[:2]
    assert samples.positives[0].tolist() == [0, 1, 2, 6]


def test_images_are_sampled_one_by_one() -> None:
    samples = sample([0, BACKGROUND, IGNORED], [BACKGROUND, 2, 1], [IGNORED] * 3, num=3)
    assert [places.tolist() for places in samples.places] == [[0, 1], [1, 2, 0], []]
    assert samples.num_positives == [1, 2, 0]


def test_places_in_rows() -> None:
    mask = torch.tensor([[False, True, True], [False] * 3, [True, False, True]])
    assert [places.tolist() for places in places_in_rows(mask)] == [[1, 2], [], [0, 2]]


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[sample([BACKGROUND] * 10, num=3).places[0]] += 1
    # 600 expected each, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert (counts - 600).abs().max() < 5 * 20.5
