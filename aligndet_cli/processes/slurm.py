"""Read Slurm's environment variables in a process that srun has started."""

import re
from collections.abc import Mapping

from aligndet_cli.errors import ConfigError

_FIRST_SPECIAL_STEP = 4_294_967_290  # 0xFFFFFFFA: the interactive step, the batch script, ...
_FIRST_PORT, _NUM_PORTS = 15_000, 15_000  # below the ports that Linux assigns by itself


def is_batch_script(slurm: Mapping[str, str]) -> bool:
    """Return True if Slurm started this process alone, as part of the batch script: in a job, but in no step of it."""
    return "SLURM_JOB_ID" in slurm and "SLURM_STEP_ID" not in slurm


def is_interactive_step(slurm: Mapping[str, str]) -> bool:
    """Return True if Slurm started this process alone, in the shell of `salloc`."""
    step = slurm.get("SLURM_STEP_ID", "")
    return step.isascii() and step.isdigit() and int(step) >= _FIRST_SPECIAL_STEP


def torch_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """Translate Slurm's variables to torchrun's.

    All processes meet at the first node of the step, where rank 0 is, on a port that follows from job and step.

    Raises:
        ConfigError: Slurm does not name the nodes.
    """
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST")
    if not nodes and "MASTER_ADDR" not in slurm:
        raise ConfigError("under Slurm: neither SLURM_JOB_NODELIST nor MASTER_ADDR is set; export MASTER_ADDR")
    step = slurm.get("SLURM_STEP_ID", "0")
    number = 1009 * int(slurm.get("SLURM_JOB_ID", "0")) + (int(step) if step.isdigit() else 0)
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or first_host(nodes or ""),
        "MASTER_PORT": str(_FIRST_PORT + number % _NUM_PORTS),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a list in Slurm's notation: `gpu[07-09,12],cpu1` -> `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group() if first else nodes)
