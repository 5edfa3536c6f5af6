"""Content of a workspace's page, before it becomes HTML."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aligndet_cli.config import STAGES, flatten
from aligndet_cli.data.dataset import class_labels
from aligndet_cli.files import read_json
from aligndet_cli.tools.report.collect import Report
from aligndet_cli.tools.report.commands import command_of
from aligndet_cli.tools.report.pictures import Embedded, Picture, embed_all, find_pictures
from aligndet_cli.tools.report.table import NUM_SETTING, cells_of
from aligndet_cli.tools.status import StatusRow, collect_status
from aligndet_cli.workspace import Artifact, Workspace

_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@dataclass(frozen=True)
class Cell:
    """Cell of a table: text, number to sort by in place of the text, and id of the run that it links to."""

    text: str
    value: float | None = None
    link: str | None = None


@dataclass(frozen=True)
class Table:
    """Table of the page.

    Attributes:
        name: id of the element.
        numbers: columns that hold numbers.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[int] = frozenset()
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class RunPart:
    """Part of the page about one artifact.

    Attributes:
        name: id of the element.
        facts: names and values of results, times and hashes.
        settings: dotted paths and values of all settings.
        left_out: pictures that did not fit.
    """

    name: str
    stage: str
    title: str
    facts: Sequence[tuple[str, str]]
    command: str | None
    tables: Sequence[Table]
    pictures: Sequence[Embedded]
    settings: Sequence[tuple[str, str]]
    left_out: Sequence[str]


@dataclass(frozen=True)
class Page:
    """Whole page, in its order.

    Attributes:
        commands: commands of all artifacts, oldest first.
        pictures: pictures that belong to no single artifact.
        packages: names and versions of packages; several versions if artifacts were made with several.
    """

    title: str
    workspace: str
    data: str
    comparison: Table | None
    measured: Table | None
    artifacts: Table
    commands: Sequence[str]
    pictures: Sequence[Embedded]
    runs: Sequence[RunPart]
    packages: Sequence[tuple[str, str]]
    left_out: Sequence[str]


def collect_page(workspace: Workspace, report: Report) -> Page:
    """Read all of a workspace but its comparison, which is the report."""
    artifacts = {f"{stage}/{found.name}": (stage, found) for stage in STAGES for found in workspace.artifacts(stage)}
    pictures = {name: find_pictures(workspace, found.folder, stage) for name, (stage, found) in artifacts.items()}
    general = find_pictures(workspace, workspace.root / "figures", "figures")
    general += find_pictures(workspace, workspace.root, "")
    newest_first = sorted(artifacts, key=lambda name: str(artifacts[name][1].manifest.get("finished")), reverse=True)
    embedded, left_out = embed_all([general, *(pictures[name] for name in newest_first)])
    made_in_order = [(*artifacts[name], name) for name in reversed(newest_first)]
    commands = {name: command_of(stage, found, str(workspace.root)) for stage, found, name in made_in_order}

    def shown(of: Sequence[Picture]) -> list[Embedded]:
        return [embedded[picture.path] for picture in of if picture.path in embedded]

    return Page(
        title=f"aligndet: {workspace.root.resolve().name}",
        workspace=str(workspace.root),
        data=str((workspace.recall("data") or {}).get("root") or ""),
        comparison=_comparison(report),
        measured=_measured(workspace),
        artifacts=_artifact_table(collect_status(workspace), {name: found for name, (_, found) in artifacts.items()}),
        commands=[command for command in commands.values() if command is not None],
        pictures=shown(general),
        runs=[
            RunPart(
                name=_id(name),
                stage=stage,
                title=found.name,
                facts=_facts(found),
                command=commands[name],
                tables=_class_tables(name, found) if stage == "evaluate" else [],
                pictures=shown(pictures[name]),
                settings=[(key, str(value)) for key, value in flatten(found.config()) if value is not None],
                left_out=[picture.file for picture in pictures[name] if picture in left_out],
            )
            for name, (stage, found) in artifacts.items()
        ],
        packages=_packages([found for _, found in artifacts.values()]),
        left_out=[picture.file for picture in left_out],
    )


