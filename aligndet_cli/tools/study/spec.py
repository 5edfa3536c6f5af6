"""The file of a study: starts to compare, and the detectors, fractions, folds and seeds to compare them over.

A file may extend another, which holds what several studies share.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from aligndet_cli.config import STAGES, Frozen, Seed, flatten, read_toml, validated
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.errors import ConfigError, did_you_mean

Percent = Annotated[float, Field(gt=0, le=100)]
Whole = Annotated[int, Field(ge=0)]
Tables = dict[str, dict[str, Any]]  # settings by stage

COMMON = "common"  # the table of settings for every stage that has them
KINDS_OF_INIT = ("pretrain", "backbone", "scratch")


class Start(Frozen):
    """A start of fine-tuning: one line of the comparison.

    Attributes:
        label: its name in reports.
        init: as in `finetune --init`; `pretrain` means the pre-training run of this very start.
        settings: by stage; written beside `label` in the file, as `pretrain-box = { tasks = "contrastive" }`.
        detectors, fractions, folds, seeds: the part of the study's to run; None: all.
    """

    label: str = Field(min_length=1, max_length=60)  # it becomes part of run names
    init: str = "pretrain"
    settings: Tables = {}
    detectors: tuple[str, ...] | None = None
    fractions: tuple[Percent, ...] | None = None
    folds: tuple[Whole, ...] | None = None
    seeds: tuple[Seed, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather_stages(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        tables = {key: value for key, value in content.items() if key in (*STAGES, COMMON)}
        if not tables:
            return content
        rest = {key: value for key, value in content.items() if key not in tables}
        return {**rest, "settings": {**rest.get("settings", {}), **tables}}

    @property
    def slug(self) -> str:
        """The label as a part of run names."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-.").lower()


class StudyConfig(Frozen):
    """A study: the cross product of detectors, starts, fractions, folds and seeds.

    Attributes:
        name: first part of the names of its runs, so that several studies can share a workspace.
        data, evaluate_data, image_data: data set of all stages, of `evaluate`, and of `pretrain-image` (None: `data`).
        pretrain_per_seed: run `pretrain-box` once per seed; otherwise once in all, as the paper does.
        settings: by stage, and `common`.
        detector: the same for single detectors; these win.
        starts: the first is the baseline.
    """

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)
    data: Path
    evaluate_data: Path | None = None
    image_data: Path | None = None
    detectors: tuple[str, ...] = Field(min_length=1)
    fractions: tuple[Percent, ...] = Field((100,), min_length=1)
    folds: tuple[Whole, ...] = Field((1,), min_length=1)
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    pretrain_per_seed: bool = False
    settings: Tables = {}
    detector: dict[str, Tables] = {}
    starts: tuple[Start, ...] = Field(min_length=1)

    @field_validator("detectors")
    @classmethod
    def _check_detectors(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in DETECTORS:
                raise ValueError(f"'{name}' is not a detector{did_you_mean(name, list(DETECTORS))}")
        return names

    @field_validator("fractions", "folds", "seeds", "detectors")
    @classmethod
    def _check_distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("has a value twice")
        return values

    def data_of(self, stage: str) -> Path:
        """Return the data set that a stage reads."""
        own = {"pretrain-image": self.image_data, "evaluate": self.evaluate_data}.get(stage)
        return (own or self.data).resolve()


def load_study(file: Path) -> StudyConfig:
    """Return the study in a TOML file and in those it extends.

    Raises:
        ConfigError: unreadable, an unknown key (with the nearest known one), or parts that contradict each other.
    """
    layers = _read_layers(file)
    content, origins = _merge(layers)
    missing = [key for key in ("data", "detectors", "starts") if key not in content]
    if missing:
        raise ConfigError(f"{file}: {', '.join(missing)}: missing; a study names its data, detectors and [[starts]]")
    for start in content["starts"] if isinstance(content["starts"], list) else ():
        known = [*Start.model_fields, *STAGES, COMMON]
        for key in start if isinstance(start, dict) else ():
            if key not in known:
                raise ConfigError(f"{file}: starts: '{key}' is no key of a start{did_you_mean(key, known)}")
    study = validated(StudyConfig, content, origins)
    try:
        _check_tables(study.settings, "settings")
        for name, tables in study.detector.items():
            _check_known(name, _values_of("detectors", study, layers), "detector")
            _check_tables(tables, f"detector.{name}")
        _check_starts(study, layers)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return study


def _read_layers(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return `(name, content)` of a study file and of the files it extends, the most general first."""
    layers: list[tuple[str, dict[str, Any]]] = []
    read: list[Path] = []
    title = str(file)
    while True:
        if file.resolve() in read:
            raise ConfigError(f"{title}: the files extend each other in a circle")
        content = read_toml(file, title)
        base = content.pop("extends", None)
        layers.insert(0, (str(file), content))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(f"{file}: extends: should be the name of one file, got {base!r}")
        read.append(file.resolve())
        title, file = f"{file}: extends {base!r}", file.parent / base


def _merge(layers: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return one content, in which the later layers win, and the file of every leaf by its dotted path."""
    content: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, layer in layers:
        content = _merged(content, layer)
        origins |= {path: name for path, _ in flatten(layer)}
    return content, origins


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return tables merged key by key; all else, lists included, is replaced. What is `own` comes last, and wins."""
    joined = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in own.items()
    }
    return {**{key: value for key, value in base.items() if key not in own}, **joined}


def _values_of(key: str, study: StudyConfig, layers: list[tuple[str, dict[str, Any]]]) -> tuple[Any, ...]:
    """Return the values that parts may speak of: the study's, and those of files it extends, which it may leave out."""
    extended = [layer[key] for _, layer in layers[:-1] if isinstance(layer.get(key), list)]
    return (*getattr(study, key), *(value for values in extended for value in values))


def _check_starts(study: StudyConfig, layers: list[tuple[str, dict[str, Any]]]) -> None:
    labels: dict[tuple[str, str], str] = {}  # by slug and detector
    for start in study.starts:
        place = f"start '{start.label}'"
        if not start.slug:
            raise ConfigError(f"{place}: the label needs a letter or a digit, it becomes part of run names")
        for detector in start.detectors or study.detectors:
            if (start.slug, detector) in labels:
                other = labels[start.slug, detector]
                raise ConfigError(f"{place}: gives the same run names as '{other}'; choose another label")
            labels[start.slug, detector] = start.label
        _check_tables(start.settings, place)
        idle = [stage for stage in ("proposals", "cluster", "pretrain-box") if stage in start.settings]
        if idle and start.init != "pretrain":
            raise ConfigError(
                f'{place}: {idle[0]}: no effect with init = "{start.init}", which pre-trains nothing; leave it out'
            )
        for key in ("detectors", "fractions", "folds", "seeds"):
            for value in getattr(start, key) or ():
                _check_known(value, _values_of(key, study, layers), f"{place}: {key}")
        if start.init not in KINDS_OF_INIT and not Path(start.init).is_file():
            raise ConfigError(f"{place}: init = '{start.init}': write pretrain, backbone, scratch or a file of weights")


def _check_tables(tables: Mapping[str, Any], place: str) -> None:
    for key in tables:
        if key not in (*STAGES, COMMON):
            raise ConfigError(f"{place}: '{key}' is not a stage{did_you_mean(key, [*STAGES, COMMON])}")


def _check_known(value: Any, known: tuple[Any, ...], place: str) -> None:
    if value not in known:
        raise ConfigError(f"{place}: {value} is not among the study's: {', '.join(map(str, dict.fromkeys(known)))}")
