"""Real processes for the tests that kill them."""

from collections.abc import Iterator

import pytest

from helpers.forks import ForkServer, fork_server


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with fork_server(tmp_path_factory.mktemp("forks") / "log.txt") as server:
        yield server
