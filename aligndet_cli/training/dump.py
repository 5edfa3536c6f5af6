"""The state in which a run diverged, written so that `aligndet replay` can repeat the step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligndet_cli.errors import WeightsError
from aligndet_cli.files import write_bytes
from aligndet_cli.logs import logger
from aligndet_cli.training.checkpoint import serialise


@dataclass
class StepDump:
    """Writes `resume/diverged.pt`, one per run: modules and optimizer before the step, its number, seed, processes.

    Parameters have not moved when a step turns out bad. Buffers, such as the statistics of norms, move in the forward
    pass, so `remember` keeps those of before. On a GPU, where bad steps are found later, nobody calls it: there
    buffers and momentum copies are as they were found, and only parameters and optimizer as before the step.

    Attributes:
        state: modules by name.
    """

    folder: Path
    state: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    seed: int
    world_size: int
    _buffers: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the buffers, before a step."""
        for name, module in self.state.items():
            copies = self._buffers.setdefault(name, {})
            for key, buffer in module.named_buffers():
                if key not in copies or copies[key].shape != buffer.shape:
                    copies[key] = buffer.clone()
                copies[key].copy_(buffer)

    def write(self, step: int) -> None:
        """Write the state before a step (0-based); without room for it, only warn."""
        state = {name: module.state_dict() for name, module in self.state.items()}
        for name, copies in self._buffers.items():
            state[name].update({key: copy for key, copy in copies.items() if key in state[name]})
        content = {"step": step, "seed": self.seed, "world_size": self.world_size, "state": state}
        content |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        file = dump_file(self.folder)
        try:
            file.parent.mkdir(exist_ok=True)
            write_bytes(file, serialise(content))
        except OSError as error:
            file.unlink(missing_ok=True)
            logger.warning(f"{file}: {error.strerror}; the step that diverged cannot be repeated")


def dump_file(folder: Path) -> Path:
    """Return the place of the state in the folder of an unfinished run."""
    return folder / "resume" / "diverged.pt"


def read_dump(folder: Path) -> dict[str, Any]:
    """Return the content of a `StepDump`, on the CPU.

    Raises:
        WeightsError: it cannot be read.
    """
    file = dump_file(folder)
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise WeightsError(f"{file}: cannot be read ({type(error).__name__}); run the same command again") from None
