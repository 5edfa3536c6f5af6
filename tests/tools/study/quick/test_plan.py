import pytest

from aligndet_cli.tools.study.quick.plan import Search


def test_rates_are_tried_until_the_best_has_neighbours() -> None:
    search = Search((0.005, 0.01, 0.02))
    assert search.after({0.005: 0.1, 0.01: 0.2, 0.02: 0.1}) == Search((0.005, 0.01, 0.02), 0.01)
    lower = search.after({0.005: 0.3, 0.01: 0.2, 0.02: 0.1})
    assert lower == Search((0.0025, 0.005, 0.01, 0.02))
    assert lower.after({0.0025: 0.1, 0.005: 0.3, 0.01: 0.2, 0.02: 0.1}).best == 0.005
    higher = search.after({0.005: 0.1, 0.01: 0.2, 0.02: 0.3})
    assert higher.rates == (0.005, 0.01, 0.02, 0.04)
    # not for ever
    last = higher.after({0.04: 0.4})
    assert last.rates == (0.005, 0.01, 0.02, 0.04, 0.08) and last.after({0.08: 0.5}).best == 0.08
    # a rate whose runs measure nothing is not the best; of equal ones the middle one is
    assert search.after({0.005: 0.1, 0.01: 0.1}).best == search.after(dict.fromkeys(search.rates, 0.0)).best == 0.01


@pytest.mark.parametrize("measured", [{0.005: 0.3}, {0.02: 0.3}, {0.01: 0.3}])
def test_every_state_of_a_search_is_known_from_its_beginning(measured: dict[float, float]) -> None:
    search = begin = Search((0.005, 0.01, 0.02))
    states = list(begin.states())
    assert search in states
    while search.best is None:
        search = search.after(measured)
        measured = {rate: value + 0.1 for rate, value in measured.items()}
        assert search in states
