"""Weights and their cards on a hub, here a server of the tests on this machine."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers.commandline import aligndet, environment
from helpers.fake_hub import Hub, fake_hub

RUN = "retinanet-resnet18"
needs_hub = pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="the extra hub is missing")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


def python(hub: Hub, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the server as the Hub, which the library reads once, when it is imported."""
    place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": "secret", "ALIGNDET_OFFLINE": "0"}
    ways = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    env = {**environment(), **ways, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **place, **more}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)


def push(hub: Hub, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return python(hub, home, "-m", "aligndet_cli", "push", *words, **more)


FETCH = "import sys; from aligndet_cli.hub import fetch_weights; print(fetch_weights(sys.argv[1]))"
LOAD = "import sys, aligndet_cli as aligndet; print(len(aligndet.load(sys.argv[1]).names))"


@needs_hub
@pytest.mark.slow
def test_weights_go_to_the_hub_and_come_back(hub: Hub, chain: Path, tmp_path: Path) -> None:
    ran = push(hub, tmp_path, RUN, "--to", "hub:me/cells", "--private", "--json", "-w", str(chain))
    assert ran.returncode == 0, ran.stderr
    content = json.loads(ran.stdout)
    assert content["address"] == f"{hub.address}/me/cells" and content["files"] == ["weights.pt", "README.md"]
    there, weights = hub.files["me/cells"], (chain / "finetune" / RUN / "weights.pt").read_bytes()
    assert there.keys() == {"weights.pt", "README.md"} and there["weights.pt"] == weights
    assert hub.private == {"me/cells"} and hub.tokens - {""} == {"Bearer secret"}
    front = yaml.safe_load(there["README.md"].decode().split("---\n")[1])
    measured = json.loads((chain / "evaluate" / f"{RUN}-val" / "metrics.json").read_text())
    [result] = front["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "AP", "name": "AP", "value": measured["AP"]}

    fetched = python(hub, tmp_path, "-c", FETCH, "hub:me/cells")
    assert Path(fetched.stdout.strip()).read_bytes() == weights, fetched.stderr
    loaded = python(hub, tmp_path, "-c", LOAD, "hub:me/cells")
    assert loaded.stdout.strip() == "5", loaded.stderr
    hub.requests.clear()
    again = python(hub, tmp_path, "-c", FETCH, "hub:me/cells", ALIGNDET_OFFLINE="1")
    assert again.stdout == fetched.stdout and hub.requests == []  # from the cache, without a word to anybody


@needs_hub
@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line(hub: Hub, chain: Path, tmp_path: Path) -> None:
    missing = python(hub, tmp_path, "-c", FETCH, "hub:me/nothing")
    assert re.search(r"WeightsError: hub:me/nothing: ", missing.stderr.splitlines()[-1])
    offline = python(hub, tmp_path, "-c", FETCH, "hub:me/nothing", ALIGNDET_OFFLINE="1")
    assert "weights.pt is not in the cache of the Hub, and no download is allowed" in offline.stderr
    ran = push(hub, tmp_path, "--to", "hub:me/cells", "-w", str(chain), HF_TOKEN="")
    assert ran.returncode == 2 and "error: hub:me/cells: who are you there?" in ran.stderr
    ran = push(hub, tmp_path, "--to", "hub:me/cells", "-w", str(chain), HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.returncode == 1 and "Traceback" not in ran.stderr and ran.stderr.startswith("error: hub:me/cells: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "where? name the place"),
        (("--to", "somewhere"), "--to somewhere: write hub:OWNER/NAME"),
        (("--to", "hub:name"), "hub:name: write hub:OWNER/NAME"),
        (("--to", "hub:a/b"), "nothing is sent while ALIGNDET_OFFLINE is set"),
        (("proposals/train", "--to", "hub:a/b"), "proposals/train: write the name of a finetune run"),
        (("nothing", "--to", "hub:a/b"), "finished finetune runs here: retinanet-resnet18"),
    ],
)
@needs_hub
def test_nothing_is_sent_by_mistake(
    words: tuple[str, ...], said: str, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNDET_OFFLINE", "1")
    assert said in aligndet("push", *words, "-w", chain, code=2).error_line()


def test_without_the_extra_it_says_what_to_install(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'aligndet[hub]'" in aligndet("push", "--to", "hub:a/b", "-w", chain, code=2).error_line()
