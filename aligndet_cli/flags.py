"""The flags of the command line: the same word means the same everywhere.

A flag is data. One that is a setting has only its words and the dotted path of the setting: kind, choices, default and
help come from `settings.json`, which `make settings` writes from the configs, so that help needs no torch. `with_flags`
gives a command its flags and hands it what was typed; a flag that was not typed is None.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from aligndet_cli.workspace import Workspace

SETTINGS, DATA_PANEL, RUN, MACHINE = "Settings", "Data", "Running", "Machine"
_PANELS = (SETTINGS, DATA_PANEL, RUN, MACHINE)  # in this order in the help
_KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "path": Path, "str": str, "list": str}
LAYOUTS = "A COCO, VOC or YOLO root"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        names: as typed, e.g. `--workspace`, `-w`, or `--resume/--no-resume`.
        path: dotted path of the setting; "" for flags that steer the command itself.
        kind: type of the value, and `help` one line, of flags that are not in `settings.json`.
        runs: patterns in the workspace that complete the value, of runs or of files of weights.
        words: other completions.
    """

    names: tuple[str, ...]
    path: str = ""
    panel: str = SETTINGS
    kind: type = str
    help: str = ""
    runs: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def parameter(self) -> str:
        """Name as a Python parameter."""
        return self.word.lstrip("-").replace("-", "_") + "_"

    @property
    def word(self) -> str:
        """The long name, for messages."""
        return self.names[0].split("/")[0]


@dataclass(frozen=True)
class Control:
    """The typed flags that are no setting; None or False where one was not typed."""

    workspace: Path | None = None
    config: Path | None = None
    set: tuple[str, ...] = ()
    resume: bool | None = None
    force: bool = False
    dry_run: bool = False
    json: bool = False
    progress: str | None = None
    quiet: bool = False
    verbose: bool = False

    @property
    def verbosity(self) -> int:
        """-1 for warnings only, 0, or 1 for more detail."""
        return -1 if self.quiet else int(self.verbose)


@dataclass(frozen=True)
class Given:
    """The typed flags.

    Attributes:
        settings: `{dotted.path: (flag, value)}`.
        flags: all flags that the command has, for messages.
    """

    settings: dict[str, tuple[str, Any]]
    control: Control
    flags: frozenset[str] = frozenset()


def control(names: str, kind: type, text: str, *, panel: str = RUN, words: str = "", runs: str = "") -> Flag:
    """Return a flag that steers the command; `words` and `runs` complete its value, separated by blanks."""
    return Flag(tuple(names.split()), "", panel, kind, text, tuple(runs.split()), tuple(words.split()))


def setting(names: str, path: str, panel: str = SETTINGS, text: str = "", *, words: str = "", runs: str = "") -> Flag:
    """Return the flag of a setting.

    Args:
        text: help where `settings.json` has no such setting; its kind is then a text.
        words, runs: see `Flag`, separated by blanks.
    """
    return Flag(tuple(names.split()), path, panel, str, text, tuple(runs.split()), tuple(words.split()))


own = functools.partial(control, panel=SETTINGS)  # a flag that only one command has, and that is no setting
WORKSPACE = control("--workspace -w", Path, "Folder of the artifacts ($ALIGNDET_WORKSPACE, else ./workspace).")
CONFIG = control("--config -c", Path, "TOML file with settings, plain or one table per stage (none).")
SET = control("--set -s", list, "One setting as some.key=value; repeatable (none).")
FORCE = control("--force", bool, "Do it again although it is complete (off).")
JSON = control("--json", bool, "Print one JSON object on stdout (off).")
PROGRESS = control("--progress", str, "Progress: auto | bar | plain | none (auto).", words="auto bar plain none")
QUIET = control("--quiet -q", bool, "Warnings only (off).")
NAME = setting("--name", "name", RUN)
SEED = setting("--seed", "seed", RUN)
CONTROL = (
    WORKSPACE,
    CONFIG,
    SET,
    NAME,
    control("--resume/--no-resume", bool, "Continue an interrupted run, or start it over (resume)."),
    FORCE,
    control("--dry-run -n", bool, "Check everything, print the effective settings, and stop (off)."),
    JSON,
    PROGRESS,
    QUIET,
    control("--verbose -v", bool, "More detail (off)."),
    SEED,
)
FORMAT = setting("--format", "data.format", DATA_PANEL)
SPLIT = setting("--split", "data.split", DATA_PANEL)
ANNOTATIONS = setting("--annotations", "data.annotations", DATA_PANEL)
IMAGES = setting("--images", "data.images", DATA_PANEL)
LIMIT = setting("--limit", "data.limit", DATA_PANEL)
DATA = (FORMAT, SPLIT, ANNOTATIONS, IMAGES, LIMIT)
ACCELERATOR = setting("--accelerator", "runtime.accelerator", MACHINE)
WORKERS = setting("--num-workers", "runtime.num_workers", MACHINE)
DEVICES = (
    ACCELERATOR,
    setting("--devices", "runtime.devices", MACHINE),
    setting("--num-nodes", "runtime.num_nodes", MACHINE),
    WORKERS,
)
PRECISION = setting("--precision", "runtime.precision", MACHINE)
SPEED = (
    PRECISION,
    setting("--compile/--no-compile", "runtime.compile", MACHINE),
    setting("--deterministic", "runtime.deterministic", MACHINE),
)
DETECTOR = setting("--detector", "detector.family")
BACKBONE = setting("--backbone", "backbone.name")
BACKBONE_WEIGHTS = (
    setting("--backbone-weights", "backbone.weights", words="auto none workspace DEFAULT"),
    setting("--offline", "runtime.offline", MACHINE),
)
RECIPE = setting("--recipe", "recipe", words="auto")
TRAINING = (
    setting("--schedule", "training.schedule"),
    setting("--epochs", "training.epochs"),
    setting("--steps", "training.steps"),
    setting("--batch-size", "training.batch_size", words="auto"),
    setting("--accumulate", "training.accumulate"),
    setting("--lr", "training.lr"),
    setting("--weight-decay", "training.weight_decay"),
    setting("--log-every", "training.log_every"),
    setting("--logger", "training.logger"),
    setting("--on-error", "on_error"),
)


