"""One function on one process or many: spawned by torch's elastic launcher, or joined under torchrun and Slurm."""

from dataclasses import dataclass

from aligndet_cli.training.logs import ProgressMode


@dataclass(frozen=True)
class Process:
    """Which of the processes of a run this is.

    Attributes:
        device: torch device name, `cpu` or `cuda:<local rank>`.
        progress: what this process shows; `none` on all but the main one.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    progress: ProgressMode = "none"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0
