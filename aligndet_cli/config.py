"""Stage configs: strict pydantic models, filled from TOML < `--set a.b=v` < flags, with errors a person can read."""

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from aligndet_cli.config_errors import readable
from aligndet_cli.errors import ConfigError, did_you_mean

STAGES = ("pretrain-image", "proposals", "cluster", "pretrain-box", "finetune", "evaluate")

# Backbone weights that `pretrain-image` made in the workspace; with "auto" none where there are none.
WORKSPACE_WEIGHTS = ("auto", "workspace")
NO_WEIGHTS = "none"
WEIGHTS_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".pkl", ".bin", ".safetensors", ".npz")


class Frozen(BaseModel):
    """A group of settings: unknown keys are errors and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True)
class FileOr:
    """Mark of a text setting that is one of some words or the name of a weights file."""

    words: tuple[str, ...]

    def is_file(self, text: str) -> bool:
        """Return True if the text means a file; torchvision's names of weights do not."""
        is_path = text.endswith(WEIGHTS_SUFFIXES) or "/" in text or Path(text).is_file()
        return is_path and text not in self.words


def _in_range(seed: int) -> int:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"should be 0 to {MAX_SEED}")
    return seed


_LARGEST = 2**62  # of what libraries hold in 64 bits
MAX_SEED = 2**32 - 1  # numpy's limit; torch and Python take more
Seed = Annotated[int, AfterValidator(_in_range)]

# Pixels of an image side after resizing: the coarsest feature map that every detector has is 32 times smaller.
MIN_SIDE = 32
Side = Annotated[int, Field(ge=MIN_SIDE)]


class DataConfig(Frozen):
    """Place of the images and labels.

    `split` None is the stage's own choice: the training split, or the validation split for `evaluate`.
    `root` and the explicit paths are not part of the config hash: the data itself is hashed as an input.
    """

    root: Path | None = Field(None, description="COCO, VOC or YOLO root, or a folder of images (the workspace's).")
    format: Literal["auto", "coco", "voc", "yolo", "folder"] = Field("auto", description="Layout of the data set.")
    split: str | None = Field(None, description="Split to read, e.g. train2017 (by stage: for training or validation).")
    annotations: Path | None = Field(None, description="Label file (the split's).")
    images: Path | None = Field(None, description="Image folder (the split's).")
    limit: int | None = Field(None, ge=1, description="First N images only (all).")

    def place(self) -> dict[str, Any]:
        """Return where the data lies, as plain JSON values: root, format, annotations and images."""
        return self.model_dump(mode="json", include={"root", "format", "annotations", "images"})


_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class RuntimeConfig(Frozen):
    """Devices, workers and numerics of a run. Only `precision` and `deterministic` may change the result."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="Device; auto takes GPUs if there are any.")
    # `--set runtime.devices=2` is an int in TOML
    devices: Annotated[str, BeforeValidator(str)] = Field("auto", description="Processes, GPUs such as 0,1, or auto.")
    num_nodes: int = Field(1, ge=1, description="Number of machines, under torchrun or Slurm.")
    # torch's default
    timeout_minutes: float = Field(30.0, gt=0, description="Minutes that processes wait for each other.")
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="Number of workers that read and prepare images, or auto."
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field("32-true", description="Precision of computation.")
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    deterministic: bool = Field(False, description="Use deterministic GPU kernels only, which are slower.")
    offline: bool = Field(
        default_factory=lambda: env_switch("ALIGNDET_OFFLINE"),
        description="Never download; $ALIGNDET_OFFLINE=1 does the same.",
    )


def env_switch(name: str) -> bool:
    """Return True if an environment variable is 1, true, yes or on; False for 0, false, no, off, empty or not set.

    Raises:
        ConfigError: anything else.
    """
    value = os.environ.get(name, "").strip()
    if value.lower() not in _ON + _OFF:
        raise ConfigError(f"{name}={value}: write 1, true, yes or on, or else 0, false, no, off or nothing")
    return value.lower() in _ON


class StageConfig(Frozen):
    """Base of the stages' configs."""

    # Dotted paths of settings that do not change the result, kept out of the hash: places, devices, logging.
    UNHASHED: ClassVar[frozenset[str]] = frozenset(
        {
            "name",
            "data.root",
            "data.format",
            "data.annotations",
            "data.images",
            "runtime.accelerator",
            "runtime.devices",
            "runtime.num_nodes",
            "runtime.timeout_minutes",
            "runtime.num_workers",
            "runtime.compile",
            "runtime.offline",
            "backbone.recompute",
            "backbone.weights",  # what they are is an input with a hash of its own
            "training.log_every",
            "training.logger",
            "training.checkpoint.every_steps",
            "training.checkpoint.every_seconds",
        }
    )

    # Values that settings had before they existed, by dotted path, where these are not the defaults.
    BEFORE: ClassVar[dict[str, Any]] = {}

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=128,
        description="Name of the run (made from its settings).",
    )
    seed: Seed = Field(0, description="Seed of everything random.")
    data: DataConfig = DataConfig()
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    def to_json(self) -> dict[str, Any]:
        """Return the resolved config as plain JSON values."""
        return self.model_dump(mode="json")

    def from_recipe(self) -> dict[str, Any]:
        """Return the settings that are open and that a recipe fills in, by dotted path, for `config show`."""
        return {}

    def hashed_settings(self) -> dict[str, Any]:
        """Return a flat `{dotted.path: value}` of every setting that decides the result."""
        return {key: value for key, value in flatten(self.to_json()) if key not in self.UNHASHED}

    def changes_since(self, recorded: Mapping[str, Any]) -> dict[str, str]:
        """Return the differences from the `hashed_settings` that an artifact recorded, by path as `key: old -> new`.

        Settings that are no longer hashed are not compared.
        """
        recorded = {key: value for key, value in recorded.items() if key not in self.UNHASHED}  # once counted, perhaps
        settings = self.hashed_settings()
        kept = {key: value for key, value in recorded.items() if key not in self.UNHASHED}
        missing = {key: self.value_before(key) for key in settings if key not in recorded}
        return describe_differences({**kept, **missing}, settings)

    def value_before(self, path: str) -> Any:
        """Return the value of a setting that is newer than an artifact: that in `BEFORE`, else the present default."""
        return self.BEFORE[path] if path in self.BEFORE else self._default_of(path)

    def _default_of(self, path: str) -> Any:
        *groups, name = path.split(".")
        group: BaseModel = self
        for part in groups:
            group = getattr(group, part)
        return type(group)().model_dump(mode="json")[name]


