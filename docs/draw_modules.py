"""Draw the modules of the package: who imports whom, from the door down. `make drawing` puts it into architecture.md.

The import graph is grimp's; imports inside of functions count.
"""

import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

from aligndet_cli import config

PAGE = Path(__file__).parent / "architecture.md"
# A room imports from the floors below its own, never from its own or from above.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands", "api"),
    ("tools",),
    ("driver",),
    tuple(stage.replace("-", "_") for stage in config.STAGES),
    ("stage",),
    ("detectors",),
    ("backbones", "training", "metrics"),
    ("artifacts",),
    ("data",),
    ("processes",),
    ("plotting", "drawing", "tables", "flags", "arrays", "compiling", "hub"),
    ("workspace", "fonts"),
    ("config", "logs", "files", "cards"),
    ("config_errors",),
    ("errors",),
)


def draw() -> str:
    """Return one line per room, with the rooms it imports from, and the number of circles and of imports that go up.

    Raises:
        CycleError: modules that import each other in a circle.
    """
    graph = grimp.build_graph("aligndet_cli")
    modules = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    TopologicalSorter(modules).prepare()  # raises CycleError for a circle
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, imported in modules.items():
        own = _room(name)
        rooms[own] |= {_room(other) for other in imported} - {own, ""}
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    order = [room for floor in FLOORS for room in floor]
    num_up = sum(floor_of[other] <= floor_of[room] for room in order for other in rooms[room])
    lines = [f"{'room':<16}imports from"]
    for floor in FLOORS:
        lines += [f"{room:<16}{' '.join(sorted(rooms[room], key=order.index))}".rstrip() for room in floor]
    return "\n".join([*lines, "", f"0 circles, {num_up} go up"])


def put_into_page(page: str, drawing: str) -> str:
    """Return the page with the drawing in the block that begins with `room`."""
    block = "\n".join(f"    {line}".rstrip() for line in drawing.splitlines())
    return re.sub(r"^    room .*? go up$", lambda _: block, page, flags=re.DOTALL | re.MULTILINE)


def _room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


if __name__ == "__main__":
    PAGE.write_text(put_into_page(PAGE.read_text(encoding="utf-8"), draw()), encoding="utf-8")
