"""The rooms of the house: who may import whom. docs/architecture.md has the drawing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import aligndet_cli

PACKAGE = Path(aligndet_cli.__file__).parent
STAGES = ("pretrain_image", "proposals", "cluster", "pretrain_box", "finetune", "evaluate")
# From the door down: a room imports those below its own line, never those on it or above. Lazy imports count.
FLOORS = (
    ("cli",),
    ("commands",),
    ("tools",),
    ("driver",),
    STAGES,
    ("stage",),
    ("detectors",),
    ("backbones", "training", "metrics"),
    ("artifacts",),
    ("data",),
    ("processes",),
    ("drawing", "plotting", "tables", "flags", "arrays"),
    ("workspace",),
    ("config", "logs", "files"),
    ("errors",),
)


def imports() -> Iterator[tuple[str, str, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aligndet_cli"):
                parts = str(node.module).split(".")
                for room in parts[1:2] or [alias.name for alias in node.names]:
                    yield str(path), path.parts[0].removesuffix(".py"), room


def test_nothing_imports_upwards_and_stages_are_strangers() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = [
        f"{file} imports {room}"
        for file, own, room in imports()
        if own not in (room, "__init__") and not room.startswith("__") and floor_of[room] <= floor_of[own]
    ]
    assert wrong == []
