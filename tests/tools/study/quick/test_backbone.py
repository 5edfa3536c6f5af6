import shutil
from pathlib import Path

import pytest
import torch

from aligndet_cli.errors import AlignDetError, ConfigError, WeightsError
from aligndet_cli.tools.study.quick.backbone import find_backbone
from aligndet_cli.workspace import Workspace


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def find(name: str | None, weights: str | None, folder: Path) -> tuple[str, Path]:
    return find_backbone(name, weights, Workspace(folder / "ws"), offline=True, is_gpu=False)


def test_what_torchs_cache_has_is_taken(cache: Path, tmp_path: Path, mobilenet: Path) -> None:
    with pytest.raises(WeightsError, match="checkpoints: no weights of mobilenet_v2, resnet18, .*--backbone-weights"):
        find(None, None, tmp_path)
    shutil.copy(mobilenet, cache)
    assert find(None, None, tmp_path) == ("mobilenet_v2", cache / mobilenet.name)
    assert find("mobilenet_v2", None, tmp_path) == ("mobilenet_v2", cache / mobilenet.name)
    with pytest.raises(WeightsError, match="no weights of resnet50: give"):
        find("resnet50", None, tmp_path)


def test_the_weights_tell_their_backbone(tmp_path: Path, mobilenet: Path) -> None:
    assert find(None, str(mobilenet), tmp_path) == ("mobilenet_v2", mobilenet)
    assert find("mobilenet_v2", str(mobilenet), tmp_path) == ("mobilenet_v2", mobilenet)


@pytest.mark.parametrize(
    ("name", "weights", "kind", "said"),
    [
        ("resnet18", "{file}", WeightsError, "hold a mobilenet"),
        (None, "nothing.pth", WeightsError, "--backbone-weights nothing.pth: no such file"),
        (None, "none", WeightsError, "--backbone-weights none: random weights; .*DEFAULT"),
        (None, "DEFAULT", WeightsError, "not in the cache and --offline is set"),
        ("resnet19", None, ConfigError, "'resnet19' is not a choice .*--backbone.*did you mean 'resnet1"),
    ],
)
def test_what_does_not_fit_is_one_line(
    cache: Path, tmp_path: Path, mobilenet: Path, name: str, weights: str, kind: type[AlignDetError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        find(name, None if weights is None else weights.format(file=mobilenet), tmp_path)
    assert "\n" not in str(caught.value)
