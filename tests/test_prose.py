"""Docstrings of the package: arrays have shapes, first words say what is done; sizes of functions and files.

A function is counted where it is public (its name and those of its class and module begin with no underscore), stands
in a module or a class, and has an array in its annotations: `Tensor`, `NDArray`, `np.ndarray`, or a name that the
package gives to one of these (`Rows = NDArray[np.int64]`). It tells its shapes where its docstring, or its class's,
holds one of:

- a shape, `(N, 4)`, `(B, 3, H, W)`, `(N,)`: its sides are numbers, capitals, words in snake_case, their sums, or dots;
- a pointer to where the shape is told: "see `X`";
- "scalar" or "state dict", which have none.
"""

import ast
import functools
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import aligndet_cli

PACKAGE = Path(aligndet_cli.__file__).parent
ARRAY = re.compile(r"\b(?:Tensor|NDArray|ndarray)\b")
SIDE = r"(?:(?:[A-Z]\w?|\d+|\.\.\.|[a-z]+(?:_[a-z]+)+)(?: ?[-+*/] ?\w+)*|\w+ [-+*/] \w+)"
TOLD = re.compile(rf"\({SIDE}(?:,|(?:, {SIDE})+)\)|\b[Ss]ee `|\bscalars?\b|\bstate.dicts?\b")
QUESTIONS = re.compile(r"(?:What|Whether|Which|Where|How|Who)\b")
SHARE_WITH_SHAPES = 0.95
MOST_LINES, MEDIAN_LINES, MOST_FILE_LINES = 53, 10, 400

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Defined:
    """A module, class or function, with the class that it stands in, if it is a method."""

    place: str
    node: ast.Module | ast.ClassDef | Function
    owner: ast.ClassDef | None = None
    is_public: bool = True

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Parsed files of the package by relative path."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def definitions() -> Iterator[Defined]:
    """Yield every module and what it defines; functions in functions are no part of what others read."""
    for name, module in trees().items():
        yield Defined(name, module)
        yield from members_of(Defined(name, module, None, not Path(name).name.startswith("_")))


def members_of(outer: Defined) -> Iterator[Defined]:
    assert not isinstance(outer.node, Function)
    owner = outer.node if isinstance(outer.node, ast.ClassDef) else None
    for node in outer.node.body:
        if isinstance(node, ast.ClassDef | Function):
            found = Defined(
                f"{outer.place}:{node.name}", node, owner, outer.is_public and not node.name.startswith("_")
            )
            yield found
            if isinstance(node, ast.ClassDef):
                yield from members_of(found)


def functions() -> Iterator[tuple[Defined, Function]]:
    return ((found, found.node) for found in definitions() if isinstance(found.node, Function))


def names_of_arrays() -> re.Pattern[str]:
    """Return what is an array in an annotation: the names of the libraries, and the package's own for them."""
    names = set()
    for node in (node for module in trees().values() for node in module.body):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and ARRAY.search(ast.unparse(node.value))
        ):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return re.compile(rf"{ARRAY.pattern}|\b(?:{'|'.join(sorted(names))})\b")


def annotations_of(function: Function) -> str:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    written = [argument.annotation for argument in every if argument is not None]
    return " ".join(ast.unparse(annotation) for annotation in [*written, function.returns] if annotation is not None)


def tells_shapes(found: Defined) -> bool:
    legend = ast.get_docstring(found.owner) if found.owner else None
    return any(TOLD.search(text) for text in (found.docstring, legend or ""))


def test_functions_that_take_or_return_arrays_tell_their_shapes() -> None:
    is_array = names_of_arrays()
    counted = [found for found, node in functions() if found.is_public and is_array.search(annotations_of(node))]
    without = [found.place for found in counted if not tells_shapes(found)]
    share = 1 - len(without) / len(counted)
    assert share >= SHARE_WITH_SHAPES, "\n".join([f"{share:.1%} of {len(counted)} tell their shapes; not:", *without])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Boxes (N, 4) xyxy.", True),
        ("images (B, 3, H, W), float", True),
        ("(N,) ids of (S1, D) and (..., K + 1)", True),
        ("(num_boxes, 4)", True),
        ("(stop - start,) cluster ids", True),
        ("Returns a scalar.", True),
        ("Arguments: see `ImageBatch`.", True),
        ("The state dict without its prefix.", True),
        ("Boxes (of both, if there are any), as they are seen.", False),
        ("(a, b) of ruler.", False),
    ],
)
def test_shapes_are_recognised(text: str, expected: bool) -> None:
    assert bool(TOLD.search(text)) == expected


def test_first_words_are_no_questions() -> None:
    asking = [
        f"{found.place}: {found.docstring.splitlines()[0]}"
        for found in definitions()
        if QUESTIONS.match(found.docstring)
    ]
    assert not asking, "\n".join([f"{len(asking)} docstrings:", *asking])


def test_functions_are_short() -> None:
    lines = {found.place: (node.end_lineno or 0) - node.lineno + 1 for found, node in functions()}
    assert {place: number for place, number in lines.items() if number > MOST_LINES} == {}
    assert statistics.median(lines.values()) <= MEDIAN_LINES


def test_files_are_short() -> None:
    lines = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in trees()}
    assert {name: number for name, number in lines.items() if number > MOST_FILE_LINES} == {}
