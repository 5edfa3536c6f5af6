"""Common options of commands, and their output and end."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import typer
from rich.console import Console

from aligndet_cli.config import flatten
from aligndet_cli.driver import Outcome
from aligndet_cli.errors import AlignDetError, ConfigError, GateError, Preempted, as_user_error
from aligndet_cli.flags import Given
from aligndet_cli.logs import ProgressMode, setup_logging
from aligndet_cli.processes.signals import Stopped

SCHEMA_VERSION = 1


class Answer(Protocol):
    """The result of a command."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""

    def lines(self) -> list[str]:
        """Return lines for people."""


@contextlib.contextmanager
def user_errors(is_json: bool, verbosity: int = 0) -> Iterator[None]:
    """Turn what a user can put right into one line and an exit code; let our own bugs through.

    For `verbosity` see `setup_logging`.
    """
    setup_logging(verbosity)
    try:
        yield
    except AlignDetError as error:
        fail(str(error), error.exit_code, is_json)
    except Stopped as stop:
        fail(str(stop), Preempted.exit_code, is_json)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to continue", 130, is_json)
    except OSError as error:
        known = as_user_error(error)
        if known is None:
            raise
        fail(str(known), known.exit_code, is_json)


def fail(message: str, exit_code: int, is_json: bool) -> None:
    """End the command with one line."""
    if is_json and exit_code != GateError.exit_code:  # the result of a failed gate is already out
        print_json({"status": "error", "exit_code": exit_code, "message": message})
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(exit_code)


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
    for key, value in flatten({**result, **outcome.conclusion.result}):
        if value is not None and not isinstance(value, list | dict):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            typer.echo(f"  {key.replace('_', ' '):<24} {shown}")


def console() -> Console:
    """Return a console for tables: as wide as the terminal, and wide enough not to wrap where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


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
