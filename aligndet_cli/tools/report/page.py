"""Content of a workspace's page, before it becomes HTML."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aligndet_cli.artifacts.starts import Start, find_starts, measured_run
from aligndet_cli.config import STAGES, flatten
from aligndet_cli.data.dataset import class_labels
from aligndet_cli.files import read_json
from aligndet_cli.tools.report.collect import Report, Row, headline
from aligndet_cli.tools.report.commands import command_of
from aligndet_cli.tools.report.pictures import Embedded, Picture, embed_all, find_pictures
from aligndet_cli.tools.report.table import SETTING_COLUMNS, in_words, setting_cells, shown
from aligndet_cli.tools.status import StatusRow, collect_status
from aligndet_cli.workspace import Artifact, Workspace

_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        value: number to sort by in place of the text.
        link: id of the run that it links to.
        colour: of the start that it names.
    """

    text: str
    value: float | None = None
    link: str | None = None
    colour: str | None = None


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
class Bar:
    """Bar of the chart; numbers are shares of its width.

    Attributes:
        low, high: ends of the error bar; None with a single run.
        told: the number in words.
    """

    label: str
    colour: str
    length: float
    low: float | None
    high: float | None
    told: str


@dataclass(frozen=True)
class Chart:
    """Bar chart of the first metric: bars of the starts of each setting, by what sets it apart from the others."""

    caption: str
    groups: Sequence[tuple[str, Sequence[Bar]]]


@dataclass(frozen=True)
class RunPart:
    """Part of the page about one artifact.

    Attributes:
        name: id of the element.
        start: what the run, or the measured run, started from.
        facts: names and values of results, times and hashes.
        settings: dotted paths and values of all settings.
        left_out: pictures that did not fit.
    """

    name: str
    stage: str
    title: str
    start: Start | None
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
        headline: what came out, in one sentence; empty if nothing was measured.
        commands: commands of all artifacts, oldest first.
        pictures: pictures that belong to no single artifact.
        packages: names and versions of packages; several versions if artifacts were made with several.
    """

    title: str
    workspace: str
    data: str
    headline: str
    chart: Chart | None
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
    starts, tuned = find_starts(workspace), workspace.artifacts("finetune")
    start_of = {name: _start_of(stage, found, tuned, starts) for name, (stage, found) in artifacts.items()}
    labels = {name.removeprefix("evaluate/"): start.label for name, start in start_of.items() if start is not None}
    pictures = {
        name: find_pictures(workspace, found.folder, stage, labels) for name, (stage, found) in artifacts.items()
    }
    general = find_pictures(workspace, workspace.root / "figures", "figures")
    general += find_pictures(workspace, workspace.root, "")
    newest_first = sorted(artifacts, key=lambda name: str(artifacts[name][1].manifest.get("finished")), reverse=True)
    embedded, left_out = embed_all([general, *(pictures[name] for name in newest_first)])
    made_in_order = [(*artifacts[name], name) for name in reversed(newest_first)]
    commands = {name: command_of(stage, found, str(workspace.root)) for stage, found, name in made_in_order}

    def embedded_of(of: Sequence[Picture]) -> list[Embedded]:
        return [embedded[picture.path] for picture in of if picture.path in embedded]

    return Page(
        title=f"aligndet: {workspace.root.resolve().name}",
        workspace=str(workspace.root),
        data=str((workspace.recall("data") or {}).get("root") or ""),
        headline=headline(report),
        chart=_chart(report),
        comparison=_comparison(report),
        measured=_measured(workspace, start_of),
        artifacts=_artifact_table(collect_status(workspace), {name: found for name, (_, found) in artifacts.items()}),
        commands=[command for command in commands.values() if command is not None],
        pictures=embedded_of(general),
        runs=[
            RunPart(
                name=_id(name),
                stage=stage,
                title=found.name,
                start=start_of[name],
                facts=_facts(found),
                command=commands[name],
                tables=_class_tables(name, found) if stage == "evaluate" else [],
                pictures=embedded_of(pictures[name]),
                settings=[(key, str(value)) for key, value in flatten(found.config()) if value is not None],
                left_out=[picture.file for picture in pictures[name] if picture in left_out],
            )
            for name, (stage, found) in artifacts.items()
        ],
        packages=_packages([found for _, found in artifacts.values()]),
        left_out=[picture.file for picture in left_out],
    )


def _start_of(stage: str, found: Artifact, tuned: Sequence[Artifact], starts: dict[str, Start]) -> Start | None:
    run = measured_run(found, tuned) if stage == "evaluate" else found if stage == "finetune" else None
    return None if run is None else starts.get(run.name)


def _settings_apart(report: Report) -> tuple[list[int], str]:
    """Return the places of `SETTING_COLUMNS` that differ between rows, and the others in words."""
    lines = [setting_cells(row.setting) for row in report.rows]
    apart = [place for place in range(len(SETTING_COLUMNS)) if len({line[place] for line in lines}) > 1]
    equal = [
        in_words(title, text)
        for place, (title, text) in enumerate(zip(SETTING_COLUMNS, lines[0], strict=True))
        if place not in apart
    ]
    return apart, ", ".join(equal)


def _comparison(report: Report) -> Table | None:
    """Return start, metric and difference first, then what sets the rows apart, then the other metrics."""
    if not report.rows:
        return None
    apart, equal = _settings_apart(report)
    first, *others = report.metrics
    header = ["start", first, f"Δ\u00a0{first}", "wins", "setting", "runs"]
    header += [title for metric in others for title in (metric, f"Δ\u00a0{metric}")]
    lines = []
    for row in report.rows:
        numbers = {metric: _numbers_of(row, metric) for metric in report.metrics}
        cells = [*numbers[first], Cell(_setting_of(row, apart)), Cell(str(len(row.runs)), len(row.runs))]
        cells += [cell for metric in others for cell in numbers[metric][:2]]
        lines.append([Cell(row.label, colour=row.colour), *cells, Cell(_published(row)), Cell(row.remark)])
    header += ["paper", "remark"]
    kept = [place for place in range(len(header)) if any(line[place].text for line in lines)]
    words = {header.index(title) for title in ("start", "setting", "paper", "remark")}
    caption = (
        f"Evaluated runs by their start{f': {equal}' if equal else ''}. Numbers are percent; ± is the standard "
        "deviation over runs, and of a difference (Δ) over pairs of equal seed and labels its standard error."
    )
    return Table(
        "comparison",
        caption,
        [header[place] for place in kept],
        [[line[place] for place in kept] for line in lines],
        frozenset(place for place, column in enumerate(kept) if column not in words),
        report.remarks,
    )


def _setting_of(row: Row, apart: Sequence[int]) -> str:
    texts = setting_cells(row.setting)
    return ", ".join(texts[place] for place in apart)


def _published(row: Row) -> str:
    """Return the paper's numbers of a row, in percent."""
    found = {metric: one.published for metric, one in row.summaries.items() if one.published is not None}
    numbers = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in found.items())
    return f"{numbers} ({row.published_in})" if numbers else ""


