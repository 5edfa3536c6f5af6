from pathlib import Path

import pytest

from aligndet_cli.tools.demo import DemoSize, run_demo

SMALL = DemoSize(
    num_objects=24,
    num_train=7,
    num_val=3,
    num_clusters=3,
    backbone="method=supervised backbone.name=resnet18 image_size=32 training.steps=2 training.batch_size=2",
    model="backbone.name=resnet18 detector.neck_channels=32 detector.head_convs=1 training.batch_size=2",
    pretrain="training.steps=2 views.short_side=[64]",
    finetune="training.steps=2 resolution.short_side=[64]",
)


@pytest.mark.e2e
@pytest.mark.slow
def test_demo_runs_all_stages_and_compares(tmp_path: Path) -> None:
    report = run_demo(tmp_path, seed=0, size=SMALL)
    numbers = report.to_json()
    assert set(numbers["delta"]) == {"AP", "AP50", "AP75"}
    assert numbers["delta"]["AP"] == numbers["with"]["AP"] - numbers["without"]["AP"]
    page = (tmp_path / "workspace-0" / "report.html").read_text()
    assert report.page == tmp_path / "workspace-0" / "report.html"
    assert page.count("<img") >= 7 and "plots/compare-retinanet-resnet18-backbone-val.png" in page
    assert report.table().row_count == 3
    stages = {folder.parent.name for folder in (tmp_path / "workspace-0").glob("*/*") if folder.is_dir()}
    assert stages == {"pretrain-image", "proposals", "cluster", "pretrain-box", "finetune", "evaluate"}
    # Again: nothing is redone, the same table.
    assert run_demo(tmp_path, seed=0, size=SMALL).to_json() == numbers
