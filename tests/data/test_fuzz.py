"""Any label files, drawn by Hypothesis: no traceback, one answer everywhere, and no more than 1 GB of memory.

ALIGNDET_FUZZ_EXAMPLES=50000 searches longer. A failure prints the edits that show it: mend it, and add them to
`helpers/label_examples.py`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.open import open_images
from helpers.label_examples import EXAMPLES, HUGE
from helpers.label_fuzz import BASES, prepare, try_labels, written
from helpers.mutations import Edit, changed

TESTS = Path(__file__).parents[1]
ASKED = int(os.environ.get("ALIGNDET_FUZZ_EXAMPLES", 0))


@pytest.mark.slow
@pytest.mark.timeout(300 + ASKED)
@pytest.mark.parametrize(("kind", "num_examples"), [("coco", 1600), ("voc", 700), ("yolo", 700)])
def test_any_labels_give_one_answer_and_no_traceback(kind: str, num_examples: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "helpers.label_fuzz", kind, str(tmp_path), str(ASKED or num_examples)]
    ran = subprocess.run(command, cwd=TESTS, capture_output=True, encoding="utf-8", errors="backslashreplace")
    last = tmp_path / "edits.txt"  # of a process that did not live to tell
    tried = last.read_text(encoding="utf-8") if ran.returncode < 0 and last.exists() else ""
    assert ran.returncode == 0, f"exit {ran.returncode}\n{ran.stdout[-4000:]}\n{ran.stderr[-8000:]}\n{tried}"


def _examples() -> Iterator[object]:
    for kind in BASES:
        yield from ((kind, edits) for edits in EXAMPLES[kind])


@pytest.mark.parametrize(("kind", "edits"), [*_examples()])
def test_what_once_failed_gives_one_answer(kind: str, edits: list[Edit], tmp_path: Path) -> None:
    prepare(tmp_path, kind)
    files = changed(BASES[kind], edits)
    assert files != BASES[kind]
    try_labels(tmp_path, files)


@pytest.mark.parametrize("kind", BASES)
def test_the_labels_that_are_changed_are_sound(kind: str, tmp_path: Path) -> None:
    prepare(tmp_path, kind)
    try_labels(tmp_path, BASES[kind])
    with written(tmp_path, BASES[kind]):
        report = check_data(DataConfig(root=tmp_path), num_threads=1)
        assert report.summary["format"] == kind and not report.count("error") + report.count("warning")
        image_set = open_images(DataConfig(root=tmp_path), purpose="train", with_masks=True)
        assert (image_set.segmentations is not None) == (kind != "voc")
        assert len(image_set.boxes) == {"coco": 5, "voc": 2, "yolo": 2}[kind]


def test_labels_that_take_all_memory_end_the_child_alone() -> None:
    body = "from helpers.label_fuzz import MAX_BYTES, limit_memory\nlimit_memory()\nbytearray(2 * MAX_BYTES)"
    ran = subprocess.run([sys.executable, "-c", body], cwd=TESTS, capture_output=True, text=True)
    assert ran.returncode == 1 and "MemoryError" in ran.stderr


@pytest.mark.parametrize("name", HUGE)
def test_no_label_takes_all_memory(name: str, tmp_path: Path) -> None:
    call = f"try_alone(pathlib.Path({str(tmp_path)!r}), {name!r})"
    body = f"import pathlib\nfrom helpers.label_fuzz import try_alone\n{call}"
    ran = subprocess.run([sys.executable, "-c", body], cwd=TESTS, capture_output=True, text=True)
    assert ran.returncode == 0, f"exit {ran.returncode}\n{ran.stderr[-2000:]}"
