"""The report of `tests/benchmarks/gpu.py`: what was measured in its cells, as JSON and Markdown."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from aligndet_cli.tools.bench.clock import PARTS
from aligndet_cli.tools.bench.plan import StageName

Mode = Literal["eager", "compile"]
COLUMNS = (
    *("detector", "stage", "mode", "images/s", "ms a step (spread)", "GB", "GFLOP an image", "share of peak"),
    *("GPU busy", "waiting for data", "host waits", "first 3 steps"),
)
SPLIT = tuple(part for name in PARTS for part in (("matching", "losses") if name == "matching and losses" else (name,)))


@dataclass(frozen=True)
class Cell:
    """What is measured in one go."""

    detector: str
    stage: StageName
    mode: Mode


@dataclass
class Figures:
    """What came out. Seconds and counts are of a step; `busy` is the share in which the GPU computes.

    `problem` is what went wrong in a line; figures that were measured before it stay.
    """

    cell: Cell
    images_per_s: float | None = None
    step_ms: float | None = None
    spread_ms: float | None = None
    first_steps_s: float | None = None
    memory_gb: float | None = None
    waiting: float | None = None
    gflop_per_image: float | None = None
    tflops: float | None = None
    busy: float | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, float, int]] = field(default_factory=list)
    host_waits: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    trace_of_problem: str = ""


def line_of(figures: Figures) -> str:
    cell, speed = figures.cell, figures.images_per_s
    what = f"{cell.detector} {cell.stage} {cell.mode}: "
    return what + (figures.problem or f"{speed:.1f} images/s, {figures.memory_gb:.1f} GB")


def write(folder: Path, machine: dict[str, Any], figures: Sequence[Figures], left_out: Sequence[Cell]) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **machine,
        "cells": [asdict(one) for one in figures],
        "left_out": [asdict(cell) for cell in left_out],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "report.md").write_text("\n".join(lines_of(machine, figures, left_out)) + "\n")


def lines_of(machine: dict[str, Any], figures: Sequence[Figures], left_out: Sequence[Cell]) -> Iterator[str]:
    """The Markdown file."""
    peak = machine["peak_tflops"] or machine["matrix_tflops"]
    of = "its data sheet's peak" if machine["peak_tflops"] else "what it does in products of matrices"
    yield f"{machine['card']}, torch {machine['torch']}, commit {machine['commit']}, "
    yield f"batches of {machine['batch_size']}, {machine['precision']}. "
    yield f"Products of bf16 matrices: {machine['matrix_tflops']:.0f} TFLOP/s."
    yield f"Shares are of {of}, {peak:.0f} TFLOP/s. Command: `{machine['command']}`\n"
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for f in figures:
        yield _row(f, peak)
    yield "\nMilliseconds of a step, waiting for the GPU after every part:\n"
    yield "| detector | stage | " + " | ".join(SPLIT) + " |"
    yield "|---|---|" + "---|" * len(SPLIT)
    for f in figures:
        if f.parts_ms:
            cells = " | ".join(f"{f.parts_ms[part]:.1f}" for part in SPLIT)
            yield f"| {f.cell.detector} | {f.cell.stage} | {cells} |"
    for f in figures:
        if f.kernels:
            yield f"\n## {f.cell.detector}, {f.cell.stage}, {f.cell.mode}\n\nMilliseconds and calls a step:\n"
            yield from (f"- {ms:.2f}, {count} x `{name}`" for name, ms, count in f.kernels)
            yield f"\nThe host waits {sum(f.host_waits.values())} times a step:\n"
            yield from (f"- {count} x `{place}`" for place, count in f.host_waits.items())
    for f in figures:
        if f.trace_of_problem:
            yield f"\n## What went wrong in {f.cell.detector}, {f.cell.stage}, {f.cell.mode}\n"
            yield f"```\n{f.trace_of_problem}```"
    if left_out:
        yield "\nNo time was left for: " + ", ".join(f"{c.detector} {c.stage} {c.mode}" for c in left_out)


def _row(f: Figures, peak: float) -> str:
    start = f"| {f.cell.detector} | {f.cell.stage} | {f.cell.mode} | "
    if f.images_per_s is None:
        return start + f"{f.problem} |" + " |" * 8
    shares = [f.tflops and f.tflops / peak, f.busy, f.waiting]
    told = ["" if share is None else f"{share:.0%}" for share in shares]
    gflop = "" if f.gflop_per_image is None else f"{f.gflop_per_image:,.1f}"
    memory = "" if f.memory_gb is None else f"{f.memory_gb:.1f}"
    cells = [f"{f.images_per_s:.1f}", f"{f.step_ms:.1f} ({f.spread_ms:.1f})", memory, gflop, *told]
    cells += [f.problem or str(sum(f.host_waits.values())), f"{f.first_steps_s:.0f} s"]
    return start + " | ".join(cells) + " |"