def with_flags(
    flags: tuple[Flag, ...],
    command: str,
    argument: tuple[str, str] | None = ("DATA", f"{LAYOUTS}."),
    kind: Any = Path,
    words: tuple[str, ...] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn `run(data, given, **own)` into a Typer command with these flags and an optional argument.

    Flags that are neither a setting nor in `Control` are passed on by name.

    Args:
        command: whose settings these are, by its name in `settings.json`.
        argument: name and help of the argument; None: there is none, and `data` is None.
        kind: type of its value; of a list, any number of them.
        words: completions of its value.
    """
    flags = tuple(sorted(flags, key=lambda flag: _PANELS.index(flag.panel)))
    known = known_settings(command)

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run)
        def typed(**values: Any) -> None:
            data = values.pop("data", None)
            given, own = _collect(flags, values, known)
            run(data, given, **own)

        parameters = []
        if argument is not None:
            metavar, text = argument
            complete = _completion(Flag((metavar,), words=words), [])
            path = typer.Argument(help=text, metavar=metavar, show_default=False, autocompletion=complete)
            parameters.append(_parameter("data", Annotated[kind | None, path]))
        parameters += [_parameter(flag.parameter, _annotation(flag, known.get(flag.path, {}))) for flag in flags]
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
        typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return typed

    return decorate


@functools.cache
def all_settings() -> dict[str, Any]:
    """Return the content of `settings.json`."""
    text = (resources.files("aligndet_cli") / "settings.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def known_settings(command: str) -> dict[str, dict[str, Any]]:
    """Return `{dotted.path: {kind, default, choices, text}}` of a stage or another command, without torch."""
    content = all_settings()
    return {**content["stages"], **content["commands"]}.get(command, {})


def help_of(flag: Flag, entry: dict[str, Any]) -> str:
    """Return the help of a flag: the text of its setting, the choices and, in brackets, the default."""
    if not entry:
        return flag.help
    text, choices, default = entry["text"].removesuffix("."), entry["choices"], entry["default"]
    unset = ""
    if default is None and text.endswith(")"):
        text, _, unset = text.rpartition(" (")
        unset = f" ({unset}"
    shown = f" ({default.replace(',', ', ')})" if default is not None else unset  # blanks, so that lists can wrap
    words = [*choices, *(word for word in flag.words if word not in choices)] if choices else []
    return f"{text}{': ' + ' | '.join(words) if words else ''}{shown}."


def _collect(
    flags: tuple[Flag, ...], values: dict[str, Any], known: dict[str, dict[str, Any]]
) -> tuple[Given, dict[str, Any]]:
    """Sort typed values into settings, control and the flags of this command alone."""
    settings: dict[str, tuple[str, Any]] = {}
    steering: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for flag in flags:
        value, name = values[flag.parameter], flag.parameter.removesuffix("_")
        if not flag.path:
            where = steering if name in Control.__dataclass_fields__ else own
            if value is not None:
                where[name] = tuple(value) if isinstance(value, list) else value
        elif value is not None:
            # What is wrong with a value is said when the config is validated.
            is_list = known.get(flag.path, {}).get("kind") == "list"
            settings[flag.path] = (flag.word, [part.strip() for part in value.split(",")] if is_list else value)
    return Given(settings, Control(**steering), frozenset(flag.word for flag in flags)), own


def _annotation(flag: Flag, entry: dict[str, Any]) -> Any:
    kind = _KINDS[entry["kind"]] if entry else flag.kind
    option = typer.Option(
        *flag.names,
        help=help_of(flag, entry),
        rich_help_panel=flag.panel,
        show_default=False,
        autocompletion=_completion(flag, entry.get("choices", [])),
    )
    return Annotated[list[str] | None if kind is list else kind | None, option]


def _completion(flag: Flag, choices: list[str]) -> Callable[[typer.Context, str], list[str]] | None:
    """Return the function that completes the values of a flag: choices and words, then runs in the workspace."""
    if not (choices or flag.words or flag.runs):
        return None

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        found = [*choices, *flag.words, *_runs(ctx.params.get(WORKSPACE.parameter), flag)]
        return [word for word in found if word.startswith(incomplete)]

    return complete


def _runs(folder: Any, flag: Flag) -> Iterator[str]:
    """Yield what the workspace has for a flag: names of finished runs, or paths of files."""
    root = Workspace.locate(None if folder is None else Path(folder).expanduser()).root
    for pattern in flag.runs:
        for path in sorted(root.glob(pattern)):
            if path.suffix == ".pt":
                yield str(path)
            elif not path.name.startswith(".") and (path / "manifest.json").exists():
                yield path.name


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
