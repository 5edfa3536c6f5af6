"""The commands of the stages."""

from collections.abc import Callable
from pathlib import Path

from aligndet_cli.commands.terminal import print_outcome, progress_mode, tell_ending, user_errors, with_data_root
from aligndet_cli.config import Sources
from aligndet_cli.driver import Request, execute
from aligndet_cli.flags import Given, with_flags
from aligndet_cli.processes.launch import Shown
from aligndet_cli.stage import Stage
from aligndet_cli.workspace import Workspace


def stage_command(stage: Stage) -> Callable[..., None]:
    """Return the Typer command of a stage: execute it as asked, and print the outcome."""

    def run(data: Path | None, given: Given) -> None:
        control = given.control
        with user_errors(given):
            request = Request(
                stage=stage.name,
                workspace=Workspace.locate(control.workspace),
                sources=Sources(control.config, control.set, with_data_root(data, given)),
                resume=control.resume is not False,
                force=control.force,
                dry_run=control.dry_run,
                shown=Shown(progress_mode(control.progress, is_quiet=control.quiet), control.verbosity, given.flags),
                as_it_was=True,
            )
            outcome = execute(request)
            if outcome.is_main:
                print_outcome(stage.name, outcome, control.json)
            if outcome.is_main and not control.json:
                tell_ending(stage, outcome, control.workspace)
        with user_errors(given, is_json=False):  # the result is out already
            if outcome.conclusion.error is not None:
                raise outcome.conclusion.error

    run.__doc__ = stage.summary
    return with_flags(stage.flags, stage.name, ("DATA", stage.data))(run)
