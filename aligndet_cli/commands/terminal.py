"""Common options of commands, and their output and end."""

import contextlib
import json
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast, get_args

import typer
from rich.console import Console
from typer.core import TyperGroup

from aligndet_cli.driver import Outcome
from aligndet_cli.errors import AlignDetError, ConfigError, GateError, Preempted, RunError, as_user_error
from aligndet_cli.flags import Given
from aligndet_cli.logs import ProgressMode, duration, fold, logger, make_streams_sturdy, setup_logging
from aligndet_cli.processes.signals import Stopped
from aligndet_cli.stage import Stage
from aligndet_cli.tables import rows_for_people
from aligndet_cli.workspace import Workspace

SCHEMA_VERSION = 1
_VALUES = 27  # column at which the values of a result begin


class Answer(Protocol):
    """The result of a command."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""

    def lines(self) -> list[str]:
        """Return lines for people."""


class CommandLine(TyperGroup):
    """The group of all commands; also says in one line what goes wrong outside of their own work."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that the words name, and end with its exit code."""
        make_streams_sturdy()
        words = sys.argv[1:] if args is None else list(args)
        try:
            _check_folder()
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            sys.exit(RunError.exit_code)
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]  # a help page
                sys.exit(ConfigError.exit_code)
            known: AlignDetError | None
            if isinstance(error, AlignDetError):
                known = error
            elif hasattr(error, "format_message"):  # an error of usage; Typer brings its own click, or takes another's
                known = ConfigError(f"{error.format_message().rstrip('.')}; see {_help_of(error)}")
            else:
                known = as_user_error(error, self._flags_of(words))
            if known is None:
                raise
            _tell(str(known), known.exit_code, "--json" in words)
            sys.exit(known.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def _flags_of(self, words: Sequence[str]) -> set[str]:
        command = self.commands.get(words[0]) if words else None
        return {flag for parameter in (command.params if command else []) for flag in parameter.opts}


def _check_folder() -> None:
    """Make sure that the current folder is there; libraries end the process without a word of why.

    Raises:
        ConfigError: it was deleted.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was deleted: change to another one") from None


def _help_of(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"`{'aligndet' if context is None else context.command_path} --help`"


@contextlib.contextmanager
def user_errors(given: Given, *, is_json: bool | None = None) -> Iterator[None]:
    """Turn what a user can put right or the machine can cause into one line and an exit code; let our bugs through.

    Args:
        given: tells if the errors are JSON too (unless `is_json` says so), how much is logged, and the command's flags.
    """
    setup_logging(given.control.verbosity)
    is_json = given.control.json if is_json is None else is_json
    try:
        yield
    except AlignDetError as error:
        fail(str(error), error.exit_code, is_json)
    except Stopped as stop:
        fail(str(stop), Preempted.exit_code, is_json)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to continue", 130, is_json)
    except Exception as error:
        known = as_user_error(error, given.flags)
        if known is None:
            raise
        logger.debug(traceback.format_exc())
        fail(str(known), known.exit_code, is_json)


def fail(message: str, exit_code: int, is_json: bool) -> NoReturn:
    """End the command with one line."""
    _tell(message, exit_code, is_json and exit_code != GateError.exit_code)  # the result of a failed gate is out
    raise typer.Exit(exit_code)


def _tell(message: str, exit_code: int, is_json: bool) -> None:
    if is_json:
        with contextlib.suppress(OSError):  # stdout may be what failed
            print_json({"status": "error", "exit_code": exit_code, "message": message})
    typer.echo(f"error: {message}", err=True)


def progress_mode(asked: str | None, *, is_quiet: bool = False) -> ProgressMode:
    """Return the mode that `--progress` and `--quiet` ask for.

    Raises:
        ConfigError: no such mode.
    """
    for mode in get_args(ProgressMode):
        if mode == (asked or ("none" if is_quiet else "auto")):
            return cast(ProgressMode, mode)
    raise ConfigError(f"--progress {asked}: write auto, bar, plain or none")


def with_data_root(data: Path | None, given: Given) -> dict[str, tuple[str, Any]]:
    """Return the typed settings, with the argument DATA as one of them."""
    return given.settings if data is None else {**given.settings, "data.root": ("DATA", data)}


def print_outcome(stage: str, outcome: Outcome, is_json: bool) -> None:
    """Print the outcome of a stage on stdout: its folder and result."""
    result = outcome.artifact.result if outcome.artifact else {}
    if is_json:
        content: dict[str, Any] = {"command": stage, "status": outcome.status, "action": outcome.action}
        content |= {"folder": str(outcome.folder), "result": result}
        print_json({**content, "effective": outcome.effective, **outcome.conclusion.result})
        return
    if outcome.status == "dry run":
        would_be = {"start": "would be written", "resume": "would be continued", "complete": "is already complete"}
        typer.echo(f"dry run: {outcome.folder} {would_be[outcome.action]}")
        return
    prefix = "" if outcome.status == "done" else f"{outcome.status}: "
    typer.echo(f"{prefix}{outcome.folder}")
    told = {name: value for name, value in result.items() if name != "protocol"}  # the effective settings, for reports
    for name, text in rows_for_people(told):
        line = f"  {name:<24} {text}"
        typer.echo(fold(line, Console().width, _VALUES) if sys.stdout.isatty() else line)
    for line in outcome.conclusion.lines:
        typer.echo(line)


def tell_ending(stage: Stage, outcome: Outcome, workspace: Path | None) -> None:
    """Log what people want to know at the end of a stage: duration and result, what to look at, how to go on.

    Args:
        workspace: as it was typed, for the next command.
    """
    artifact = outcome.artifact
    if artifact is None:
        return
    made = f"made {str(artifact.manifest['finished'])[:16].replace('T', ' ')} UTC"
    took = made if outcome.seconds is None else f"took {duration(outcome.seconds)}"
    files = [str(file) for name in stage.look_at if (file := artifact.folder / name).exists()]
    place = () if workspace is None else ("-w", shlex.quote(str(workspace)))
    words = stage.go_on(artifact, Workspace.locate(workspace))
    logger.info(f"{took}: {stage.headline(artifact)}")
    logger.info(f"look at: {'  '.join(files)}")
    logger.info(f"next: {' '.join(['aligndet', *words, *place])}")


def console() -> Console:
    """Return a console for tables: as wide as the terminal, and so wide that nothing wraps where there is none."""
    return Console(width=None if sys.stdout.isatty() else 1000)


def answer(command: str, result: Answer, is_json: bool) -> None:
    """Print the result of a command on stdout."""
    if is_json:
        print_json({"command": command, **result.to_json()})
    else:
        typer.echo("\n".join(result.lines()))


def print_json(content: dict[str, Any]) -> None:
    """Print one object on stdout."""
    typer.echo(json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """Return one object as it is printed, with the version of its layout."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **content})
