"""Time real runs of all stages on the user's images: a few steps each."""

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aligndet_cli.config import validated
from aligndet_cli.driver import Request, execute
from aligndet_cli.processes.launch import Shown
from aligndet_cli.tools.study.plan import StageRun, plan_runs
from aligndet_cli.tools.study.quick.budget import Costs
from aligndet_cli.tools.study.quick.data import LabelledData
from aligndet_cli.tools.study.quick.plan import ours
from aligndet_cli.tools.study.run import quiet_stages
from aligndet_cli.tools.study.spec import StudyConfig
from aligndet_cli.training.curves import read_log
from aligndet_cli.workspace import Workspace

_WARM_UP, _STEPS = 3, 6
_IMAGES = {"proposals": 32, "evaluate": 128}
_SOME_RATE = 0.001  # so that nothing diverges
_FIRST_IMAGES = 4  # of proposals: what takes as long for any number of images


@dataclass(frozen=True)
class _Took:
    """Seconds of one run, and of one of its steps if it trains."""

    seconds: float
    step: float = 0.0

    @property
    def start(self) -> float:
        return max(self.seconds - (_WARM_UP + _STEPS) * self.step, 0)


def time_stages(content: Mapping[str, Any], data: LabelledData) -> Costs:
    """Run proposals, a few steps of pre-training and of fine-tuning, and an evaluation, in a folder for the moment.

    Args:
        content: of a study with one detector, without its starts.

    Raises:
        AlignDetError: anything that would stop the study too.
    """
    with tempfile.TemporaryDirectory(prefix="aligndet-quick-") as folder:
        place = Path(folder)
        study = validated(StudyConfig, _shortened(content, data, place / "held-out"), {})
        workspace = Workspace(place / "workspace")
        runs = {run.stage: run for run in plan_runs(study, workspace)}
        first = runs["proposals"]
        limit = {"data.limit": ("quick", _FIRST_IMAGES)}
        start = _time(replace(first, name="first", settings={**first.settings, **limit}), workspace)
        took = {stage: _time(run, workspace) for stage, run in runs.items()}
    num_evaluated = min(_IMAGES["evaluate"], data.num_val)
    return Costs(
        proposals_start=start.seconds,
        proposals_image=took["proposals"].seconds / min(_IMAGES["proposals"], data.num_train),
        pretrain_start=took["pretrain-box"].start,
        pretrain_step=took["pretrain-box"].step,
        finetune_start=took["finetune"].start,
        finetune_step=took["finetune"].step,
        evaluation=took["evaluate"].seconds / num_evaluated * data.num_val,
    )


def _shortened(content: Mapping[str, Any], data: LabelledData, held_out: Path) -> dict[str, Any]:
    """Return the study with one seed, the start that runs all stages, a few steps, and a few images."""
    settings: dict[str, dict[str, Any]] = {name: dict(table) for name, table in content["settings"].items()}
    data.write_held_out(held_out)
    for name, table in data.held_out_settings(held_out).items():
        settings[name] = {**settings.get(name, {}), **table}
    for stage in ("pretrain-box", "finetune"):
        settings[stage] |= {"training.steps": _WARM_UP + _STEPS, "training.log_every": 1}
    for stage, count in _IMAGES.items():
        settings[stage] = {**settings.get(stage, {}), "data.limit": count}
    return {**content, "seeds": [0], "fractions": [100], "settings": settings, "starts": [ours(_SOME_RATE)]}


def _time(run: StageRun, workspace: Workspace) -> _Took:
    began = time.perf_counter()
    with quiet_stages(logging.ERROR):  # warnings come when it is run
        outcome = execute(Request(run.stage, workspace, run.sources, shown=Shown("none", -1)))
    seconds = time.perf_counter() - began
    file = outcome.folder / "speed.jsonl"
    if not file.exists():
        return _Took(seconds)
    _, images_per_s = read_log(file)["images_per_s"]
    return _Took(seconds, run.settings["training.batch_size"][1] / float(np.median(images_per_s[_WARM_UP:])))
