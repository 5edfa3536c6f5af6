import pytest

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.devices import joined_world_size, resolve_devices
from aligndet_cli.processes.slurm import first_host, torch_variables

STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**STEP, "SLURM_JOB_NODELIST": "gpu7"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("node[3,5-6]-ib", "node3-ib"),
        ("rack[1-2]n[10-11]", "rack1n10"),
        ("a.b-c.example", "a.b-c.example"),
    ],
)
def test_first_host(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_variables_for_torch() -> None:
    found = torch_variables({**STEP, "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_STEP_NODELIST": "gpu08"})
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu08"}
    # Every process of a step finds the same port, and steps and jobs beside each other have their own.
    assert 1024 < int(port) < 32768
    others = ({"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "4712"})
    ports = [torch_variables({**STEP, **other, "SLURM_JOB_NODELIST": "gpu08"})["MASTER_PORT"] for other in others]
    assert len({port, *ports}) == 3


def test_without_nodes_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        torch_variables(STEP)
    assert torch_variables({**STEP, "MASTER_ADDR": "here"})["MASTER_ADDR"] == "here"


def test_a_step_is_joined(in_step: pytest.MonkeyPatch) -> None:
    assert joined_world_size() == 4
    runtime = RuntimeConfig(accelerator="cpu", num_nodes=2)
    assert (resolve_devices(runtime).per_node, resolve_devices(runtime).world_size) == (2, 4)


def test_a_batch_script_is_not(in_step: pytest.MonkeyPatch) -> None:
    # `sbatch --ntasks 4` with the command in the script itself: it has all variables but that of the step.
    in_step.delenv("SLURM_STEP_ID")
    assert joined_world_size() is None
    assert resolve_devices(RuntimeConfig(accelerator="cpu")).world_size == 1


@pytest.mark.parametrize(("devices", "nodes"), [("2", 1), ("auto", 3), ("4", 2)])
def test_what_contradicts_the_launcher_is_refused(in_step: pytest.MonkeyPatch, devices: str, nodes: int) -> None:
    with pytest.raises(ConfigError, match="started 4 processes"):
        resolve_devices(RuntimeConfig(accelerator="cpu", devices=devices, num_nodes=nodes))


def test_what_agrees_is_fine(in_step: pytest.MonkeyPatch) -> None:
    assert resolve_devices(RuntimeConfig(accelerator="cpu", devices="2", num_nodes=2)).world_size == 4
