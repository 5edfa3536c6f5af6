import pytest

from aligndet_cli.pretrain_image.recipes import (
    OF_SOME,
    RECIPES,
    MethodName,
    choose_batch_size,
    choose_momentum,
    choose_queue,
    choose_rates,
)


def test_long_runs_are_the_papers_and_short_ones_ours() -> None:
    assert choose_rates("simsiam", None, 10_000, 64) == RECIPES["simsiam"].rates
    assert choose_rates("simsiam", "sgd", 100, 64) == RECIPES["simsiam"].rates
    for short in (choose_rates("simsiam", None, 9_999, 64), choose_rates("simsiam", "adamw", 10**6, 64)):
        assert (short.optimizer, short.decay, short.warmup) == ("adamw", "cosine", "linear")
        assert short.lr == 1e-3 and short.batch_size == 64  # not scaled
        assert short.constant_lr == ("predictor",)


def test_the_papers_optimizer_is_there_for_the_asking() -> None:
    assert choose_rates("byol", "lars", 100, 64) == choose_rates("byol", None, 10_000, 64) == RECIPES["byol"].rates
    short = choose_rates("byol", None, 9_999, 64)
    assert short.optimizer == "adamw" and not short.decays_norms and short.bias_decay_scale == 0  # as with LARS


@pytest.mark.parametrize("method", RECIPES)
def test_what_a_method_uses_it_has(method: MethodName) -> None:
    recipe = RECIPES[method]
    assert set(recipe.uses) <= set(OF_SOME) and len(recipe.views) in (1, 2)
    for setting in ("embedding_dim", "hidden_dim", "momentum"):
        assert bool(getattr(recipe, setting)) == (setting in recipe.uses)


def test_batch_size() -> None:
    assert choose_batch_size("simsiam", 1_000_000, 1) == 256  # SimSiam, MoCo v2
    assert choose_batch_size("simsiam", 1000, 1) == 64  # 8 x 128 would be more than there are
    assert choose_batch_size("simsiam", 1000, 3) == 66  # 22 on each of three
    assert choose_batch_size("simsiam", 3, 4) == 8  # batch norm needs two


def test_queue_and_momentum() -> None:
    assert choose_queue(1_281_167, 256) == 65_536 and choose_momentum("moco-v2", 1_000_000) == 0.999  # MoCo v2
    assert choose_queue(1000, 64) == 500 and choose_queue(10, 64) == 64
    assert choose_momentum("moco-v2", 400) == pytest.approx(0.95) and choose_momentum("byol", 20) == 0.9
