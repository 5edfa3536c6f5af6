"""The command that makes an artifact again."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from aligndet_cli.config import StageConfig, flatten, parse_value
from aligndet_cli.errors import ConfigError
from aligndet_cli.flags import Flag, known_settings
from aligndet_cli.stage import find_stage
from aligndet_cli.workspace import Artifact


def command_of(stage: str, artifact: Artifact, workspace: str) -> str | None:
    """Return `aligndet STAGE DATA ...` with all settings that are not defaults, to be pasted into a shell.

    There is none for imported weights, and for artifacts of other versions.
    """
    try:
        config = find_stage(stage).steps().config.model_validate(artifact.config())
    except (ValidationError, ConfigError, OSError):
        return None
    settings = dict(_changed(config))
    root = settings.pop("data.root", None)
    flags = {flag.path: flag for flag in find_stage(stage).flags if flag.path}
    words = ["aligndet", stage, *([root] if root else []), "-w", workspace]
    known = known_settings(stage)
    for path, value in settings.items():
        words += _words(flags.get(path), known.get(path, {}).get("kind"), path, value)
    return shlex.join(words)


def _changed(config: StageConfig) -> Iterator[tuple[str, Any]]:
    """Yield settings that differ from the defaults and are set, and the detector's family if it does."""
    full = config.to_json()
    plain = type(config)().to_json()
    family = full.get("detector", {}).get("family")
    if family is not None and family != plain["detector"]["family"]:
        yield "detector.family", family
    for path, value in flatten(config.model_dump(mode="json", exclude_defaults=True)):
        # `offline` belongs to the machine, not to the run. An empty group has another kind and is unchanged otherwise.
        if path not in ("runtime.offline", "detector.family") and value not in (None, {}):
            yield path, value


def _words(flag: Flag | None, kind: str | None, path: str, value: Any) -> list[str]:
    """Return a setting as words of the command line: its flag, or `--set`."""
    if flag is None or (kind == "bool" and value is False and "/" not in flag.names[0]):
        is_plain = isinstance(value, str) and parse_value(value) == value
        return ["--set", f"{path}={value if is_plain else json.dumps(value, ensure_ascii=False)}"]
    if kind == "bool":
        positive, _, negative = flag.names[0].partition("/")
        return [positive if value else negative]
    return [flag.word, ",".join(map(str, value)) if kind == "list" else str(value)]