def _numbers_of(row: Row, metric: str) -> list[Cell]:
    """Return value, difference and wins; a number breaks before its error only."""
    texts = shown(row.summaries.get(metric))[:3]
    return [Cell(text.replace("± ", "±\u00a0"), _leading_number(text)) for text in texts]


def _chart(report: Report) -> Chart | None:
    metric = report.metrics[0]
    rows = [row for row in report.rows if metric in row.summaries]
    if not rows:
        return None
    apart, _ = _settings_apart(report)
    ends = [(row.summaries[metric].mean + (row.summaries[metric].std or 0.0)) for row in rows]
    full = max(ends) or 1.0
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        one = row.summaries[metric]
        low, high = (None, None) if one.std is None else (max(one.mean - one.std, 0), one.mean + one.std)
        value, delta = shown(one)[:2]
        told = f"{value} ({delta})" if delta else value
        shares = (one.mean / full, None if low is None else low / full, None if high is None else high / full)
        groups.setdefault(_setting_of(row, apart), []).append(Bar(row.label, row.colour, *shares, told))
    bases = dict.fromkeys(row.label for row in rows if row.is_baseline)
    has_deltas = any(row.summaries[metric].delta for row in rows)
    brackets = f"; in brackets the difference to {' or '.join(bases)}, ± its standard error" if has_deltas else ""
    lines = "A line is one standard deviation over runs to both sides; a single run has none."
    return Chart(f"{metric} in percent by start{brackets}. {lines}", list(groups.items()))


def _measured(workspace: Workspace, start_of: dict[str, Start | None]) -> Table | None:
    rows = []
    for found in workspace.artifacts("evaluate"):
        metrics, start = read_json(found.folder / "metrics.json"), start_of[f"evaluate/{found.name}"]
        named = Cell(start.label, colour=start.colour) if start is not None else Cell("–")
        numbers = [_percent(metrics.get(name)) for name in _NUMBERS]
        rows.append([Cell(found.name, link=_id(f"evaluate/{found.name}")), named, *numbers])
    caption = "COCO numbers of each evaluation, in percent; s, m and l are small, medium and large objects."
    header = ("evaluation", "start", *_NUMBERS)
    return Table("measured", caption, header, rows, frozenset(range(2, len(header)))) if rows else None


def _class_tables(name: str, found: Artifact) -> list[Table]:
    rows = []
    per_class = read_json(found.folder / "metrics.json").get("per_class", [])
    labels = class_labels({entry["category_id"]: entry["name"] for entry in per_class})
    for entry in per_class:
        objects = Cell(str(entry["ground_truths"]), entry["ground_truths"])
        rows.append([Cell(labels[entry["category_id"]]), _percent(entry["AP"]), _percent(entry["AP50"]), objects])
    header = ("class", "AP", "AP50", "objects")
    return (
        [
            Table(
                f"classes-{_id(name)}",
                "AP and AP50 of each class, in percent, and the number of labelled objects.",
                header,
                rows,
                frozenset({1, 2, 3}),
            )
        ]
        if rows
        else []
    )


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
    caption = "What is in the workspace, and what it was made from."
    return Table("artifacts-table", caption, header, lines, frozenset({6}))


def _facts(found: Artifact) -> list[tuple[str, str]]:
    manifest = found.manifest
    plain = {key: value for key, value in found.result.items() if isinstance(value, str | int | float)}
    facts = [(key.replace("_", " "), _shown(key, value)) for key, value in plain.items()]
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


def _shown(key: str, value: Any) -> str:
    if isinstance(value, float) and (key == "value" or key.removeprefix("mask_").startswith("AP")):
        return f"{100 * value:.1f} %"
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
