"""The stages of the pipeline."""

from pathlib import Path

from aligndet_cli.commands.terminal import print_outcome, progress_mode, user_errors, with_data_root
from aligndet_cli.config import Sources
from aligndet_cli.driver import Outcome, Request, execute
from aligndet_cli.errors import ConfigError
from aligndet_cli.flags import STAGE_FLAGS, Given, with_flags
from aligndet_cli.logs import logger, setup_logging
from aligndet_cli.processes.launch import Shown
from aligndet_cli.workspace import Workspace


@with_flags(STAGE_FLAGS["pretrain-image"])
def pretrain_image(data: Path | None, given: Given) -> None:
    """Train a backbone on images, without labels or with one class per folder."""
    run_stage("pretrain-image", data, given)


@with_flags(STAGE_FLAGS["proposals"])
def proposals(data: Path | None, given: Given) -> None:
    """Find boxes of possible objects in unlabelled images."""
    target = given.control["export"]
    with user_errors(bool(given.control["json"])):
        if target is not None and target.is_dir():
            raise ConfigError(f"--export {target}: is a folder; name a file")
    outcome = run_stage("proposals", data, given)
    if target is not None and outcome.artifact is not None:
        from aligndet_cli.artifacts.exchange import export_coco

        with user_errors(is_json=False):  # the result is out already
            export_coco(outcome.artifact.folder, target)
            logger.info(f"exported to {target}")


@with_flags(STAGE_FLAGS["cluster"])
def cluster(data: Path | None, given: Given) -> None:
    """Group the proposals into pseudo classes (needed by DETR only)."""
    run_stage("cluster", data, given)


@with_flags(STAGE_FLAGS["pretrain-box"])
def pretrain_box(data: Path | None, given: Given) -> None:
    """Pre-train a detector's neck and head on the proposals."""
    run_stage("pretrain-box", data, given)


@with_flags(STAGE_FLAGS["finetune"])
def finetune(data: Path | None, given: Given) -> None:
    """Train the detector on labelled images."""
    run_stage("finetune", data, given)


@with_flags(STAGE_FLAGS["evaluate"])
def evaluate(data: Path | None, given: Given) -> None:
    """Measure a fine-tuned detector."""
    run_stage("evaluate", data, given)


def run_stage(stage: str, data: Path | None, given: Given) -> Outcome:
    """Execute a stage as asked, and print what came of it."""
    control = given.control
    is_json = bool(control["json"])
    verbosity = -1 if control["quiet"] else (1 if control["verbose"] else 0)
    setup_logging(verbosity)
    with user_errors(is_json):
        request = Request(
            stage=stage,
            workspace=Workspace.locate(control["workspace"]),
            sources=Sources(control["config"], tuple(control["set"] or ()), with_data_root(data, given)),
            resume=control["resume"] is not False,
            force=bool(control["force"]),
            dry_run=bool(control["dry-run"]),
            shown=Shown(progress_mode(control), verbosity),
        )
        outcome = execute(request)
        if outcome.is_main:
            print_outcome(stage, outcome, is_json)
        if outcome.failed_gate is not None:
            raise outcome.failed_gate
    return outcome