ConfigT = TypeVar("ConfigT", bound=StageConfig)
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Sources:
    """Sources of settings, weakest first; `flags` is `{dotted.path: (flag name, value)}`."""

    file: Path | None = None
    assignments: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, Any]] | None = None


def load_config(config_class: type[ConfigT], stage: str, sources: Sources) -> tuple[ConfigT, dict[str, str]]:
    """Return the validated config of a stage, and `{dotted.path: origin}` of every setting that is not a default.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), or a value that does not fit.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    defaults = config_class().to_json()
    for path, value, origin in _settings(stage, sources):
        origins[path] = origin
        # Users may pass back the full output of `config show`. Values equal to the default are treated as not set,
        # because stages check which settings were set explicitly.
        if origin != str(sources.file) or path not in defaults or value != defaults[path]:
            assign(values, path, value)
    config = validated(config_class, values, origins)
    for path, value in flatten(config.to_json()):
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConfigError(f"{path}: {value} is larger than any number can be here, {_LARGEST}")
    return config, origins


def check_seed(seed: int) -> None:
    """Make sure that a seed of `--seed` is in the range of all seeds.

    Raises:
        ConfigError: it is not.
    """
    try:
        _in_range(seed)
    except ValueError as error:
        raise ConfigError(f"--seed {seed}: {error}") from None


def with_absolute_paths(config: ModelT) -> ModelT:
    """Return the settings with every path from the root on: recorded ones are read from other folders, too."""
    changes: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            changes[name] = with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[name] = value.absolute()
        elif isinstance(value, str) and any(isinstance(m, FileOr) and m.is_file(value) for m in field.metadata):
            changes[name] = str(Path(value).absolute())
    changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
    return config.model_copy(update=changes) if changes else config


def validated(config_class: type[ModelT], values: Mapping[str, Any], origins: Mapping[str, str]) -> ModelT:
    """Return the settings as a config; the messages name their `origins` by dotted path.

    Raises:
        ConfigError: an unknown key or a value that does not fit.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(readable(error, config_class, origins)) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted.path, leaf)` of nested mappings in order; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return `key: old -> new` by key for each difference of two flat mappings."""
    keys = [*old, *(key for key in new if key not in old)]
    return {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def hash_json(value: Any) -> str:
    """Return a hex digest of any JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _settings(stage: str, sources: Sources) -> Iterator[tuple[str, Any, str]]:
    if sources.file is not None:
        for path, value in flatten(_read_stage_table(sources.file, stage)):
            yield path, value, str(sources.file)
    for assignment in sources.assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {assignment}: write it as --set some.key=value")
        yield path.strip(), parse_value(text.strip()), "--set"
    for path, (flag, value) in (sources.flags or {}).items():
        yield path, value, flag


_LONGEST_TOML = 10**6  # bytes


def read_toml(file: Path, title: str) -> dict[str, Any]:
    """Return the content of a TOML file, which messages call `title`.

    Raises:
        ConfigError: not there, not readable, or not TOML.
    """
    try:
        with file.open("rb") as handle:
            content = handle.read(_LONGEST_TOML + 1)
        if len(content) > _LONGEST_TOML:  # /dev/zero never ends
            raise ConfigError(f"{title}: longer than {_LONGEST_TOML // 10**6} MB, so no file of settings")
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"{title}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{title}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{title}: not valid TOML: {error}") from None


def _read_stage_table(file: Path, stage: str) -> dict[str, Any]:
    """Return the table `[stage]` of a TOML file, or the whole file if it has no tables of stages."""
    content = read_toml(file, f"--config {file}")
    if not any(key in STAGES for key in content):
        return content
    for key in content:
        if key not in STAGES:
            raise ConfigError(f"{file}: '{key}' is not a stage{did_you_mean(key, list(STAGES))}")
    table = content.get(stage, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: '{stage}' must be a table: write [{stage}]")
    return table


def parse_value(text: str) -> Any:
    """Parse a TOML value; other text is taken as a string, so that users need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assign(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a leaf of nested settings by its dotted path.

    Raises:
        ConfigError: the path goes through a plain value.
    """
    *parents, leaf = path.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: '{parent}' was already set to a plain value")
        node = child
    node[leaf] = value
