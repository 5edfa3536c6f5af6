"""Every oddity of a label file gives, in all stages, the numbers of its clean twin, or in all the same one line."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.commandline import aligndet
from helpers.oddities import ODDITIES
from helpers.oddities.oddity import AS_MEANT, Oddity
from helpers.oddities.stages import OF_VALIDATION, TWINS, WRITERS, findings_of, numbers_of, said_by, words_of

Findings = set[tuple[str, str]]  # severity and code


class Twins:
    """Clean data sets, and what the stages say of them, made when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._findings: dict[tuple[str, str], Findings] = {}

    def data(self, kind: str, name: str) -> Path:
        folder = self.root / kind / "data" / name
        if not folder.exists():
            WRITERS[kind](folder)
            TWINS[kind][name](folder)
        return folder

    def workspace(self, kind: str, name: str, detector: str) -> Path:
        """The workspace of all stages."""
        self.numbers(kind, name, detector)
        return self.root / kind / "workspaces" / detector / name

    def numbers(self, kind: str, name: str, detector: str) -> dict[str, Any]:
        key = (kind, name, detector)
        if key not in self._numbers:
            workspace = self.root / kind / "workspaces" / detector / name
            self._numbers[key] = numbers_of(self.data(kind, name), workspace, kind, detector)
            stopped = {stage: said for stage, said in self._numbers[key].items() if isinstance(said, str | None)}
            assert stopped.keys() <= {"pretrain-box", "finetune"}, stopped  # these are hashes
        return self._numbers[key]

    def findings(self, kind: str, name: str) -> Findings:
        if (kind, name) not in self._findings:
            self._findings[kind, name] = codes(findings_of(aligndet("doctor", self.data(kind, name), "--json")))
        return self._findings[kind, name]


def codes(findings: list[dict[str, Any]]) -> Findings:
    """Return the findings that change a result, or that the list names."""
    return {(finding["severity"], finding["code"]) for finding in findings}


def grave(findings: Findings) -> Findings:
    return {finding for finding in findings if finding[0] != "info"}


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take half of the time and read no labels."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


def parameters(*, stop: bool) -> list[Any]:
    """Return oddities as parameters; those that share a twin share a worker, in groups of twenty."""
    chosen = [oddity for oddity in ODDITIES if oddity.stops == stop]
    found, seen = [], dict[tuple[str, ...], int]()
    for oddity in chosen:
        key = (oddity.format, oddity.detector, AS_MEANT if stop else oddity.twin)
        seen[key] = seen.get(key, 0) + 1
        group = "-".join((*key, str(seen[key] // 20)))
        found.append(pytest.param(oddity, id=f"{oddity.format}: {oddity.says}", marks=pytest.mark.xdist_group(group)))
    return found


def odd_data(oddity: Oddity, root: Path) -> Path:
    data = root / "data"
    WRITERS[oddity.format](data)
    oddity.change(data)
    return data


@pytest.mark.parametrize("oddity", parameters(stop=False))
def test_the_numbers_are_those_of_the_clean_twin(oddity: Oddity, twins: Twins, tmp_path: Path) -> None:
    data = odd_data(oddity, tmp_path)
    found = codes(findings_of(aligndet("doctor", data, "--json")))
    named = {(severity, code) for severity, _, code in [oddity.doctor.partition(" ")] if code}
    assert named <= found
    assert grave(found) - named == grave(twins.findings(oddity.format, oddity.twin)) - named
    ours = numbers_of(data, tmp_path / "w", oddity.format, oddity.detector)
    theirs = twins.numbers(oddity.format, oddity.twin, oddity.detector)
    assert {name: shortened(ours.get(name)) for name in theirs if ours.get(name) != theirs[name]} == {}
    shutil.rmtree(tmp_path / "w")


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) < 600 else f"{text[:600]} ..."


@pytest.mark.parametrize("oddity", parameters(stop=True))
def test_doctor_and_every_stage_stop_with_the_same_line(oddity: Oddity, twins: Twins, tmp_path: Path) -> None:
    data = odd_data(oddity, tmp_path)
    report = findings_of(aligndet("doctor", data, "--json", code=3))
    messages = [finding["message"] for finding in report if finding["severity"] == "error"]
    assert tuple(oddity.doctor.split()) in codes(report)
    strict = ("--on-error", "fail")
    clean = twins.workspace(oddity.format, AS_MEANT, oddity.detector)
    words = {stage: words_of(stage, oddity.detector) for stage in ("proposals", "finetune", "evaluate", "split")}
    scratch = (*words["finetune"], "--init", "scratch", *strict)
    lines = {
        "proposals": said_by("proposals", data, "-w", tmp_path / "w", *words["proposals"], *strict),
        "finetune": said_by("finetune", data, "-w", tmp_path / "w", *scratch),
        "evaluate": said_by("evaluate", data, "-w", clean, "--name", tmp_path.name, *words["evaluate"]),
        "split": said_by("split", data, "--output", tmp_path / "split", *words["split"]),
    }
    odd_val = tmp_path / "val"
    if with_odd_validation(oddity, data, odd_val):
        line = said_by("finetune", odd_val, "-w", tmp_path / "w", "--name", "val", *scratch)
        lines["finetune --evaluate-every"] = line.replace(str(odd_val), str(data))
    assert {stage: line for stage, line in lines.items() if not is_said(line, messages)} == {}, messages


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
    """Return True if doctor says it too, perhaps with its split before and the number of its like behind."""
    said = (message.removeprefix("train: ").removeprefix("val: ") for message in messages)
    return line != "" and any(message.startswith(line) for message in said)
