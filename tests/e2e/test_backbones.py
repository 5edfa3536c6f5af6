"""Networks of timm, a ConvNeXt and two linked ResNets as backbones: killed and resumed, and in two processes."""

import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.commandline import NECK, RANDOM, RESOLUTION, assert_same_results
from helpers.forks import ForkServer
from helpers.interrupting import EAGER, workspace_before
from helpers.two_ranks import assert_ranks_agree

pytestmark = pytest.mark.e2e

NAMES = ("convnext_tiny", "timm:mobilenetv3_small_100", "timm:vit_tiny_patch16_224", "cb-resnet18")


@pytest.fixture(params=NAMES)
def words(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param.startswith("timm:") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return ("--detector", "retinanet", "--backbone", request.param, *NECK, *RESOLUTION, "--steps", "4")


def test_killed_it_goes_on_to_the_same_results(
    forks: ForkServer, words: tuple[str, ...], chain: Path, tmp_path: Path
) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")
    pretrain = ("pretrain-box", "-w", ".", *words, *RANDOM, "--batch-size", "2", *EAGER["pretrain-box"])
    finetune = ("finetune", "-w", ".", *words, "--batch-size", "2", *EAGER["finetune"])
    for stage, command in (("pretrain-box", pretrain), ("finetune", finetune)):
        assert forks.run(*command, "--name", "whole", cwd=workspace) == 0, forks.output
        killed = forks.run(*command, "--name", "killed", cwd=workspace, die_at=12)
        assert killed == -signal.SIGKILL and not (workspace / stage / "killed").exists()
        assert forks.run(*command, "--name", "killed", cwd=workspace) == 0, forks.output
        assert "which was interrupted" in forks.output
        assert_same_results(workspace / stage / "killed", workspace / stage / "whole")


def test_two_processes_agree(forks: ForkServer, words: tuple[str, ...], chain: Path, tmp_path: Path) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")
    for stage, more in (("pretrain-box", RANDOM), ("finetune", ())):
        command = (stage, "-w", workspace, *words, "--batch-size", "4", *more)
        codes, outputs = forks.join(*command, cwd=workspace, keep=tmp_path)
        assert codes == [0, 0], outputs
        assert_ranks_agree(tmp_path)
