"""Write docs/labels.md: what becomes of every odd entry that the tests push through all stages.

`make labels` runs this module. The list is that of tests/helpers/oddities/.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from helpers.oddities import ODDITIES
from helpers.oddities.oddity import Oddity

PAGE_FILE = Path(__file__).parent / "labels.md"
TITLES = {"coco": "COCO", "voc": "Pascal VOC", "yolo": "YOLO"}

INTRODUCTION = """\
# Odd labels

Label files hold what people's tools write. A value is converted where its meaning is certain. Else `aligndet` stops
with one line that names file, entry and way out; exit code 3, the same in `aligndet doctor` and in every stage that
reads the entry. Boxes that cannot be used as they are written are corrected or left out, counted, and named in a
warning.

A test pushes each of these {count} oddities through `doctor` and the stages that read boxes: `evaluate`, `split` and
`finetune --evaluate-every`; those that stop through `proposals` too, and the first of each kind and every third that
does not stop through `proposals`, `pretrain-box` and `predict` as well. The second column says which clean labels give
the same numbers. `make labels` writes this page from the list in `tests/helpers/oddities/`.
"""


def to_page(oddities: Sequence[Oddity]) -> str:
    """Return the page, in Markdown."""
    return "\n".join([INTRODUCTION.format(count=len(oddities)), *_tables(oddities)])


def _tables(oddities: Sequence[Oddity]) -> Iterator[str]:
    """Yield the heading of each format, and the heading and table of each of its topics."""
    for kind, of_format in groupby(oddities, key=lambda oddity: oddity.format):
        yield f"## {TITLES[kind]}\n"
        for topic, own in groupby(of_format, key=lambda oddity: oddity.topic):
            rows = [["the label file has", "what happens", "`doctor`"], ["---"] * 3, *_rows(own)]
            yield f"### {TITLES[kind]}: {topic}\n"
            yield "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _rows(oddities: Iterable[Oddity]) -> Iterator[list[str]]:
    """Yield a row for each oddity; those that differ in the value at their end alone share one."""
    for (twin, doctor, beginning), group in groupby(oddities, key=_in_common):
        values = [oddity.says.removeprefix(beginning) for oddity in group]
        yield [_cell(beginning + ", ".join(values)), twin, _word(doctor)]


def _in_common(oddity: Oddity) -> tuple[str, str, str]:
    """Return twin, doctor's word, and what stands before the value that ends the saying, if one does."""
    ending = re.match(r"(.* |)`[^`]*`$", oddity.says)
    return oddity.twin, oddity.doctor, ending[1] if ending else oddity.says


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _word(doctor: str) -> str:
    severity, _, code = doctor.partition(" ")
    return f"{severity} `{code}`" if code else ""


if __name__ == "__main__":
    PAGE_FILE.write_text(to_page(ODDITIES), encoding="utf-8")
