import pytest

from aligndet_cli.errors import ConfigError
from aligndet_cli.tools.study.quick.budget import Costs, Size, choose_size
from aligndet_cli.tools.study.quick.fit import finetune_steps

# Seconds that are easy to add.
COSTS = Costs(
    proposals_start=10,
    proposals_image=0.1,
    pretrain_start=5,
    pretrain_step=0.5,
    finetune_start=2,
    finetune_step=0.25,
    evaluation=8,
)


def choose(seconds: float, num_images: int = 400, jobs: int = 1) -> tuple[Size, float]:
    return choose_size(COSTS, seconds, num_images=num_images, num_proposal_images=num_images, num_rates=3, jobs=jobs)


def test_the_cost_is_the_sum_of_all_runs() -> None:
    size = Size((10, 100), seeds=3, rate_seeds=2, pretrain_steps=100, finetune_steps=40)
    # 3 seeds of two starts at two fractions, and two more rates with two seeds
    assert size.num_finetunings(3) == 2 * 3 * 2 + 2 * 2
    # proposals 15 s, pre-training 55 s, and 16 runs of 20 s
    assert size.seconds(COSTS, num_proposal_images=50, num_rates=3, jobs=1) == 15 + 55 + 16 * 20
    assert size.seconds(COSTS, num_proposal_images=50, num_rates=3, jobs=2) == 15 + 55 + 16 * 10


def test_more_time_is_more_of_all_and_never_more_than_there_is() -> None:
    before = 0.0
    for seconds in (900, 1800, 3600, 7200, 14400, 36000, 10**6):
        size, cost = choose(seconds)
        assert before <= cost <= seconds
        assert size.seeds >= 3 and size.fractions[-1] >= 20
        before = cost
    assert size == Size((20, 100), 10, 3, 2400, 3 * finetune_steps(400))
    # what more does not help is not used
    assert cost < 36000


def test_as_many_labels_as_the_time_allows() -> None:
    chosen = [choose(seconds, num_images=5000)[0].fractions[-1] for seconds in (1300, 2000, 4000, 10**5)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1] == 100
    assert choose(10**6, num_images=21)[0].fractions == (100,)  # no smaller fraction has twenty images


def test_too_little_time_is_refused_with_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"--hours 0.1: too few .* give --hours ([\d.]+) or more") as caught:
        choose(360)
    needed = float(str(caught.value).split("--hours ")[-1].split()[0])
    assert choose(3600 * needed)[0].seeds == 3
    with pytest.raises(ConfigError):
        choose(3600 * (needed - 0.01))
