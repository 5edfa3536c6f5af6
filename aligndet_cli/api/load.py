"""Weights of a run or a file -> a detector, or its backbone."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import torch

from aligndet_cli.api.detector import ImageDetector, labels_of
from aligndet_cli.backbones import Backbone, BackboneConfig, build_backbone
from aligndet_cli.backbones.plain import read_plain
from aligndet_cli.backbones.weights import load_backbone_weights, network_of
from aligndet_cli.config import assign, flatten, validated
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.voc import VOC_CLASSES
from aligndet_cli.detectors.checkpoint import BEST, KIND, DetectorFile, WeightsName, read_detector, weights_file
from aligndet_cli.detectors.recipes import LabelFacts
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import find_initial, load_initial, resolution_of
from aligndet_cli.hub import fetch_weights, is_on_hub
from aligndet_cli.logs import logger
from aligndet_cli.workspace import Workspace

_STAGES = ("finetune", "pretrain-box", "pretrain-image")
# Groups and settings of `finetune` that decide what `load` returns.
_SETTINGS = ("detector", "backbone", "recipe", "resolution", "load_modules", "keep_box_predictor", "min_match")


def load(
    run: str | Path,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    *,
    workspace: str | Path | None = None,
    weights: WeightsName = "last",
    config: Mapping[str, Any] | None = None,
) -> ImageDetector:
    """Build the detector of a run, as `finetune` builds it before its first step.

    After `pretrain-box` neck and head are pre-trained; the class predictor, and whatever the pre-training does not
    train, starts afresh from torch's generator. A fine-tuned detector comes as it is, unless other classes are given.
    It is in training mode, on the CPU.

    Args:
        run: a weights.pt, the folder of a run, or its name in the workspace, such as `retinanet-resnet50` or, if
            several stages have a run of that name, `pretrain-box/retinanet-resnet50`; or `hub:OWNER/NAME`, weights of
            the Hugging Face Hub, which are downloaded if they are not in its cache.
        num_classes: number of classes with background, as in torchvision: 91 for COCO, whose labels are 1 to 90.
        classes: names of the classes, with labels from 1 on, instead of `num_classes`.
        workspace: folder of the runs ($ALIGNDET_WORKSPACE, else ./workspace).
        weights: last or best weights of a fine-tuned run.
        config: settings of `finetune` that differ from its defaults, nested or with dotted keys, of these groups:
            `detector`, `backbone` (such as `{"backbone.frozen_stages": 0}`), `recipe`, `resolution`, `load_modules`,
            `keep_box_predictor`, `min_match`.

    Raises:
        ConfigError: no such run, no number of classes where one is needed, or a setting that does not fit.
        WeightsError: the file is missing or damaged, or holds something else.
    """
    place = Workspace.locate(None if workspace is None else Path(workspace))
    file = find_weights(run, place, _STAGES[:2], weights)
    source = read_detector(file)
    categories = _categories(source, file, num_classes, classes)
    settings = _settings(file, source, {} if config is None else config)
    if categories == source.categories and "min_match" not in settings.model_fields_set:
        settings = settings.model_copy(update={"min_match": 1.0})  # all of a detector that is taken as it is
    is_voc = {category.name for category in categories} == set(VOC_CLASSES)
    initial = find_initial(settings, place, LabelFacts(is_voc=is_voc))
    model = initial.detector.build(build_backbone(initial.backbone), len(categories))
    report = load_initial(model, initial, settings, categories)
    assert report is not None, "initial weights are a file's"
    for line in report.table():
        logger.info(line)
    resolution = resolution_of(initial, settings)
    keeps_sides = source.resolution is not None and "resolution" not in settings.model_fields_set
    test_sides = source.resolution if keeps_sides and source.resolution else resolution.at_test
    model.to(memory_format=torch.channels_last)
    return ImageDetector(model, categories, initial, resolution, test_sides)


def backbone(
    run: str | Path, name: str | None = None, *, workspace: str | Path | None = None, weights: WeightsName = "last"
) -> Backbone:
    """Build the backbone in a file of weights, of a detector or of a backbone alone.

    It takes (B, 3, H, W) images in RGB, normalised with ImageNet's mean and deviation, and returns maps by level:
    `{"c2": (B, C2, H/4, W/4), "c3": ..., "c4": ..., "c5": (B, C5, H/32, W/32)}`. It is in training mode, on the CPU,
    and nothing is frozen.

    Args:
        run: as in `load`, or a run of `pretrain-image`, or a file in any layout that `--backbone-weights` takes.
        name: name of the network, such as `resnet50`; only needed where the file does not tell it, as one of timm.
        workspace, weights: as in `load`.

    Raises:
        ConfigError: no such run, or no such network.
        WeightsError: the file is missing or damaged, holds another network, or does not tell which.
    """
    place = Workspace.locate(None if workspace is None else Path(workspace))
    file = find_weights(run, place, _STAGES, weights)
    content = read_plain(file, str(file))
    if isinstance(content, dict) and content.get("kind") == KIND:
        source = read_detector(file)
        if name not in (None, source.backbone.name):
            raise WeightsError(f"{file}: has a {source.backbone.name}, not a {name}; leave the name out")
        settings = source.backbone.model_copy(update={"frozen_stages": -1, "norm_eval": False})
        built = build_backbone(settings)
        tensors = {key.removeprefix("backbone."): value for key, value in source.state_dict.items()}
        built.load_state_dict({key: tensors[key] for key in built.state_dict()})
        return built
    name = name or network_of(file)
    built = build_backbone(validated(BackboneConfig, {"name": name}, {"name": "name"}))
    load_backbone_weights(built, file)
    return built


def find_weights(run: str | Path, workspace: Workspace, stages: Sequence[str], which: WeightsName) -> Path:
    """Return the weights file that a path, the folder of a run, or a run's name means.

    Raises:
        ConfigError: there is none, or several runs have the name.
    """
    if not isinstance(run, str | os.PathLike):
        raise ConfigError(f"run: is of type {type(run).__name__}; give a path, or the name of a run")
    if which not in get_args(WeightsName):
        raise ConfigError(f"weights={which!r}: write {' or '.join(map(repr, get_args(WeightsName)))}")
    if is_on_hub(run):
        return fetch_weights(str(run), file="weights.pt" if which == "last" else BEST)
    path = Path(run)
    if path.is_file():
        if which != "last":
            raise ConfigError(f"{run}: is a file, so weights={which!r} chooses nothing; name the folder of the run")
        return path
    if (path / "weights.pt").is_file():
        return weights_file(path, which)
    stage, _, name = str(run).rpartition("/")
    found = [
        artifact
        for one in stages
        if stage in ("", one) and (artifact := workspace.find(one, name)) is not None and name
    ]
    if len(found) == 1:
        return weights_file(found[0].folder, which)
    if found:
        names = " or ".join(f"{artifact.manifest['stage']}/{name}" for artifact in found)
        raise ConfigError(f"{run}: several runs in {workspace.root} have that name; write {names}")
    there = [f"{one}/{artifact.name}" for one in stages for artifact in workspace.artifacts(one)]
    runs = f"runs in {workspace.root}: {', '.join(there)}" if there else f"no finished run is in {workspace.root}"
    raise ConfigError(f"{run}: no such file, folder of a run, or run; {runs}")


def _categories(
    source: DetectorFile, file: Path, num_classes: int | None, classes: Sequence[str] | None
) -> tuple[Category, ...]:
    """Return the classes that are asked for: the file's own, or new ones with ids from 1 on."""
    is_list = isinstance(classes, list | tuple) and all(isinstance(name, str) and name for name in classes)
    if classes is not None and not (is_list and classes):
        raise ConfigError(f"classes={classes!r}: give a list of names, such as ['cat', 'dog']")
    if not isinstance(num_classes, Integral | None) or isinstance(num_classes, bool):
        raise ConfigError(f"num_classes={num_classes!r}: give a whole number, which counts the background")
    if classes is not None and num_classes not in (None, len(classes) + 1):
        raise ConfigError(f"num_classes={num_classes}: {len(classes)} classes and background are {len(classes) + 1}")
    if num_classes is not None and num_classes < 2:
        raise ConfigError(f"num_classes={num_classes}: counts the background, so it is 2 at least")
    own = list(labels_of(source.categories).values())
    names_are_own = classes is None or list(classes) == [source.categories[class_id].name for class_id in own]
    if own and names_are_own and num_classes in (None, len(own) + 1, max(labels_of(source.categories)) + 1):
        return source.categories
    if classes is None and num_classes is None:
        raise ConfigError(f"{file}: only pre-trained, it has no classes yet; give num_classes or classes")
    if classes is not None and len(set(classes)) < len(classes):
        raise ConfigError(f"classes={classes!r}: has a name twice")
    names = list(classes) if classes is not None else [str(number) for number in range(1, num_classes or 0)]
    return tuple(Category(number, name) for number, name in enumerate(names, start=1))


def _settings(file: Path, source: DetectorFile, config: Mapping[str, Any]) -> FinetuneConfig:
    """Return the settings with which `finetune` would start from this file."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: is of type {type(config).__name__}; give a mapping of settings")
    values: dict[str, Any] = {}
    for path, value in flatten(config):
        if path.partition(".")[0] not in _SETTINGS:
            raise ConfigError(f"config: '{path}' does not change what is loaded; settings are {', '.join(_SETTINGS)}")
        assign(values, path, value)
    assign(values, "init", str(file))
    if isinstance(values.setdefault("detector", {}), dict):
        values["detector"].setdefault("family", source.detector.family)
    return validated(FinetuneConfig, values, {})
