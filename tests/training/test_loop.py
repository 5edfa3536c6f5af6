"""The loop on a model small enough to work its numbers out by hand."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import ConfigError, Preempted, RunError, WeightsError
from aligndet_cli.processes.devices import Process
from aligndet_cli.stage import find_stage
from aligndet_cli.training.checkpoint import load_checkpoint, save_checkpoint
from aligndet_cli.training.loop import (
    CheckpointConfig,
    Learner,
    LoopSettings,
    train,
    train_step,
    watch_divergence,
)
from aligndet_cli.training.schedules import Schedule

NO_BOXES = torch.zeros(0, 4)


class Wandering(nn.Module):
    """One weight, pulled to each image's mean; the noise depends on the step's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.stop_at: int | None = None

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = torch.stack([sample.image.float().mean() for sample in samples])
        if step == self.stop_at:
            values = values * float("nan")
        return {"loss_pull": ((self.weight - values + torch.rand(())) ** 2).mean()}, {"seen": values.mean()}


def batches_from(start: int) -> Iterator[list[Sample]]:
    for step in range(start, 100):
        images = [torch.full((3, 2, 2), (step * 7 + number) % 11, dtype=torch.uint8) for number in range(4)]
        yield [Sample(step, 0, image, NO_BOXES, torch.zeros(0, dtype=torch.int64)) for image in images]


def settings(**changes: object) -> LoopSettings:
    defaults = {"schedule": Schedule(12, 2, (8,)), "base_lr": 0.05, "weight_decay": 0.0, "seed": 3, "log_every": 5}
    return LoopSettings(**{**defaults, "checkpoint": CheckpointConfig(every_steps=3), **changes})


def learner(model: Wandering, **hooks: object) -> Learner:
    return Learner(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), {"model": model}, **hooks)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    first = Wandering()
    train(learner(first), batches_from, settings(), whole, Process())

    def crash(done: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(learner(Wandering(), between=crash), batches_from, settings(), parts, Process())
    second = Wandering()
    train(learner(second), batches_from, settings(), parts, Process())
    assert torch.equal(first.weight, second.weight)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 12]


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    train(learner(Wandering()), batches_from, settings(), tmp_path, Process())
    assert sorted(file.name for file in (tmp_path / "resume").iterdir()) == ["step-000000006.pt", "step-000000009.pt"]


def test_a_signal_saves_and_leaves_with_its_own_error(tmp_path: Path) -> None:
    import os
    import signal

    def terminate(done: int) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="SIGTERM"):
        train(learner(Wandering(), between=terminate), batches_from, settings(), tmp_path, Process())
    found = load_checkpoint(tmp_path / "resume")
    assert found is not None and found[0] == 4


def test_divergence_names_the_step_and_the_remedy(tmp_path: Path) -> None:
    model = Wandering()
    model.stop_at = 6
    with pytest.raises(RunError, match="diverged at step 6.*loss_pull nan.*--lr"):
        train(learner(model), batches_from, settings(), tmp_path, Process())


def test_accumulation_is_the_mean_of_the_micro_batches(tmp_path: Path) -> None:
    # One step from weight 0 without noise would be lr * 2 * mean; with it, both halves draw their own noise, so
    # compare the gradient that momentum-free SGD applied against the two halves computed by hand.
    class Quiet(Wandering):
        def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            values = torch.stack([sample.image.float().mean() for sample in samples])
            return {"loss_pull": ((self.weight - values) ** 2).mean()}, {}

    ends = []
    for accumulate in (1, 2, 4):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        model = Quiet()
        train(learner(model), batches_from, settings(accumulate=accumulate), folder, Process())
        ends.append(model.weight.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-6) == pytest.approx(ends[2], rel=1e-6)


def test_hooks_see_every_step_once(tmp_path: Path) -> None:
    seen: list[int] = []
    train(learner(Wandering(), after_step=seen.append), batches_from, settings(), tmp_path, Process())
    assert seen == list(range(12))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ("GPU", "--batch-size", "bf16")),
        (MemoryError(), ("CPU", "--batch-size", "--accumulate", "--short-side")),
        (None, ("CPU", "--batch-size")),
    ],
)
def test_running_out_of_memory_names_the_settings(tmp_path: Path, error: Exception | None, words: tuple) -> None:
    class Greedy(Wandering):
        def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            if error is None:
                torch.empty(10**15)  # what torch itself says when the CPU has no such memory
            else:
                raise error
            return super().forward(samples, step)

    with pytest.raises(RunError, match="out of (GPU|CPU) memory") as caught:
        flags = frozenset(flag.word for flag in find_stage("finetune").flags)
        train(learner(Greedy()), batches_from, settings(), tmp_path, Process(flags=flags))
    assert all(word in str(caught.value) for word in words)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    class Broken(Wandering):
        def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(learner(Broken()), batches_from, settings(), tmp_path, Process())


def test_speed_has_data_wait_and_memory(tmp_path: Path) -> None:
    train(learner(Wandering()), batches_from, settings(), tmp_path, Process())
    line = json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "images_per_s", "data_wait", "memory_mib"}
    assert 0 <= line["data_wait"] <= 1 and 50 < line["memory_mib"] < 50_000


class FullPrecisionLoss(nn.Module):
    """A loss in float32, whatever the precision of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, _samples: Sequence[Sample], _step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.autocast("cpu", enabled=False):
            return {"loss_a": (self.weight @ self.weight).square().mean()}, {}


def test_what_is_kept_in_float32_has_its_gradients_in_float32_too() -> None:
    gradients = []
    for precision in ("32-true", "bf16-mixed"):
        model = FullPrecisionLoss()
        trained = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), {"model": model})
        some = settings(precision=precision)
        train_step(trained, next(batches_from(0)), 0, some, watch_divergence(trained, Process()))
        gradients.append(model.weight.grad)
    assert gradients[0] is not None and torch.equal(gradients[0], gradients[1])


def test_a_run_of_another_version_is_not_continued(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "step-000000003.pt")  # the first version did not say that it was
    with pytest.raises(ConfigError, match="--no-resume begins again"):
        load_checkpoint(tmp_path)


def test_a_changed_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"model": {"weight": torch.ones(1000)}})
    content = bytearray((tmp_path / "step-000000003.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "step-000000003.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read .*; delete it to go on from the one before"):
        load_checkpoint(tmp_path)
