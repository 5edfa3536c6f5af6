"""Several processes on one artifact: one begins it, one finishes it, whatever the moment."""

import subprocess
import sys
from pathlib import Path

import pytest

from aligndet_cli.config import StageConfig
from aligndet_cli.errors import RunError
from aligndet_cli.files import read_json
from aligndet_cli.processes.sharing import locked_if_last, taking_part
from aligndet_cli.workspace import Output, Workspace

# Forks workers that all plan before anybody begins, work for no time at all, and leave at once.
SCRIPT = """
import os, sys
from pathlib import Path
from aligndet_cli.config import StageConfig
from aligndet_cli.processes.sharing import locked_if_last, taking_part
from aligndet_cli.workspace import Workspace

NUM_WORKERS = 5

def work(output, index, ready, go):
    os.write(ready, b".")
    os.read(go, 1)
    with taking_part(output, StageConfig()):
        (output.partial / f"{index}.done").touch()
    with locked_if_last(output) as mine:
        if mine is not None and len(list(output.partial.glob("*.done"))) == NUM_WORKERS:
            mine.complete({"by": index}, content=[])
            os._exit(1)
    os._exit(0)

for round in range(int(sys.argv[2])):
    output = Workspace(Path(sys.argv[1]) / str(round)).plan_output("proposals", "a", StageConfig(), {"data": "x"})
    (been_ready, ready), (go, say_go) = os.pipe(), os.pipe()
    children = []
    for index in range(NUM_WORKERS):
        pid = os.fork()
        if not pid:
            work(output, index, ready, go)
        children.append(pid)
    for _ in children:
        os.read(been_ready, 1)
    os.write(say_go, b"." * NUM_WORKERS)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0] * (NUM_WORKERS - 1) + [1], (round, codes)
    assert {file.name for file in output.folder.glob("*.done")} == {f"{index}.done" for index in range(NUM_WORKERS)}
    assert not output.partial.exists()
"""


def plan(root: Path, seed: int = 0, **how: bool) -> Output:
    return Workspace(root).plan_output("proposals", "a", StageConfig(seed=seed), {"data": "x"}, **how)


def test_of_processes_that_start_and_end_together_one_finishes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), "20"], check=True, timeout=120)


def test_nobody_is_last_while_others_are_in(tmp_path: Path) -> None:
    first, second = plan(tmp_path), plan(tmp_path)
    with taking_part(first, StageConfig()):
        (first.partial / "work").write_text("of the first")
        with taking_part(second, StageConfig()):
            assert (second.partial / "work").exists()  # the second does not clear what the first has begun
            with pytest.raises(RunError, match="another aligndet process"), plan(tmp_path).lock():
                pass
        with locked_if_last(second) as output:
            assert output is None
    with locked_if_last(first) as output:
        assert output is not None
        assert (
            output.header["started"] == read_json(first.partial / "manifest.json")["started"] == first.header["started"]
        )


def test_who_comes_after_the_end_does_not_begin_again(tmp_path: Path) -> None:
    early, late = plan(tmp_path), plan(tmp_path)
    with taking_part(early, StageConfig()):
        pass
    with locked_if_last(early) as output:
        assert output is not None
        output.complete({}, content=[])
    with locked_if_last(late) as output:
        assert output is None
    with pytest.raises(RunError, match="has just finished it"), taking_part(late, StageConfig()):
        pass
    assert not early.partial.exists() and early.folder.exists()


def test_redo_with_other_settings_begins_anew_once(tmp_path: Path) -> None:
    with taking_part(plan(tmp_path), StageConfig()):
        (plan(tmp_path).partial / "old").touch()
    redo = [plan(tmp_path, seed=1, force=True) for _ in range(2)]
    with taking_part(redo[0], StageConfig(seed=1)):
        assert not (redo[0].partial / "old").exists()
        (redo[0].partial / "new").touch()
    with taking_part(redo[1], StageConfig(seed=1)):
        assert (redo[1].partial / "new").exists()
