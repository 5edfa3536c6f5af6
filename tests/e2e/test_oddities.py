"""Every oddity of a label file gives, in all stages, the numbers of its clean twin, or in all the same one line."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from write_labels import PAGE_FILE, to_page

from helpers.commandline import aligndet
from helpers.narrow import narrow_backbones
from helpers.oddities import ODDITIES
from helpers.oddities.coco_data import OF_TRAINING
from helpers.oddities.oddity import AS_MEANT, STOPS, Oddity
from helpers.oddities.stages import OF_VALIDATION, TWINS, WRITERS, findings_of, numbers_of, said_by, words_of

# What evaluation and `split` say, which take boxes as the label file has them.
OF_LABEL_FILE = {"finetune --evaluate-every", "evaluate", "ground truth", "split"}
Findings = set[tuple[str, str]]  # severity and code


class Twins:
    """Clean data sets, and what the stages say of them, made when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers: dict[Path, dict[str, Any]] = {}
        self._findings: dict[Path, Findings] = {}

    def data(self, kind: str, name: str) -> Path:
        folder = self.root / kind / name
        if not folder.exists():
            WRITERS[kind](folder)
            TWINS[kind][name](folder)
        return folder

    def workspace(self, oddity: Oddity, name: str, *, is_whole: bool) -> Path:
        """The workspace in which the stages have run."""
        workspace = self.root / "workspaces" / oddity.format / oddity.detector / f"{name}{' whole' * is_whole}"
        if workspace not in self._numbers:
            found = numbers_of(self.data(oddity.format, name), workspace, oddity, is_whole=is_whole)
            assert all(found.get(name) and isinstance(found[name], list) for name in ("predictions", "split")), found
            self._numbers[workspace] = found
        return workspace

    def numbers(self, oddity: Oddity, name: str, *, is_whole: bool) -> dict[str, Any]:
        return self._numbers[self.workspace(oddity, name, is_whole=is_whole)]

    def findings(self, oddity: Oddity) -> Findings:
        data = self.data(oddity.format, oddity.twin)
        if data not in self._findings:
            self._findings[data] = codes(findings_of(aligndet("doctor", data, "--json")))
        return self._findings[data]


def codes(findings: list[dict[str, Any]]) -> Findings:
    """Return severity and code of each finding."""
    return {(finding["severity"], finding["code"]) for finding in findings}


def grave(findings: Findings) -> Findings:
    """Return the findings that change a result."""
    return {finding for finding in findings if finding[0] != "info"}


