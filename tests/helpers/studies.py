from pathlib import Path

from aligndet_cli.tools.study.plan import StageRun

# Stages of any detector and backbone that take seconds.
TINY = """
[settings.common]
"detector.neck_channels" = 32
"training.steps" = 2
"training.batch_size" = 2
"views.short_side" = [64]
"views.long_side" = 96
"resolution.short_side" = [64]
"resolution.long_side" = 96
"runtime.num_workers" = 0
"data.limit" = 5
[settings.proposals]
working_size = 96
min_size = 16
[settings.finetune]
"detector.score_threshold" = 0.005
[settings.evaluate]
plots = false
"""
SMALL = (
    TINY.replace("[settings.common]", '[settings.common]\n"backbone.name" = "resnet18"\n"detector.head_convs" = 1')
    + "[settings.pretrain-box]\nfreeze_backbone = false\n"
)
TWO_STARTS = """
[[starts]]
label = "from scratch"
init = "scratch"
[[starts]]
label = "AlignDet"
"""


def write_study(folder: Path, text: str, *, head: str = 'data = "toy"\ndetectors = ["retinanet"]') -> Path:
    file = folder / "study.toml"
    file.write_text(f"{head}\n{text}")
    return file


def values_of(run: StageRun) -> dict[str, object]:
    return {path: value for path, (_, value) in run.settings.items()}
