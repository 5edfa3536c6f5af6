"""Resolve the processes of a run and their devices from settings, launcher and machine."""

import os
from dataclasses import dataclass

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.logs import ProgressMode, logger
from aligndet_cli.processes.callbacks import Callbacks
from aligndet_cli.processes.launchers import find_place, in_interactive_shell

_MOST_PER_CPU = 16  # processes; more only wait for each other, and each takes a third of a gigabyte


@dataclass(frozen=True)
class Process:
    """The place of one process in a run.

    Attributes:
        device: torch device name, `cpu` or `cuda:<number>`.
        progress: display of progress; `none` on all but the main process.
        callbacks: functions of the caller; none on all but the main process.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    progress: ProgressMode = "none"
    flags: frozenset[str] = frozenset()
    callbacks: Callbacks = Callbacks()

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0


@dataclass(frozen=True)
class Devices:
    """The processes a run will use, resolved from `RuntimeConfig`.

    Attributes:
        kind: `cpu` or `cuda`.
        per_node: processes on this machine.
        visible: numbers of the GPUs to use, if the user listed them.
        timeout_minutes: longest wait of processes for each other.
    """

    kind: str = "cpu"
    per_node: int = 1
    num_nodes: int = 1
    visible: tuple[int, ...] | None = None
    timeout_minutes: float = 30.0

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.per_node * self.num_nodes

    @property
    def first(self) -> str:
        """Torch device name of the first process."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.visible[0] if self.visible else 0}"


def joined_world_size() -> int | None:
    """Return the number of processes if torchrun or Slurm started this one among several, else None.

    Raises:
        ConfigError: the environment has the variables of half a launcher.
    """
    place = find_place(os.environ)
    return None if place is None else place.world_size


def resolve_devices(runtime: RuntimeConfig) -> Devices:
    """Resolve `--accelerator`, `--devices` and `--num-nodes` on this machine.

    Raises:
        ConfigError: there are not enough GPUs, `--devices` is neither a number nor a list, or the launcher started
            another number of processes, or there are more processes than the machine can bear.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = "cuda" if runtime.accelerator == "gpu" or (runtime.accelerator == "auto" and num_gpus) else "cpu"
    if kind == "cuda" and not num_gpus:
        raise ConfigError("--accelerator gpu: no GPU is visible to torch here; use --accelerator cpu")
    visible = None
    if runtime.devices == "auto":
        per_node = max(num_gpus, 1) if kind == "cuda" else 1
    else:
        try:
            numbers = [int(part) for part in runtime.devices.split(",")]
        except ValueError:
            raise ConfigError(f"--devices {runtime.devices}: write auto, a number, or a list like 0,1") from None
        if "," in runtime.devices:
            per_node, visible = len(numbers), tuple(numbers)
        else:
            per_node = numbers[0]
    if per_node < 1 or (kind == "cuda" and max(visible or (per_node - 1,)) >= num_gpus):
        raise ConfigError(f"--devices {runtime.devices}: this machine has {num_gpus} GPUs; 1 process at least")
    _check_number(per_node, runtime)
    joined = joined_world_size()
    if joined is not None:
        return _joined_devices(runtime, joined, Devices(kind, per_node, runtime.num_nodes, visible))
    if "SLURM_PROCID" in os.environ and in_interactive_shell(os.environ):
        logger.info("in an interactive shell of Slurm: one command, as if there were no other tasks (else use srun)")
    if runtime.num_nodes > 1:
        raise ConfigError("--num-nodes: start the command on every machine with torchrun or srun; it joins by itself")
    return Devices(kind, per_node, 1, visible, runtime.timeout_minutes)


def _check_number(per_node: int, runtime: RuntimeConfig) -> None:
    workers = 0 if runtime.num_workers == "auto" else runtime.num_workers
    num_cpus = os.cpu_count() or 1
    if per_node * (1 + workers) > _MOST_PER_CPU * num_cpus:
        each = f" and --num-workers {workers}: {per_node * (1 + workers)} processes" if workers else ""
        raise ConfigError(
            f"--devices {runtime.devices}{each} on a machine of {num_cpus} CPUs; "
            f"it bears {_MOST_PER_CPU * num_cpus} processes at most, and is fastest with as many as CPUs"
        )


def _joined_devices(runtime: RuntimeConfig, joined: int, asked: Devices) -> Devices:
    """Return the processes that the launcher has started; refuse settings that ask for another number."""
    num_nodes = runtime.num_nodes
    if joined % num_nodes or (runtime.devices != "auto" and asked.world_size != joined):
        raise ConfigError(
            f"--devices {runtime.devices} --num-nodes {num_nodes}: the launcher (torchrun, srun) started {joined} "
            "processes; leave both out, or make them agree"
        )
    return Devices(asked.kind, joined // num_nodes, num_nodes, asked.visible, runtime.timeout_minutes)


def own_device(devices: Devices) -> str:
    """Return the torch device of this process by its number on this machine.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    import torch

    if devices.kind == "cpu":
        return "cpu"
    place, num_gpus = find_place(os.environ), torch.cuda.device_count()
    if num_gpus == 1:  # Slurm may show each process only its own
        return "cuda:0"
    if place is None or place.local_rank is None:
        raise ConfigError("LOCAL_RANK is not set, so the GPU of this process is not known; torchrun and srun set it")
    local_rank = place.local_rank
    numbers = devices.visible or range(num_gpus)
    if local_rank >= len(numbers):
        raise ConfigError(f"process {local_rank} of this machine has no GPU ({len(numbers)} to share); start fewer")
    return f"cuda:{numbers[local_rank]}"
