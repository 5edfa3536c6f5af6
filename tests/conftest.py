import gc
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.processes.memory import Room
from aligndet_cli.training import fitting
from helpers.commandline import run_chain
from helpers.plots import leave_empty

# A shell that starts the tests in the background makes them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two cores: one thread per test process is faster than two that wait for each other, and the sums are the same.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets `minicoco` and `bccd`, kept beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data (shared/data) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy set as a COCO root: 13 images to train on, 11 to validate."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    draw_toy_data(folder, seed=0, num_train=13, num_val=11, size_hw=(96, 120))
    return folder


@pytest.fixture(scope="session")
def chain(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which all five commands have run on the toy set. Do not change it: copy it."""
    workspace = tmp_path_factory.mktemp("chain") / "workspace"
    run_chain(toy, workspace)
    return workspace


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the tests of a module share. It goes with them: what is large must not stay until the last test."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only tests that look at plots draw them."""
    with pytest.MonkeyPatch.context() as patch:  # its own: tests undo theirs
        if request.node.get_closest_marker("plots") is None:
            patch.setattr(Figure, "savefig", leave_empty)
        yield


@pytest.fixture(autouse=True)
def plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs at the defaults try no step on the machine of the tests; tests of memory say what there is."""
    monkeypatch.setattr(fitting, "free_room", lambda: Room(None, None))


def pytest_collection_finish() -> None:
    """Collecting garbage in all that torch and numba hold would take a fifth of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker is left alone with them; tests of an e2e file, which share runs, together.

    A file may say itself which of its tests share a worker.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        is_alone = any(item.get_closest_marker(name) for name in ("slow", "xdist_group"))
        if item.path.parent.name == "e2e" and not is_alone:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
