"""Whatever code, tests and pages cite of this repository is there: sections of docs/, links and files."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("aligndet_cli", "tests", "examples", "docs")
SUFFIXES = {".md", ".py", ".sh", ".toml", ".txt"}
NUMBERS = r"§?\d+(?:\.\d+)*"
# `docs/paper.md §4.3`, and several: `docs/paper.md §8.1, §8.2`, `docs/differences.md 3 and 5`.
CITED = re.compile(rf"docs/(\w+)\.md((?:(?:,| and)? {NUMBERS})+)")
# Between pages of docs/: `[§4.3](paper.md)`, `[differences 3](differences.md)`.
LINKED = re.compile(rf"\[(?:differences )?({NUMBERS})\]\((?:docs/)?(\w+)\.md\)")
OWN = re.compile(rf"(?<!paper )(?<!Paper )({NUMBERS.replace('?', '', 1)})")  # in paper.md: §4.3, but not "paper §4.1"
HEADING = re.compile(r"^#{2,3} (\d+(?:\.\d+)*)\.? ", flags=re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:aligndet_cli|tests|examples|docs)/[\w./-]+)`")
# Documents and tasks that a clone does not have.
UNKNOWN = re.compile(r"\b(?:FACTS|DIFFERENCES|DESIGN)\b|\b[Ii]ssues? \d")


def texts() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every file that may cite something, this one left out."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    for file in sorted([*files, *ROOT.glob("*.md")]):
        if file != Path(__file__):
            yield str(file.relative_to(ROOT)), file.read_text()


def pages() -> Iterator[tuple[str, str]]:
    return ((name, text) for name, text in texts() if name.endswith(".md"))


def numbers_of(page: str) -> list[str]:
    """Return the numbers of the headings of a page in docs/."""
    return HEADING.findall((ROOT / "docs" / f"{page}.md").read_text())


def citations_in(name: str, text: str) -> set[tuple[str, str]]:
    """Return `(page, number)` of all that a text cites; a citation may go on in the next line of a comment."""
    flat = re.sub(r"\s*\n\s*(?:# )?", " ", text)
    cited = {(page, number) for page, some in CITED.findall(flat) for number in re.findall(NUMBERS, some)}
    cited |= {(page, number) for number, page in LINKED.findall(flat)}
    if name == "docs/paper.md":
        cited |= {("paper", number) for number in OWN.findall(flat)}
    return cited


@pytest.mark.parametrize("page", ["paper", "differences"])
def test_numbers_are_unique(page: str) -> None:
    numbers = numbers_of(page)
    assert numbers and len(set(numbers)) == len(numbers)


def test_every_cited_section_exists() -> None:
    known = {page: set(numbers_of(page)) for page in ("paper", "differences")}
    cited = [(name, *citation) for name, text in texts() for citation in citations_in(name, text)]
    assert [c for c in cited if c[2].lstrip("§") not in known.get(c[1], set())] == []
    # `docs/paper.md` is cited with the sign of a section, `docs/differences.md` without.
    assert [c for c in cited if c[2].startswith("§") != (c[1] == "paper")] == []
    assert {c[1] for c in cited if c[0].endswith(".py")} == {"paper", "differences"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see docs/paper.md §4.3.", {("paper", "§4.3")}),
        ("Source: docs/paper.md §8.1, §8.2: features", {("paper", "§8.1"), ("paper", "§8.2")}),
        ("    # docs/differences.md\n    # 3 and 16), 7 boxes", {("differences", "3"), ("differences", "16")}),
        ("([differences 3](differences.md), [§2](paper.md))", {("differences", "3"), ("paper", "§2")}),
        ("docs/paper.md states the method, RetinaNet paper §4.1", set()),
    ],
)
def test_citations_are_recognised(text: str, expected: set[tuple[str, str]]) -> None:
    assert citations_in("some.py", text) == expected


def test_nothing_is_cited_that_a_clone_does_not_have() -> None:
    assert [(name, found) for name, text in texts() for found in UNKNOWN.findall(text)] == []


def test_relative_links_resolve() -> None:
    links = [(name, link) for name, text in pages() for link in LINK.findall(text)]
    relative = [(name, link) for name, link in links if link and not re.match(r"[a-z]+:", link)]
    assert relative
    assert [(name, link) for name, link in relative if not ((ROOT / name).parent / link).exists()] == []


def test_named_files_exist() -> None:
    named = [(name, file) for name, text in pages() for file in FILE.findall(text)]
    assert [(name, file) for name, file in named if not (ROOT / file).exists()] == []
