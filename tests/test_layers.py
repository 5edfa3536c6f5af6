"""The rooms of the house: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

from draw_modules import FLOORS, PAGE, draw, put_into_page

import aligndet_cli

PACKAGE = Path(aligndet_cli.__file__).parent


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield file, its room, and the room that it imports from; imports inside of functions count."""
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


def test_the_drawing_of_the_modules_is_of_today() -> None:
    drawing = draw()  # raises for a circle
    page = PAGE.read_text(encoding="utf-8")
    assert drawing.endswith("0 circles, 0 go up")
    assert put_into_page(page, drawing) == page, "run `make drawing`"
