"""The pages of the documentation: what they say to type exists, and their site builds without a dead link."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from aligndet_cli.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
# A line of a block of code, `$ aligndet ...` where its output follows; and code within a sentence.
TYPED = re.compile(r"^(?: {4})?(?:\$ )?(?:\w+=\S+ )*aligndet (\S.*)$|`aligndet ([^`]+)`", flags=re.MULTILINE)
FLAG = re.compile(r"(?<![\w`-])`?(--[a-z][a-z-]*)")
# Of pip, mkdocs, torchrun, sbatch, srun, docker and the benchmarks of tests/benchmarks/.
FOREIGN = {"--strict", "--array", "--wrap", "--nproc-per-node", "--no-python", "--nnodes", "--nodes", "--gres"}
FOREIGN |= {"--ntasks-per-node", "--rdzv-backend", "--rdzv-endpoint", "--signal", "--requeue"}
FOREIGN |= {"--shm-size", "--pty", "--tag", "--build-arg", "--rm", "--volume", "--gpus", "--user", "--index-url"}
FOREIGN |= {
    "--rows",
    "--channels",
    "--workers",
    "--backends",
    "--rounds",
    "--full",
    "--minutes",
    "--size",
    "--apart",
    "--sides",
}
FOREIGN |= {"--detectors", "--photos", "--boxes", "--batches", "--lines"}


def commands() -> dict[str, Any]:
    """Return every command by the words that name it, such as `config show`."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {word}": one for word, one in inner.items()} if inner else {name: command}
    return found


def flags_of(command: Any) -> set[str]:
    return {"--help", "-h"} | {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}


def typed_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield page and words of every command line; `aligndet COMMAND` and other placeholders are left out."""
    for page in PAGES:
        for block, inline in TYPED.findall(page.read_text()):
            words = re.split(r"\s+#|[|;&]|\s{2,}", block or inline)[0].split()
            if words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
                yield page.name, words


def test_every_command_line_has_a_known_command_and_known_flags() -> None:
    known, root = commands(), flags_of(typer.main.get_command(app))
    lines = list(typed_lines())
    assert len(lines) > 50
    unknown = []
    for page, words in lines:
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
        flags = flags_of(known[name]) if name else root
        if name is None or [w for w in words if re.match(r"--?[a-z]", w) and w.split("=")[0] not in flags]:
            unknown.append((page, " ".join(words)))
    assert unknown == []


def test_every_flag_that_is_named_exists() -> None:
    known = FOREIGN | flags_of(typer.main.get_command(app))
    for command in commands().values():
        known |= flags_of(command)
    named = [(page.name, flag) for page in PAGES for flag in FLAG.findall(page.read_text())]
    assert [(page, flag) for page, flag in named if flag not in known] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    words = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ran = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr  # a dead link, or a page that the menu lacks
    return folder


def test_every_page_is_on_the_site(site: Path) -> None:
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in site.glob("*.html")}
    assert (site / "examples" / "study.toml").read_bytes() == (ROOT / "examples" / "study.toml").read_bytes()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [page.read_text() for page in site.rglob("*.html")]
    loaded = [tag for page in pages for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page)]
    assert loaded and [tag for tag in loaded if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)] == []
