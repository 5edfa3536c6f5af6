"""Batch size and number of micro-batches for the memory that a step needs and that is free."""

from collections.abc import Callable

import pytest

from aligndet_cli.errors import ConfigError, RunError
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.memory import Room
from aligndet_cli.training import fitting
from aligndet_cli.training.batch_size import Split, settle_batch_size
from aligndet_cli.training.fitting import Fit
from aligndet_cli.training.footprint import Footprint
from aligndet_cli.training.recipe import Rates
from aligndet_cli.training.settings import TrainingConfig
from helpers.hungry import hungry_trial

GB = 10**9
RATES = Rates(0.01, 1e-4, "some recipe", batch_size=16)
# One image takes 1 + 1 GB, each more 1 GB, half of it gaps. A process has half a GB before the model is built, and
# 2 GB of addresses that it does not use.
FOOTPRINT = Footprint(started=GB // 2, unused=2 * GB, fixed=GB, per_image=GB // 2, per_sample=0, gaps=2.0)
Settle = Callable[..., object]


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch) -> Settle:
    """Settle a batch with so much free memory; returns batch size and micro-batches. A try is never refused."""
    tries = []

    def settled(room: Room, devices: Devices = Devices(), recorded: Split | None = None, **training: object) -> object:  # noqa: B008
        tries.clear()
        monkeypatch.setattr(fitting, "free_room", lambda: room)
        monkeypatch.setattr(fitting, "try_step", lambda trial, room: tries.append(trial) or FOOTPRINT)
        config = TrainingConfig(**training)
        found, spares_memory = settle_batch_size(config, RATES, devices, recorded=recorded, trial=hungry_trial())
        return found.batch_size, found.accumulate, *["spared"] * spares_memory

    settled.tries = tries  # type: ignore[attr-defined]
    return settled  # type: ignore[return-value]


def shared(gigabytes: float) -> Room:
    """Room of which nine tenths, the share that is used, are this much."""
    return Room(int(gigabytes * GB / 0.9) + 1, None)


def test_what_fits_is_left_alone(settle: Settle) -> None:
    assert settle(shared(17), batch_size=16) == (16, 1)
    assert settle.tries  # type: ignore[attr-defined]


def test_what_fits_by_far_is_not_tried(settle: Settle) -> None:
    assert settle(shared(100), batch_size=2) == (2, 1)
    assert settle(Room(None, None), batch_size=16) == (16, 1)  # nothing tells
    assert not settle.tries  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused_with_what_does(settle: Settle) -> None:
    with pytest.raises(RunError) as error:
        settle(shared(7), batch_size=16)
    assert str(error.value) == (
        "a step with 16 images needs about 17 GB of memory and there are 7 GB for it: use --batch-size 6, or "
        "--accumulate 4: the same batch in 4 parts (as --batch-size auto finds by itself)"
    )
    with pytest.raises(RunError, match="use --batch-size 12, or --accumulate 4:"):  # twice six
        settle(shared(7), batch_size=16, accumulate=2)
    with pytest.raises(RunError, match="single image of 100x200 needs about 2 GB .* 1.5 GB for it: lower --short-side"):
        settle(shared(1.5), batch_size=16)


def test_memory_is_spared_where_a_single_image_does_not_fit_otherwise(settle: Settle) -> None:
    # With few gaps an image takes 0.55 GB: 1.55 in all.
    assert settle(shared(1.6), batch_size="auto") == (16, 16, "spared")
    assert settle(shared(1.6), batch_size=1) == (1, 1, "spared")
    assert settle(shared(1.6), batch_size=4, accumulate=4) == (4, 4, "spared")
    with pytest.raises(RunError, match="lower --short-side and --long-side, or use --batch-size auto, which spares"):
        settle(shared(1.6), batch_size=16)


def test_auto_takes_the_batch_of_the_recipe_apart(settle: Settle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="aligndet"):
        assert settle(shared(7), batch_size="auto") == (16, 4)  # 8 would fit into 9 GB, 4 into 5
    assert "--batch-size auto: 16 (some recipe), in 4 parts (--accumulate 4)" in caplog.text
    assert settle(shared(17), batch_size="auto") == (16, 1)
    assert settle(shared(2), batch_size="auto") == (16, 16)
    with pytest.raises(RunError, match="single image"):
        settle(shared(1.5), batch_size="auto")


def test_parts_that_were_asked_for_stay(settle: Settle) -> None:
    assert settle(shared(9), batch_size="auto", accumulate=2) == (16, 2)
    with pytest.raises(RunError, match="--accumulate 4"):
        settle(shared(7), batch_size="auto", accumulate=2)


def test_processes_share_the_machine_but_not_their_limits(settle: Settle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_ROUGH_SHARE", 0.0)  # tried whatever the size
    two = Devices("cpu", per_node=2)
    # 8 images need 9 GB in each, and half a GB was there before.
    assert settle(shared(19), two, batch_size=16) == (16, 1)
    with pytest.raises(RunError, match=r"8 images in each of 2 processes .*: use --batch-size 14"):
        settle(shared(18), two, batch_size=16)
    # 9 GB of addresses in each, and 2 that it does not use.
    assert settle(Room(None, 11 * GB), two, batch_size=16) == (16, 1)
    with pytest.raises(RunError, match="--batch-size 14"):
        settle(Room(None, 10 * GB), two, batch_size=16)
    # On two machines each has four of the sixteen.
    assert settle(shared(11), Devices("cpu", per_node=2, num_nodes=2), batch_size=16) == (16, 1)


def test_a_run_goes_on_as_it_began(settle: Settle) -> None:
    begun = Split(16, 4, is_complete=False)
    assert settle(shared(30), recorded=begun, batch_size="auto") == (16, 4)
    with pytest.raises(RunError, match="16 images"):  # memory has become scarce, but the parts are the run's
        settle(shared(3), recorded=begun, batch_size="auto")
    assert settle(shared(1), recorded=begun._replace(is_complete=True), batch_size="auto") == (16, 4)
    assert not settle.tries  # type: ignore[attr-defined]


def test_a_batch_that_cannot_be_divided_is_refused_untried(settle: Settle) -> None:
    with pytest.raises(ConfigError, match="must be a multiple"):
        settle(shared(3), Devices("cpu", per_node=3), batch_size=16)
    assert not settle.tries  # type: ignore[attr-defined]
    assert settle(shared(100), Devices("cpu", per_node=3), batch_size="auto", accumulate=2) == (18, 2)


def test_what_a_step_needs_may_stay_unknown(settle: Settle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "free_room", lambda: shared(3))
    monkeypatch.setattr(fitting, "try_step", lambda trial, room: None)
    training = TrainingConfig(batch_size=16)
    assert settle_batch_size(training, RATES, Devices(), recorded=None, trial=hungry_trial()) == (training, False)


def test_parts_are_divisors() -> None:
    fit = Fit(FOOTPRINT, 4 * GB, "8x8")  # three images
    assert [fit.parts(images, 1) for images in (2, 3, 4, 7, 12)] == [1, 1, 2, 7, 4]
    assert fit.parts(12, 5) == 6 and Fit(FOOTPRINT, GB, "8x8").parts(4, 1) is None
