"""Read in the environment's variables whether torchrun or Slurm started this process among several. Free of torch."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.slurm import is_batch_script, is_interactive_step, torch_variables

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of Open MPI, and of MPICH and Intel MPI


@dataclass(frozen=True)
class Place:
    """The place of this process among those that a launcher started.

    Attributes:
        local_rank: number on this machine; None if the launcher does not tell.
        address: host of rank 0.
        evidence: variables that say so, as `NAME=value`.
    """

    rank: int
    world_size: int
    local_rank: int | None
    address: str
    port: int
    evidence: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """Advice for a command that no launcher started."""
        return _remedy(self.evidence)


def find_place(variables: Mapping[str, str]) -> Place | None:
    """Return the place of this process; None if it is the only one.

    Raises:
        ConfigError: the variables are those of half a launcher, or of mpirun, which tells no address to meet at.
    """
    place = _by_torch_or_slurm(variables)
    if place is None:
        _refuse_mpi(variables)
    return place


def _refuse_mpi(variables: Mapping[str, str]) -> None:
    """Refuse several processes of mpirun: each would take itself for the whole run."""
    for name in _MPI[:1] if "SLURM_JOB_ID" in variables else _MPI:  # srun sets PMI_SIZE, too, also in a shell
        if variables.get(name, "").isdigit() and int(variables[name]) > 1:
            raise ConfigError(
                f"{name}={variables[name]}: mpirun started {variables[name]} processes, which cannot join into one "
                "run; start the command without mpirun, or with torchrun or srun"
            )


def _by_torch_or_slurm(variables: Mapping[str, str]) -> Place | None:
    if "RANK" in variables or ("WORLD_SIZE" in variables and "SLURM_PROCID" not in variables):
        return _place_by(variables, variables, _TORCH)
    if "SLURM_PROCID" not in variables or is_batch_script(variables) or in_interactive_shell(variables):
        return None
    if _number(variables, "SLURM_NTASKS", _SLURM, default=1) <= 1:
        return None
    for name in (*_SLURM, "SLURM_LOCALID", "SLURM_JOB_ID"):
        _number(variables, name, _SLURM, default=0)
    return _place_by(torch_variables(variables), variables, _SLURM)


def in_interactive_shell(variables: Mapping[str, str]) -> bool:
    """Return True in a shell that `salloc` or `srun --pty` opened, which has the variables of a step of many tasks.

    A command that srun started itself has Slurm's daemon as its parent.
    """
    if is_interactive_step(variables):
        return True
    return "SLURM_PTY_PORT" in variables and _has_terminal() and _name_of_parent() not in ("slurmstepd", "")


def _has_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _name_of_parent() -> str:
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    except OSError:
        return ""


def _place_by(variables: Mapping[str, str], told: Mapping[str, str], names: tuple[str, ...]) -> Place | None:
    """Return the place by variables of torchrun; None for one process.

    Args:
        told: the environment.
        names: variables of the environment to show to people.
    """
    rank = _number(variables, "RANK", names, default=0, told=told)
    world_size = _number(variables, "WORLD_SIZE", names, default=1, told=told)
    if world_size <= 1 and rank == 0:
        return None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name):
            raise _half(told, names, f"{name} is not set")
    if not 0 <= rank < world_size:
        raise _half(told, names, f"there is no rank {rank} of {world_size}")
    port = _number(variables, "MASTER_PORT", names, default=0, told=told)
    if not 0 < port < 2**16:
        raise _half(told, names, f"MASTER_PORT={port} is no port")
    local = _number(variables, "LOCAL_RANK", names, default=-1, told=told) if "LOCAL_RANK" in variables else None
    evidence = tuple(f"{name}={told[name]}" for name in names if name in told)
    return Place(rank, world_size, local, variables["MASTER_ADDR"], port, evidence)


def _number(
    variables: Mapping[str, str],
    name: str,
    names: tuple[str, ...],
    *,
    default: int,
    told: Mapping[str, str] | None = None,
) -> int:
    text = variables.get(name, str(default))
    if not (text.isascii() and text.strip().isdigit()):
        raise _half(told or variables, names, f"{name}={text} is not a number" if text else f"{name} is empty")
    return int(text)


def _half(told: Mapping[str, str], names: tuple[str, ...], problem: str) -> ConfigError:
    evidence = tuple(f"{name}={told[name]}" for name in names if name in told)
    launcher = "Slurm" if names is _SLURM else "torchrun"
    return ConfigError(
        f"{' '.join(evidence)}: taken for variables of a launcher ({launcher}), but {problem}; {_remedy(evidence)}"
    )


def _remedy(evidence: tuple[str, ...]) -> str:
    start = "start the command with srun" if evidence[0].startswith("SLURM") else "start the command with torchrun"
    unset = " ".join(f"-u {item.partition('=')[0]}" for item in evidence)
    return f"{start}, or as a single process: env {unset} aligndet ..."
