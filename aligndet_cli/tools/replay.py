"""`aligndet replay`: repeat the step at which a run diverged, and find the first value that is not finite."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from aligndet_cli.config import STAGES, StageConfig, validated
from aligndet_cli.data.loaders import batches_of_run
from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.detectors import Detector
from aligndet_cli.errors import ChangedError, ConfigError
from aligndet_cli.files import read_json
from aligndet_cli.processes.devices import Process, resolve_devices
from aligndet_cli.stage import Steps, find_stage
from aligndet_cli.training.divergence import FILE as DIVERGED
from aligndet_cli.training.dump import dump_file, read_dump
from aligndet_cli.training.learner import Trainable
from aligndet_cli.training.loop import known_errors, split
from aligndet_cli.training.placement import autocast
from aligndet_cli.workspace import Workspace, run_name

_MOST_NAMES = 5


@dataclass
class Part:
    """A part of the model in the step: neck, head, projector.

    Attributes:
        largest: largest magnitude of a finite value in the outputs of its modules.
        first: its first module with an output that is not finite, and the value; None: all were finite.
        grad_norm: of its parameters; None: none of them has a gradient.
    """

    largest: float = 0.0
    first: str | None = None
    grad_norm: float | None = None


@dataclass
class Replayed:
    """The step as it was repeated; all numbers as text, as JSON has no NaN.

    Attributes:
        step: 0-based.
        images: names of the images of all processes, in their order.
        weights: names of the tensors that were not finite before the step.
        losses: by process and name: the value now, and the value then.
        first: the first module with an output that is not finite, in the order of computation.
        first_gradient: the first module with such a gradient of its output, going backwards.
        parameters: names of those with a gradient that is not finite.
        grad_norm: of all parameters.
    """

    run: str
    step: int
    device: str
    images: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    losses: list[dict[str, tuple[str, str]]] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    first: str | None = None
    first_gradient: str | None = None
    parameters: list[str] = field(default_factory=list)
    grad_norm: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        parts = {
            name: {"largest": repr(part.largest), "first_not_finite": part.first, "grad_norm": _shown(part.grad_norm)}
            for name, part in self.parts.items()
        }
        losses = [{name: {"now": now, "then": then} for name, (now, then) in rank.items()} for rank in self.losses]
        return {
            "status": "done",
            **{key: getattr(self, key) for key in ("run", "step", "device", "images")},
            "weights_not_finite": self.weights,
            "losses": losses,
            "modules": parts,
            "first_not_finite": self.first,
            "first_gradient_not_finite": self.first_gradient,
            "parameters_not_finite": self.parameters,
            "grad_norm": self.grad_norm,
        }

    def lines(self) -> list[str]:
        """Return lines for people."""
        lines = [f"{self.run}, step {self.step}, repeated on {self.device}", "images"]
        lines += [f"  {name}" for name in self.images]
        if self.weights:
            more = f" and {len(self.weights) - _MOST_NAMES} more" if len(self.weights) > _MOST_NAMES else ""
            lines.append(f"not finite before the step: {', '.join(self.weights[:_MOST_NAMES])}{more}")
        lines.append(f"{'loss':<32}  {'now':>12}  {'then':>12}")
        for rank, losses in enumerate(self.losses):
            title = f" (process {rank})" if len(self.losses) > 1 else ""
            lines += [f"  {name + title:<30}  {now:>12}  {then:>12}" for name, (now, then) in losses.items()]
        lines.append(f"{'module':<32}  {'largest':>12}  {'gradient':>12}  first not finite")
        for name, part in self.parts.items():
            norm = _shown(part.grad_norm)
            lines.append(f"  {name:<30}  {part.largest:>12.4g}  {norm:>12}  {part.first or '-'}".rstrip())
        lines.append(f"gradient norm  {self.grad_norm}")
        return [*lines, self._verdict()]

    def _verdict(self) -> str:
        bad = [name for rank in self.losses for name, (now, _) in rank.items() if not is_finite_text(now)]
        start = "first value that is not finite:"
        if self.first is not None:
            return f"{start} output of {self.first}"
        if bad:
            return f"{start} {bad[0]}, all outputs of modules before it were finite"
        if self.first_gradient is not None:
            return f"{start} gradient of the output of {self.first_gradient}"
        if not is_finite_text(self.grad_norm):
            of = (
                f"gradient of {self.parameters[0]}"
                if self.parameters
                else "norm of the gradients, each of them is finite"
            )
            return f"{start} {of}"
        return "everything is finite this time: the cause lies in the order of sums of the device or the processes"


def replay(workspace: Workspace, run: str | None, accelerator: str = "auto") -> Replayed:
    """Repeat the step at which a run diverged, the parts of all processes one after the other in this one.

    Args:
        run: `STAGE/NAME`, or a name; None: the run that diverged last.

    Raises:
        ConfigError: no such run, or its settings, data or inputs have changed since.
        WeightsError: the state cannot be read.
    """
    folder = _find(workspace, run)
    stage = folder.parent.name
    steps = find_stage(stage).steps()
    config = _config_of(folder, steps, accelerator)
    try:
        plan = steps.prepare(config, workspace)
    except ChangedError as error:
        raise ConfigError(f"{error.told}: its step cannot be repeated") from None
    assert steps.rebuild is not None, "a stage that diverges trains"
    process = Process(device=resolve_devices(config.runtime).first)
    trainable: Trainable = steps.rebuild(plan, process)
    content = read_dump(folder)
    replayed = Replayed(f"{stage}/{run_name(folder)}", int(content["step"]), process.device)
    replayed.weights = _load(trainable, content)
    with known_errors("use --accelerator cpu"):
        _repeat(trainable, process, content, read_json(folder / DIVERGED)["ranks"], replayed)
    return replayed


def _find(workspace: Workspace, run: str | None) -> Path:
    """Return the folder of the unfinished run."""
    there = [folder for stage in STAGES for folder in workspace.partials(stage) if dump_file(folder).exists()]
    there = [folder for folder in there if (folder / DIVERGED).exists()]
    names = [f"{folder.parent.name}/{run_name(folder)}" for folder in there]
    found = [folder for folder, name in zip(there, names, strict=True) if run in (None, name, run_name(folder))]
    if not found:
        asked = "no run" if run is None else f"{run}: no such run"
        others = f"there are: {', '.join(names)}" if names else "a run leaves its bad step here until it is begun again"
        raise ConfigError(f"{workspace.root}: {asked} that diverged; {others}")
    if run is not None and len(found) > 1:
        raise ConfigError(f"{run}: several runs have this name; write STAGE/NAME")
    return max(found, key=lambda folder: dump_file(folder).stat().st_mtime)


def _config_of(folder: Path, steps: Steps[Any, Any], accelerator: str) -> StageConfig:
    """Return the settings of a run, for one process; those that equal their defaults count as not set, as in the run.

    Stages look at what was set.
    """
    full: StageConfig = validated(steps.config, read_json(folder / "config.json"), {})
    given = full.model_dump(exclude_defaults=True)
    detector = getattr(full, "detector", None)
    if isinstance(detector, BaseModel):
        given["detector"] = {**given.get("detector", {}), "family": detector.model_dump()["family"]}
    machine = {"accelerator": accelerator, "devices": "1", "num_nodes": 1, "num_workers": 0, "compile": False}
    given["runtime"] = {**given.get("runtime", {}), **machine}
    given["name"] = run_name(folder)
    if "training" in given:
        given["training"].pop("logger", None)
    return cast(StageConfig, validated(steps.config, given, {"runtime.accelerator": "--accelerator"}))


def _load(trainable: Trainable, content: dict[str, Any]) -> list[str]:
    """Load the state before the step; return the names of its tensors that are not finite."""
    bad = []
    for name, module in trainable.learner.state.items():
        module.load_state_dict(content["state"][name])
        tensors = module.state_dict().items()
        bad += [f"{name}.{key}" for key, value in tensors if not bool(torch.isfinite(value).all())]
    trainable.learner.scaler.load_state_dict(content["scaler"])
    return bad


def _repeat(
    trainable: Trainable, process: Process, content: dict[str, Any], ranks: list[Any], replayed: Replayed
) -> None:
    """Compute losses and gradients of all processes of the run.

    Args:
        content: of the dump.
        ranks: losses of then by process.
    """
    learner, settings, step = trainable.learner, trainable.settings, replayed.step
    world_size = int(content["world_size"])
    model: Any = learner.model
    watch = _Watch(model, replayed)
    learner.optimizer.zero_grad(set_to_none=True)
    for rank in range(world_size):
        place = Process(rank, world_size, process.device)
        samples = _samples(trainable, step, place)
        replayed.images += [trainable.stream.image_set.file_names[sample.index] for sample in samples]
        torch.manual_seed(mix_seed(settings.seed, step, rank))
        sums: dict[str, Tensor] = {}
        micro_batches = split(samples, settings.accumulate)
        for micro in micro_batches:
            with autocast(torch.device(process.device), settings.precision):
                losses, _ = model(micro, step)
            share = torch.stack(list(losses.values())).sum() / (len(micro_batches) * world_size)
            learner.scaler.scale(share).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() / len(micro_batches)
        then = ranks[rank]["losses"]
        replayed.losses.append({name: (repr(float(value)), then.get(name, "-")) for name, value in sums.items()})
    watch.close()
    scale = learner.scaler.get_scale() if learner.scaler.is_enabled() else 1.0
    _measure_gradients(model, watch, replayed, scale)


def _samples(trainable: Trainable, step: int, place: Process) -> list[Sample]:
    batches = batches_of_run(
        trainable.stream,
        trainable.settings.batch_size,
        steps=range(step, step + 1),
        seed=trainable.settings.seed,
        num_workers=0,
        process=place,
        aspects=trainable.aspects,
    )
    return next(batches)


def _measure_gradients(model: nn.Module, watch: "_Watch", replayed: Replayed, scale: float) -> None:
    norms: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norms.setdefault(watch.part_of(name), []).append(parameter.grad.norm() / scale)
            if not bool(parameter.grad.isfinite().all()):
                replayed.parameters.append(name)
    for name, values in norms.items():
        replayed.parts.setdefault(name, Part()).grad_norm = float(torch.stack(values).norm())
    every = [norm for values in norms.values() for norm in values]
    replayed.grad_norm = repr(float(torch.stack(every).norm())) if every else "-"


class _Watch:
    """Hooks on all modules that note the first outputs, and gradients of outputs, that are not finite."""

    def __init__(self, model: nn.Module, replayed: Replayed) -> None:
        self.replayed = replayed
        self.parts = list(_part_names(model))
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in model.named_modules() if name
        ]

    def part_of(self, name: str) -> str:
        """Return the part that a module or parameter belongs to; its own name if it belongs to none."""
        return next((part for part in self.parts if name == part or name.startswith(f"{part}.")), name)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for value in _tensors(output):
                self._look(name, value)

        return look

    def _look(self, name: str, value: Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        if value.requires_grad:
            value.register_hook(lambda gradient: self._look_back(name, gradient))
        if (part := self.part_of(name)) == name and part not in self.parts:
            return  # what holds parts
        entry = self.replayed.parts.setdefault(part, Part())
        found = value.detach()
        entry.largest = max(entry.largest, float(found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max()))
        if entry.first is None and (told := _describe(found)) is not None:
            entry.first = f"{name}: {told}"
            self.replayed.first = self.replayed.first or entry.first

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if self.replayed.first_gradient is None and (told := _describe(gradient)) is not None:
            self.replayed.first_gradient = f"{name}: {told}"


def _part_names(model: nn.Module, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the names of the parts: what stands in a detector, and in the task beside it."""
    for name, child in model.named_children():
        if depth == 0 or isinstance(child, Detector):
            yield from _part_names(child, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}"


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of any shapes in an output: itself, or in tuples, lists, dicts and records."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from _tensors(list(vars(output).values()))


def _describe(value: Tensor) -> str | None:
    """Describe the first entry of a tensor that is not finite, with the shape; None if all are finite."""
    bad = ~value.isfinite()
    count = int(bad.sum())
    if not count:
        return None
    place = tuple(torch.nonzero(bad)[0].tolist())
    return f"{float(value[place])} at {place} of {tuple(value.shape)}, {count} of {value.numel()} not finite"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def is_finite_text(text: str) -> bool:
    """Return True if a number in a text is finite."""
    return text not in ("nan", "inf", "-inf")