def _comparison(report: Report) -> Table | None:
    if not report.rows:
        return None
    header, *lines = cells_of(report)
    numbers = frozenset(range(NUM_SETTING + 1, len(header) - (header[-1] == "remark")))
    rows = [[Cell(text, _leading_number(text)) for text in line] for line in lines]
    caption = (
        "Evaluated runs by their start, in percent; ± is the standard deviation, of differences the standard error"
    )
    return Table("comparison", caption, header, rows, numbers, report.remarks)


def _measured(workspace: Workspace) -> Table | None:
    rows = []
    for found in workspace.artifacts("evaluate"):
        metrics = read_json(found.folder / "metrics.json")
        link = _id(f"evaluate/{found.name}")
        rows.append([Cell(found.name, link=link), *(_percent(metrics.get(name)) for name in _NUMBERS)])
    caption = "COCO numbers of each evaluation, in percent (s, m, l: small, medium and large objects)"
    header = ("evaluation", *_NUMBERS)
    return Table("measured", caption, header, rows, frozenset(range(1, len(header)))) if rows else None


def _class_tables(name: str, found: Artifact) -> list[Table]:
    rows = []
    per_class = read_json(found.folder / "metrics.json").get("per_class", [])
    labels = class_labels({entry["category_id"]: entry["name"] for entry in per_class})
    for entry in per_class:
        objects = Cell(str(entry["ground_truths"]), entry["ground_truths"])
        rows.append([Cell(labels[entry["category_id"]]), _percent(entry["AP"]), _percent(entry["AP50"]), objects])
    header = ("class", "AP", "AP50", "objects")
    return [Table(f"classes-{_id(name)}", "Classes, in percent", header, rows, frozenset({1, 2, 3}))] if rows else []


def _artifact_table(rows: Sequence[StatusRow], artifacts: dict[str, Artifact]) -> Table:
    lines = []
    for row in rows:
        name = f"{row.stage}/{row.run}"
        found = artifacts.get(name) if row.finished else None
        manifest = found.manifest if found is not None else {}
        made_from, content_hash = ", ".join(row.made_from), str(manifest.get("content_hash", ""))
        texts = (row.state, row.remark, made_from, content_hash, _time(row.finished))
        lines.append([Cell(name, link=_id(name) if manifest else None), *map(Cell, texts), Cell(*_duration(manifest))])
    header = ("artifact", "state", "result", "made from", "content hash", "finished (UTC)", "took")
    caption = "What is in the workspace, and what it was made from"
    return Table("artifacts-table", caption, header, lines, frozenset({6}))


def _facts(found: Artifact) -> list[tuple[str, str]]:
    manifest = found.manifest
    plain = {key: value for key, value in found.result.items() if isinstance(value, str | int | float)}
    facts = [(key.replace("_", " "), _shown(value)) for key, value in plain.items()]
    facts += [(f"input: {key}", str(value)) for key, value in manifest["inputs"].items()]
    known = [key for key in ("content_hash", "config_hash", "seed") if key in manifest]
    facts += [(key.replace("_", " "), str(manifest[key])) for key in known]
    return [*facts, ("finished (UTC)", _time(str(manifest.get("finished", "")))), ("took", _duration(manifest)[0])]


def _packages(artifacts: Sequence[Artifact]) -> list[tuple[str, str]]:
    versions: dict[str, list[str]] = {}
    for found in artifacts:
        for package, version in found.manifest.get("packages", {}).items():
            versions.setdefault(package, []).append(version)
    return [(package, ", ".join(dict.fromkeys(found))) for package, found in versions.items()]


def _id(name: str) -> str:
    return "run-" + name.replace("/", "-")


def _percent(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{100 * value:.1f}", value)


def _leading_number(text: str) -> float | None:
    try:
        return float(text.split(" ")[0])
    except ValueError:
        return None


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _time(text: str) -> str:
    return text[:16].replace("T", " ")


def _duration(manifest: dict[str, Any]) -> tuple[str, float | None]:
    """Return the time from start to end, pauses included, in words and in seconds."""
    try:
        start, end = (datetime.datetime.fromisoformat(manifest[key]) for key in ("started", "finished"))
    except (KeyError, ValueError):
        return "", None
    seconds = (end - start).total_seconds()
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min", seconds
    return (f"{minutes} min {rest} s" if minutes else f"{rest} s"), seconds
