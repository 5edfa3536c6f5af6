"""The command that looks for the cause of a divergence."""

from aligndet_cli.commands.terminal import answer, user_errors
from aligndet_cli.flags import JSON, MACHINE, WORKSPACE, Given, control, with_flags
from aligndet_cli.workspace import Workspace

REPLAY = (
    control("--accelerator", str, "Device: auto | cpu | gpu (auto).", panel=MACHINE, words="auto cpu gpu"),
    WORKSPACE,
    JSON,
)


@with_flags(REPLAY, "replay", ("RUN", "Run that diverged, as STAGE/NAME (the last)."), str)
def replay(run: str | None, given: Given, *, accelerator: str = "auto") -> None:
    """Repeat the step at which a run diverged, and name the first value that is not finite."""
    from aligndet_cli.tools.replay import replay as repeat

    with user_errors(given):
        answer("replay", repeat(Workspace.locate(given.control.workspace), run, accelerator), given.control.json)
