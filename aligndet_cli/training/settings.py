"""Resolve training settings: number of steps, learning rate and weight decay, and where each value comes from."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from aligndet_cli.config import Frozen, RuntimeConfig
from aligndet_cli.data.findings import counted
from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.devices import Devices
from aligndet_cli.training.loggers import LoggerName, as_names, check_loggers
from aligndet_cli.training.loop import CheckpointConfig, LoopSettings
from aligndet_cli.training.recipe import REFERENCE_BATCH, Rates, RecipeName, ScheduleName
from aligndet_cli.training.schedules import build_schedule

# `--recipe`; None (for people "auto") chooses by detector and backbone, see `detectors/recipes.py`.
AskedRecipe = Annotated[RecipeName | None, BeforeValidator(lambda value: None if value == "auto" else value)]


_MAX_RATE = 1e30  # beyond it a step cannot be computed in 32 bits at all


class TrainingConfig(Frozen):
    """Length and optimizer of a training stage; None takes the value of the detector's recipe."""

    schedule: ScheduleName | None = Field(None, description="Length; 1x is 12 epochs, 12k is 12,000 steps (by recipe).")
    epochs: int | None = Field(None, ge=1, description="Length in epochs, instead of the schedule's (by schedule).")
    steps: int | None = Field(None, ge=1, description="Length in steps, instead of the schedule's (by schedule).")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        REFERENCE_BATCH, description="Images per step over all processes; auto takes what fits into memory."
    )
    # A step with micro-batches equals one on as many devices. It equals one with the large batch only if all losses
    # are divided by equal counts; batch norm and the contrast's negatives always come from one micro-batch.
    accumulate: int = Field(1, ge=1, description="Micro-batches per step, computed one after the other.")
    lr: float | None = Field(
        None, gt=0, le=_MAX_RATE, description="Learning rate, used as it is (by recipe, scaled with the batch)."
    )
    weight_decay: float | None = Field(None, ge=0, le=_MAX_RATE, description="Weight decay (by recipe).")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="Rate of each layer of the backbone beside the next one's, 0 to 1 (by recipe)."
    )
    clip_norm: float | None = Field(None, gt=0, description="Norm to which larger gradients are scaled (by recipe).")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    logger: Annotated[tuple[LoggerName, ...], BeforeValidator(as_names)] = Field(
        ("none",), description="Loggers beside metrics.jsonl, several separated by commas."
    )
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def images_per_step(self) -> int:
        """`batch_size`, over all processes and micro-batches; it must no longer be "auto"."""
        assert isinstance(self.batch_size, int), "settle_batch_size comes first"
        return self.batch_size


def resolve_settings(
    training: TrainingConfig, rates: Rates, *, num_images: int, seed: int, runtime: RuntimeConfig
) -> LoopSettings:
    """Resolve the settings of a run. The recipe's learning rate is scaled to the batch size, a given one is not.

    Raises:
        ConfigError: settings contradict each other, or a logger is not installed.
    """
    schedule = build_schedule(
        training.schedule or rates.schedule,
        rates,
        epochs=training.epochs,
        steps=training.steps,
        num_images=num_images,
        batch_size=training.images_per_step,
    )
    scaled_lr = rates.lr * training.images_per_step / rates.batch_size  # linear scaling
    return LoopSettings(
        schedule=schedule,
        base_lr=scaled_lr if training.lr is None else training.lr,
        weight_decay=rates.weight_decay if training.weight_decay is None else training.weight_decay,
        layer_decay=rates.layer_decay if training.layer_decay is None else training.layer_decay,
        seed=seed,
        precision=runtime.precision,
        clip_norm=rates.clip_norm if training.clip_norm is None else training.clip_norm,
        batch_size=training.images_per_step,
        accumulate=training.accumulate,
        log_every=training.log_every,
        checkpoint=training.checkpoint,
        loggers=check_loggers(training.logger),
    )


def training_of(training: TrainingConfig, rates: Rates) -> dict[str, Any]:
    """Return the recipe's values for open settings by dotted path; the learning rate only for a known batch size."""
    values: dict[str, Any] = {}
    if training.schedule is None:
        values["training.schedule"] = rates.schedule
    if training.lr is None and training.batch_size != "auto":
        values["training.lr"] = rates.lr * training.images_per_step / rates.batch_size
    if training.weight_decay is None:
        values["training.weight_decay"] = rates.weight_decay
    if training.layer_decay is None and rates.layer_decay != 1.0:
        values["training.layer_decay"] = rates.layer_decay
    if training.clip_norm is None and rates.clip_norm is not None:
        values["training.clip_norm"] = rates.clip_norm
    return values


def check_batch_split(training: TrainingConfig, devices: Devices) -> None:
    """Make sure that every process and micro-batch gets the same number of images.

    Raises:
        ConfigError: the batch cannot be divided.
    """
    parts = devices.world_size * training.accumulate
    if training.images_per_step % parts:
        raise ConfigError(
            f"--batch-size {training.batch_size}: must be a multiple of processes x --accumulate "
            f"({devices.world_size} x {training.accumulate})"
        )


def describe_settings(
    training: TrainingConfig, rates: Rates, settings: LoopSettings, devices: Devices
) -> dict[str, Any]:
    """Return the effective values with their origin, for people."""
    schedule = settings.schedule
    lr_origin = (
        "given"
        if training.lr is not None
        else f"{rates.origin}, {rates.lr:g} x {training.batch_size}/{rates.batch_size}"
    )
    decay_origin = "given" if training.weight_decay is not None else rates.origin
    processes = counted(devices.world_size, f"{devices.kind} process", f"{devices.kind} processes")
    split = f"{processes} x {training.images_per_step // devices.world_size}"
    if training.accumulate > 1:
        micro = training.images_per_step // devices.world_size // training.accumulate
        split += f", {training.accumulate} times {micro} after each other"
    drops = f"/10 at {list(schedule.drop_steps)}" if schedule.drop_steps else "constant rate"
    decay = "cosine" if schedule.decay == "cosine" else drops
    warmup = f"{schedule.warmup} warm-up {schedule.warmup_steps}" if schedule.warmup_steps else "no warm-up"
    return {
        "steps": f"{schedule.num_steps} ({warmup}, {decay})",
        "batch size": f"{training.batch_size} ({split})",
        "learning rate": f"{settings.base_lr:g} ({lr_origin})",
        "optimizer": ", ".join([rates.optimizer, *_exceptions(rates, settings.layer_decay)]),
        "weight decay": f"{settings.weight_decay:g} ({decay_origin})",
        "gradient clipping": "off" if settings.clip_norm is None else f"{settings.clip_norm:g}",
        "precision": settings.precision,
    }


def _exceptions(rates: Rates, layer_decay: float) -> list[str]:
    """Describe the parameters with a learning rate or weight decay of their own."""
    exceptions = []
    if rates.backbone_lr_scale != 1.0:
        exceptions.append(f"backbone at {rates.backbone_lr_scale:g} times the rate")
    if layer_decay != 1.0:
        exceptions.append(f"each layer of the backbone at {layer_decay:g} times the rate of the next one")
    of_biases = [] if rates.bias_lr_scale == 1.0 else [f"at {rates.bias_lr_scale:g} times the rate"]
    if rates.bias_decay_scale != 1.0:
        decay = "without decay" if rates.bias_decay_scale == 0.0 else f"at {rates.bias_decay_scale:g} times the decay"
        of_biases.append(decay)
    if of_biases:
        exceptions.append(f"biases {' and '.join(of_biases)}")
    if not rates.decays_norms:
        exceptions.append("norms and position biases without decay")
    return exceptions