@pytest.fixture(scope="module")
def twins(module_folder: Path) -> Twins:
    return Twins(module_folder)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making figures takes a third of the time, even if nobody draws them, and reads no labels."""
    monkeypatch.setattr("aligndet_cli.training.curves.draw_runs", lambda *_, **__: Figure())
    monkeypatch.setattr("aligndet_cli.pretrain_box.stage.draw_first_views", lambda *_, **__: None)
    monkeypatch.setattr("aligndet_cli.proposals.artifact.draw_histograms", lambda *_, **__: None)
    monkeypatch.setattr("aligndet_cli.proposals.artifact.draw_recall", lambda *_, **__: None)


@pytest.fixture(autouse=True, scope="module")
def small_weights() -> Iterator[None]:
    """Most of the time would go into building, writing and reading weights."""
    with narrow_backbones:
        yield


def parameters(*, stop: bool) -> list[Any]:
    """Return oddities as parameters; those that share a twin share a worker, in groups of twenty.

    The first of each topic with its twin goes through all stages, of those that do not stop every third too; the others
    go through the stages that read boxes.
    """
    found, seen, topics = [], Counter[str](), Counter[tuple[str, str, str]]()
    for oddity in ODDITIES:
        if oddity.stops != stop:
            continue
        topic = (oddity.format, oddity.topic, oddity.twin)
        twin = AS_MEANT if stop else oddity.twin
        key = group_of(oddity, twin, 0)
        group = pytest.mark.xdist_group(group_of(oddity, twin, seen[key]))
        seen[key] += 1
        found.append(
            pytest.param(
                oddity, topics[topic] % (10_000 if stop else 3) == 0, id=f"{oddity.format}: {oddity.says}", marks=group
            )
        )
        topics[topic] += 1
    return found


def group_of(oddity: Oddity, twin: str, number: int) -> str:
    return f"{oddity.format} {oddity.detector} {twin} {number // 20}"


def odd_data(oddity: Oddity, root: Path) -> Path:
    data = root / "data"
    WRITERS[oddity.format](data)
    oddity.change(data)
    return data


@pytest.mark.parametrize(("oddity", "is_whole"), parameters(stop=False))
def test_the_numbers_are_those_of_the_clean_twin(oddity: Oddity, is_whole: bool, twins: Twins, tmp_path: Path) -> None:
    data = odd_data(oddity, tmp_path)
    found = codes(findings_of(aligndet("doctor", data, "--json")))
    named = {(severity, code) for severity, _, code in [oddity.doctor.partition(" ")] if code}
    assert named <= found
    assert grave(found) - named == grave(twins.findings(oddity)) - named
    ours = numbers_of(data, tmp_path / "w", oddity, is_whole=is_whole)
    theirs = twins.numbers(oddity, oddity.twin, is_whole=is_whole)
    names = theirs.keys() - OF_LABEL_FILE if oddity.twin in OF_TRAINING else theirs.keys()
    assert {name: shortened(ours.get(name)) for name in names if ours.get(name) != theirs[name]} == {}
    if oddity.twin in OF_TRAINING:
        assert [entry[2] for entry in ours["ground truth"]] == boxes_of(data)
    shutil.rmtree(tmp_path / "w")


def boxes_of(data: Path) -> list[list[float]]:
    """Return the boxes of the validation labels of COCO data, as pycocotools reads them."""
    content = json.loads((data / OF_VALIDATION["coco"][0]).read_text())
    return [entry["bbox"] for entry in content["annotations"]]


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) < 600 else f"{text[:600]} ..."


@pytest.mark.parametrize(("oddity", "is_whole"), parameters(stop=True))
def test_doctor_and_every_stage_stop_with_the_same_line(
    oddity: Oddity, is_whole: bool, twins: Twins, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    WRITERS[oddity.format](data)
    pretraining = words_of("pretrain-box", oddity.detector)
    if is_whole:
        aligndet("proposals", data, "-w", tmp_path / "before", *words_of("proposals", oddity.detector))
    oddity.change(data)
    report = findings_of(aligndet("doctor", data, "--json", code=3))
    messages = [finding["message"] for finding in report if finding["severity"] == "error"]
    assert tuple(oddity.doctor.split()) in codes(report)
    strict = ("--on-error", "fail")
    clean = twins.workspace(oddity, AS_MEANT, is_whole=False)
    words = {stage: words_of(stage, oddity.detector) for stage in ("proposals", "finetune", "evaluate", "split")}
    scratch = (*words["finetune"], "--init", "scratch", *strict)
    lines = {
        "proposals": said_by("proposals", data, "-w", tmp_path / "w", *words["proposals"], *strict),
        "finetune": said_by("finetune", data, "-w", tmp_path / "w", *scratch),
        "evaluate": said_by("evaluate", data, "-w", clean, "--name", tmp_path.name, *words["evaluate"]),
        "split": said_by("split", data, "--output", tmp_path / "split", *words["split"]),
    }
    if is_whole:
        lines["pretrain-box"] = said_by("pretrain-box", "-w", tmp_path / "before", *pretraining)
    odd_val = tmp_path / "val"
    if with_odd_validation(oddity, data, odd_val):
        line = said_by("finetune", odd_val, "-w", tmp_path / "w", "--name", "val", *scratch)
        lines["finetune --evaluate-every"] = line.replace(str(odd_val), str(data))
    silent = {stage: line for stage, line in lines.items() if str(data) not in line or not is_said(line, messages)}
    assert {stage: line for stage, line in silent.items() if line or stage not in oddity.unread} == {}, messages


def with_odd_validation(oddity: Oddity, data: Path, root: Path) -> bool:
    """Write a data set with clean labels to train on and odd ones to validate on; return False if none are odd."""
    WRITERS[oddity.format](root)
    is_odd = False
    for name in OF_VALIDATION[oddity.format]:
        odd, clean = (data / name).read_bytes(), (root / name).read_bytes()
        is_odd = is_odd or odd != clean
        (root / name).write_bytes(odd)
    return is_odd


def is_said(line: str, messages: list[str]) -> bool:
    """Return True if doctor says it too, perhaps with its split before and the number of its like behind.

    A stage may add the flag that goes on without the image.
    """
    line = line.removesuffix(" (--on-error skip leaves it out)")
    said = (message.removeprefix("train: ").removeprefix("val: ") for message in messages)
    return line != "" and any(message.startswith(line) for message in said)


def twins_of_oddities() -> list[Any]:
    """Return an oddity for each twin but the one in which all is read as meant."""
    of_twin = {(oddity.format, oddity.twin): oddity for oddity in ODDITIES if oddity.twin not in (AS_MEANT, STOPS)}
    return [
        pytest.param(oddity, id=" ".join(key), marks=pytest.mark.xdist_group(group_of(oddity, oddity.twin, 0)))
        for key, oddity in of_twin.items()
    ]


@pytest.mark.parametrize("oddity", twins_of_oddities())
def test_another_twin_has_other_numbers(oddity: Oddity, twins: Twins) -> None:
    ours = twins.numbers(oddity, oddity.twin, is_whole=False)
    theirs = twins.numbers(oddity, AS_MEANT, is_whole=False)
    seen = "ground truth" if "twice" in oddity.twin else "finetune"  # anchors match one of two equal boxes
    assert ours[seen] != theirs[seen]


def test_the_page_says_what_the_list_says() -> None:
    assert PAGE_FILE.read_text(encoding="utf-8") == to_page(ODDITIES), "run `make labels`"


def test_an_oddity_has_a_name_of_its_own() -> None:
    assert max(Counter((oddity.format, oddity.says) for oddity in ODDITIES).values()) == 1


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"], ["puppy", "cat"]])
def test_validation_labels_of_other_classes_are_refused(classes: list[str], twins: Twins, tmp_path: Path) -> None:
    oddity, data = ODDITIES[0], tmp_path / "data"
    WRITERS["coco"](data)
    file = data / OF_VALIDATION["coco"][0]
    content = json.loads(file.read_text())
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] <= len(classes)]
    file.write_text(json.dumps(content))
    assert ("error", "different-classes") in codes(findings_of(aligndet("doctor", data, "--json", code=3)))
    clean = twins.workspace(oddity, AS_MEANT, is_whole=False)
    words = ("finetune", data, "-w", tmp_path / "w", *words_of("finetune", oddity.detector), "--init", "scratch")
    lines = {said_by(*words), said_by("evaluate", data, "-w", clean, "--name", tmp_path.name)}
    assert len(lines) == 1 and lines.pop().startswith(f"{file}: classes differ from those of run ")
