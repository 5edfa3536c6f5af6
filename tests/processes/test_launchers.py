import itertools

import pytest

from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.launchers import find_place

NUMBERS = (None, "", "0", "1", "2", "x", "-1")
TORCHRUN = {"MASTER_ADDR": "here", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[1-2]"}


def given(**variables: str | None) -> dict[str, str]:
    return {name: value for name, value in variables.items() if value is not None}


@pytest.mark.parametrize(
    "variables",
    [
        given(RANK=rank, WORLD_SIZE=world, **rest)
        for rank, world in itertools.product(NUMBERS, NUMBERS)
        for rest in (
            {},
            {"MASTER_ADDR": "here"},
            {"MASTER_ADDR": "", "MASTER_PORT": "29500"},
            {**TORCHRUN, "MASTER_PORT": "x"},
            TORCHRUN,
        )
    ]
    + [given(SLURM_PROCID=rank, SLURM_NTASKS=world, **SLURM) for rank, world in itertools.product(NUMBERS, NUMBERS)],
)
def test_any_part_of_a_launchers_variables_is_a_place_or_a_line(variables: dict[str, str]) -> None:
    try:
        place = find_place(variables)
    except ConfigError as error:
        assert "\n" not in str(error) and "env -u " in str(error)
    else:
        assert place is None or 0 <= place.rank < place.world_size and 0 < place.port < 2**16


def test_whole_launchers_are_joined() -> None:
    place = find_place({"RANK": "1", "WORLD_SIZE": "2", **TORCHRUN})
    assert place is not None and (place.rank, place.world_size, place.address, place.port) == (1, 2, "here", 29500)
    place = find_place({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", **SLURM})
    assert place is not None and (place.rank, place.world_size, place.address) == (3, 4, "gpu1")


@pytest.mark.parametrize("step", ["4294967290", "4294967291"])
def test_special_steps_of_slurm_are_single_processes(step: str) -> None:
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", **SLURM, "SLURM_STEP_ID": step}) is None


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpirun_do_not_each_run_the_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=2: mpirun started 2 processes.*without mpirun"):
        find_place({name: "2"})
    assert find_place({name: "1"}) is None
    assert find_place({name: "2", "RANK": "1", "WORLD_SIZE": "2", **TORCHRUN}) is not None


def test_a_step_of_slurm_with_mpi_is_a_step_of_slurm() -> None:
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", **SLURM, "SLURM_STEP_ID": "4294967290", "PMI_SIZE": "4"}
    assert find_place(shell) is None
