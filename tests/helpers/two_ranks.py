"""What the two-process tests run in spawned processes, which import it by name. See `test_two_processes.py`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from torch.nn.utils import clip_grad_norm_

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.pretrain_image.method import View
from aligndet_cli.pretrain_image.methods.moco import MoCo
from aligndet_cli.processes import collectives
from aligndet_cli.processes.devices import Process
from aligndet_cli.stage import find_stage
from aligndet_cli.training import learner as learners
from aligndet_cli.training.loop import Learner, LoopSettings


@dataclass(frozen=True)
class Taken:
    """The arguments with which a stage calls the training loop."""

    learner: Learner
    batches_from: Callable[[int], Iterator[list[Sample]]]
    settings: LoopSettings


def parameters_of(learner: Learner) -> dict[str, torch.Tensor]:
    """All parameters, momentum copies among them. Not the running statistics of batch norms: on CPUs these are the
    rank's own.
    """
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in learner.state.items()
        for key, value in module.named_parameters()
    }


def run_and_keep(plan: Any, process: Process, stage: str, folder: Path) -> None:
    """Run a stage in a spawned process; every rank keeps its parameters as they are after the last step."""
    keep_parameters(folder / f"rank{process.rank}.pt")
    find_stage(stage).steps().run(plan, process)


def keep_parameters(file: Path) -> None:
    """Have the training of this process write its parameters as they are after the last step."""
    original = learners.train

    def train_and_keep(learner: Learner, *rest: Any) -> None:
        original(learner, *rest)
        torch.save(parameters_of(learner), file)

    learners.train = train_and_keep


def assert_ranks_agree(folder: Path) -> None:
    """Check that both processes have kept the same parameters."""
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert [name for name, value in ranks[0].items() if not torch.equal(value, ranks[1][name])] == []


class _Taken(Exception):
    pass


def take_learner(plan: Any, stage: str, process: Process, monkeypatch: pytest.MonkeyPatch) -> Taken:
    """What a rank would train, without its partner: for doing the ranks' work one after the other in one process."""
    found = []

    def take(learner: Learner, batches_from: Any, settings: LoopSettings, *_rest: Any) -> None:
        found.append(Taken(learner, batches_from, settings))
        raise _Taken

    with monkeypatch.context() as patch:
        patch.setattr(learners, "train", take)
        patch.setattr(learners, "wrap", lambda model, _process: model)
        patch.setattr(collectives, "_finish", lambda *_: None)
        patch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
        with pytest.raises(_Taken):
            find_stage(stage).steps().run(plan, process)
    return found[0]


def train_with_averaged_gradients(ranks: list[Taken]) -> list[dict[str, torch.Tensor]]:
    """Steps in which every rank's gradients, of its own shard, are replaced by their mean. Parameters of each rank."""
    batches = [taken.batches_from(0) for taken in ranks]
    settings = ranks[0].settings
    for step in range(settings.schedule.num_steps):
        parameters = []
        for rank, (taken, own_batches) in enumerate(zip(ranks, batches, strict=True)):
            torch.manual_seed(mix_seed(settings.seed, step, rank))
            optimizer = taken.learner.optimizer
            for group in optimizer.param_groups:
                group["lr"] = settings.base_lr * settings.schedule.lr_factor(step) * group.get("lr_scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
            losses, _ = taken.learner.model(next(own_batches), step)
            torch.stack(list(losses.values())).sum().backward()
            parameters.append([parameter for group in optimizer.param_groups for parameter in group["params"]])
        for same in zip(*parameters, strict=True):
            mean = torch.stack([parameter.grad for parameter in same]).mean(dim=0)
            for parameter in same:
                parameter.grad = mean.clone()
        for taken, own in zip(ranks, parameters, strict=True):
            clip_grad_norm_(own, settings.clip_norm if settings.clip_norm is not None else float("inf"))
            taken.learner.optimizer.step()
            taken.learner.after_step(step)
    return [parameters_of(taken.learner) for taken in ranks]


def fill_queue(plan: Any, process: Process, folder: Path) -> None:
    """Two batches of each rank through MoCo; every rank keeps its queue and the keys it made."""
    torch.manual_seed(0)
    moco = MoCo(build_backbone(BackboneConfig(name="resnet18")), embedding_dim=4, queue_size=6, temperature=0.2)
    made = []
    moco.momentum_head.register_forward_hook(lambda _module, _inputs, output: made.append(normalize(output, dim=1)))
    generator = torch.Generator().manual_seed(process.rank)
    for _ in range(2):
        pixels = [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(2)]
        moco([View(one, torch.zeros(2, 4)) for one in pixels], None, with_health=False)
    torch.save({"queue": moco.queue.keys, "keys": made}, folder / f"queue{process.rank}.pt")
