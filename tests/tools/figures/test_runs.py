from pathlib import Path

from aligndet_cli.tools.figures.runs import find_runs
from aligndet_cli.workspace import Workspace
from helpers.reports import Tuned, add_evaluated


def test_the_backbone_alone_of_the_same_seed_is_compared_with(tmp_path: Path) -> None:
    for seed in (0, 1):
        for init in ("pretrain", "backbone", "scratch"):
            add_evaluated(tmp_path, Tuned(f"{init}-{seed}", init=init, seed=seed), 0.1)
    workspace = Workspace(tmp_path)
    chosen = {run: find_runs(workspace, run, None)[1].run.name for run in ("pretrain-0", "pretrain-1")}
    assert chosen == {"pretrain-0": "backbone-0", "pretrain-1": "backbone-1"}
    assert [one.run.name for one in find_runs(workspace, None, "scratch-0")] == ["pretrain-1", "scratch-0"]
    assert find_runs(workspace, None, None)[0].start.label == "AlignDet"
