"""The paper's numbers, and the choice of those that a run is compared with.

Source: Li et al., AlignDet, ICCV 2023, tables 2 to 13, in percent. Left out: the supervised backbone of
table 5 (another recipe than that of tables 2 and 7), and the ImageNet subset of table 8 (nothing in a run tells which
images it was).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from aligndet_cli.data.sides import fold_sides
from aligndet_cli.pretrain_box.recipes import DEFAULTS
from aligndet_cli.training.recipe import CBNET_SIDES, MULTI_SCALE, REFERENCE_BATCH, SINGLE_SCALE, WIDE_SIDES
from aligndet_cli.training.schedules import LENGTHS, steps_per_epoch
from aligndet_cli.workspace import Artifact

_FRACTIONS = (1, 5, 10, 20, 100)
# Table 2: COCO, ResNet-50, supervised. AP by fraction: without, with AlignDet.
_TABLE_2 = {
    ("fcos", "12k"): ((8.1, 16.5, 21.5, 23.6, 22.1), (9.5, 18.6, 23.3, 26.3, 27.4)),
    ("fcos", "1x"): ((7.3, 16.0, 20.0, 23.8, 36.6), (8.5, 17.3, 21.1, 25.1, 37.5)),
    ("retinanet", "12k"): ((8.0, 17.8, 21.0, 23.0, 24.2), (9.8, 19.3, 23.5, 25.9, 26.3)),
    ("retinanet", "1x"): ((8.3, 18.0, 22.2, 25.9, 36.3), (9.9, 19.0, 23.1, 26.6, 37.3)),
    ("faster-rcnn", "12k"): ((9.2, 18.7, 24.2, 26.6, 27.3), (11.7, 21.2, 26.9, 29.6, 30.6)),
    ("faster-rcnn", "1x"): ((6.5, 14.0, 18.8, 24.1, 37.9), (8.9, 16.2, 20.1, 25.2, 39.0)),
    ("mask-rcnn", "12k"): ((8.8, 19.1, 24.2, 26.5, 27.2), (12.4, 22.4, 27.4, 30.1, 30.5)),
    ("mask-rcnn", "1x"): ((7.6, 15.2, 20.0, 25.2, 38.3), (9.5, 16.6, 20.8, 25.9, 39.4)),
    ("detr", "50e"): ((7.6, 18.9, 24.1, 29.7, 35.0), (11.2, 21.4, 26.1, 30.9, 37.3)),
    ("detr", "100e"): ((7.7, 19.5, 25.0, 30.4, 38.4), (10.7, 21.2, 26.0, 31.2, 39.0)),
}
# Table 3: COCO, Mask R-CNN, and HTC on CBNet v2. Box and mask AP: without, with.
_TABLE_3 = {
    ("mobilenet_v2", "supervised", "1x"): ((30.1, 27.2), (31.3, 27.9)),
    ("resnet18", "supervised", "1x"): ((34.5, 31.1), (35.7, 31.9)),
    ("swin_s", "supervised", "1x"): ((46.6, 41.5), (47.5, 41.8)),
    ("swin_s", "supervised", "3x"): ((48.2, 43.2), (49.1, 43.4)),
    ("swin_b", "supervised", "1x"): ((48.8, 43.1), (49.6, 43.6)),
    ("swin_b", "simmim", "3x"): ((51.0, 45.1), (51.6, 45.8)),
    ("cb-swin_l", "supervised", "1x"): ((57.3, 49.7), (57.8, 50.1)),
}
# Table 4: VOC 07 test, ResNet-50, supervised, pre-trained on COCO. AP, AP50, AP75: without, with.
_TABLE_4 = {
    ("fcos", "12k"): ((52.6, 79.6, 57.1), (53.4, 80.2, 65.2)),
    ("retinanet", "12k"): ((54.4, 79.3, 58.7), (56.0, 80.4, 61.0)),
    ("faster-rcnn", "12k"): ((53.5, 81.4, 58.2), (57.8, 82.9, 64.7)),
    ("detr", "100e"): ((52.1, 76.8, 54.9), (58.2, 81.1, 62.9)),
}
# Table 5: COCO, ResNet-50 of others, 1x. AP, AP50, AP75: without, with.
_TABLE_5 = {
    ("mask-rcnn", "moco"): ((40.3, 59.9, 43.9), (41.0, 61.0, 44.9)),
    ("mask-rcnn", "pixpro"): ((40.9, 60.4, 44.8), (41.7, 61.7, 45.5)),
    ("mask-rcnn", "swav"): ((41.6, 62.2, 45.8), (42.3, 62.5, 46.7)),
    ("retinanet", "moco"): ((37.8, 56.4, 40.4), (38.4, 57.1, 41.3)),
    ("retinanet", "pixpro"): ((38.4, 57.0, 41.4), (39.0, 57.5, 41.9)),
    ("retinanet", "swav"): ((37.1, 56.8, 39.5), (38.5, 58.2, 41.0)),
}
# Table 6: COCO, DETR, 150 epochs. AP, AP50, AP75: without, with.
_TABLE_6 = {
    "supervised": ((39.5, 60.3, 41.4), (41.0, 61.9, 43.1)),
    "swav": ((39.7, 60.3, 41.7), (41.4, 62.1, 43.8)),
}
# Tables 5 and 6: COCO, ResNet-50, what other methods pre-trained. AP, AP50, AP75. Left out: of the methods that only a
# backbone is loaded of, because no run tells how long or on which images that was trained.
_OTHERS = {
    ("5", "mask-rcnn", "soco", "1x", "SoCo"): (43.0, 63.3, 47.1),
    ("5", "mask-rcnn", "soco", "1x", "SoCo on COCO"): (40.6, 61.1, 44.4),
    ("6", "detr", "swav", "150e", "UP-DETR"): (40.5, 60.8, 42.6),
    ("6", "detr", "swav", "150e", "DETReg"): (39.8, 61.0, 41.6),
}
# Variants of imported runs by layout and epochs of pre-training; None: the file does not tell. SoCo was trained for 400
# epochs on ImageNet, for 530 on COCO; of UP-DETR one file of 60 epochs is published; DETReg of table 6 is not.
_IMPORTED = {
    ("aligndet", None): "AlignDet",
    ("soco", 400): "SoCo",
    ("soco", 530): "SoCo on COCO",
    ("up-detr", 60): "UP-DETR",
    ("up-detr", None): "UP-DETR",
    ("detreg", 50): "DETReg",
}
# Batch size and short sides of DETReg's recipe.
_DETREG = (192, DEFAULTS["detreg"]["views"]["short_side"])
# Table 7: COCO, Mask R-CNN, ResNet-50, supervised. Boxes, then masks.
_TABLE_7 = {
    ("1x", "plain"): (38.3, 58.0, 42.1, 34.3, 54.9, 36.6),
    ("2x", "plain"): (38.8, 58.4, 42.4, 34.7, 55.4, 37.2),
    ("3x", "plain"): (39.0, 58.7, 42.9, 35.0, 55.6, 37.7),
    ("4x", "plain"): (39.2, 59.5, 42.9, 35.6, 56.5, 38.1),
    ("1x", "AlignDet"): (39.4, 59.2, 43.2, 35.3, 56.1, 37.7),
    ("2x", "AlignDet"): (39.8, 59.3, 43.3, 35.3, 56.4, 37.6),
}
# Tables 8 to 13: COCO, ResNet-50, supervised, 1x; RetinaNet is table 2's, by its AP. AP, AP50, AP75, APs, APm, APl.
_ABLATIONS = {
    ("8", "faster-rcnn", "plain"): (37.9, 58.2, 41.1, 22.0, 41.4, 48.6),
    ("8", "faster-rcnn", "AlignDet"): (39.0, 59.3, 42.5, 22.3, 42.4, 50.4),
    ("9", "faster-rcnn", "modules neck"): (38.4, 58.5, 41.8, 22.2, 41.7, 50.0),
    ("9", "faster-rcnn", "modules neck,rpn"): (38.2, 58.3, 41.4, 21.4, 41.6, 49.7),
    ("9", "faster-rcnn", "modules head,neck"): (38.8, 58.8, 42.5, 21.8, 42.2, 50.6),
    ("10", "faster-rcnn", "tasks contrastive"): (38.7, 58.8, 42.1, 22.4, 41.9, 50.2),
    ("10", "faster-rcnn", "tasks regression"): (38.7, 58.6, 42.4, 22.1, 41.8, 50.2),
    ("11", "retinanet", "backbone trained"): (35.5, 53.7, 37.7, 18.5, 38.9, 47.0),
    ("11", "retinanet", "AlignDet"): (37.3, 56.6, 40.1, 21.0, 40.9, 49.8),
    ("13", "retinanet", "length 2x"): (37.0, 56.2, 39.3, 20.8, 40.6, 49.5),
    ("13", "retinanet", "length 3x"): (37.0, 56.1, 39.5, 20.4, 40.6, 48.7),
}

_CBNET = "cb-swin_l"
_CBNET_SIDES = tuple(fold_sides(CBNET_SIDES))
_CBNET_BATCHES = {"plain": REFERENCE_BATCH, "AlignDet": 128}  # of fine-tuning
_BOX = ("AP", "AP50", "AP75")
_SIZES = (*_BOX, "APs", "APm", "APl")
_MASK = ("mask_AP", "mask_AP50", "mask_AP75")
_PAIR = ("plain", "AlignDet")

_COCO_TRAIN, _COCO_VAL = (118_287, 117_266), 5_000  # with and without the images that have no label
_VOC_TRAIN, _VOC_TEST = 16_551, 4_952
_EPOCHS = {12: "1x", 24: "2x", 36: "3x", 48: "4x", 50: "50e", 100: "100e", 150: "150e"}
_DROPS: dict[str, tuple[float, ...]] = {str(name): length.drops for name, length in LENGTHS.items()}


@dataclass(frozen=True, eq=False)
class Published:
    """Numbers of the paper in 0..1 by metric, and their tables. There is one for each experiment."""

    source: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """Experiment of the paper.

    Attributes:
        data: `coco` or `voc`.
        weights: the backbone's: `supervised`, `moco`, `swav`, `pixpro`, `soco` or `simmim`.
        schedule: schedule of fine-tuning; the paper's 90k iterations are its 1x.
        variant: `plain`, `AlignDet`, another method, or the change of an ablation.
    """

    data: str
    detector: str
    backbone: str
    weights: str
    schedule: str
    fraction: float
    variant: str


@functools.cache
def published_numbers() -> dict[Experiment, Published]:
    """Return all numbers; those of several tables on one experiment are merged, and never disagree."""
    numbers: dict[Experiment, dict[str, float]] = {}
    sources: dict[Experiment, list[str]] = {}
    for table, experiment, names, values in (*_table_2(), *_pairs(), *_others(), *_ablations()):
        known = numbers.setdefault(experiment, {})
        for name, value in zip(names, values, strict=True):
            assert known.setdefault(name, value) == value, (experiment, name)
        sources.setdefault(experiment, []).append(table)
    names_of = {one: " and ".join(dict.fromkeys(tables)) for one, tables in sources.items()}
    return {
        one: Published(f"table {names_of[one]}", {name: percent / 100 for name, percent in known.items()})
        for one, known in numbers.items()
    }


_Entry = tuple[str, Experiment, tuple[str, ...], tuple[float, ...]]  # table, experiment, metrics, percents


def _table_2() -> Iterator[_Entry]:
    for (detector, schedule), pair in _TABLE_2.items():
        for variant, values in zip(_PAIR, pair, strict=True):
            for fraction, value in zip(_FRACTIONS, values, strict=True):
                one = replace(_r50(detector, schedule, variant), fraction=fraction)
                yield "2", one, _BOX[:1], (value,)


def _pairs() -> Iterator[_Entry]:
    for place, variant in enumerate(_PAIR):
        for (backbone, weights, schedule), both in _TABLE_3.items():
            detector = "htc" if backbone == _CBNET else "mask-rcnn"
            one = replace(_r50(detector, schedule, variant, weights=weights), backbone=backbone)
            yield "3", one, ("AP", "mask_AP"), both[place]
        for (detector, schedule), threes in _TABLE_4.items():
            yield "4", replace(_r50(detector, schedule, variant), data="voc"), _BOX, threes[place]
        for (detector, weights), threes in _TABLE_5.items():
            yield "5", _r50(detector, "1x", variant, weights=weights), _BOX, threes[place]
        for weights, threes in _TABLE_6.items():
            yield "6", _r50("detr", "150e", variant, weights=weights), _BOX, threes[place]


def _others() -> Iterator[_Entry]:
    for (table, detector, weights, schedule, variant), threes in _OTHERS.items():
        yield table, _r50(detector, schedule, variant, weights=weights), _BOX, threes


def _ablations() -> Iterator[_Entry]:
    for (schedule, variant), six in _TABLE_7.items():
        yield "7", _r50("mask-rcnn", schedule, variant), (*_BOX, *_MASK), six
    for (table, detector, variant), six in _ABLATIONS.items():
        yield table, _r50(detector, "1x", variant), _SIZES, six


def _r50(detector: str, schedule: str, variant: str, *, weights: str = "supervised") -> Experiment:
    return Experiment("coco", detector, "resnet50", weights, schedule, 100, variant)


def find_published(evaluation: Artifact, run: Artifact, start: Artifact | None) -> Published | None:
    """Return the paper's numbers for an evaluated run, if it was trained as in the paper.

    Data sets are known by their number of images, backbones by what their weights' file shows. Schedule, batch size,
    image sizes, crops and recipe must be those of the row.

    Args:
        start: `pretrain-box` run that the run began with.
    """
    protocol = run.result.get("protocol")
    is_of_best = evaluation.manifest.get("settings", {}).get("weights") == "best"
    if protocol is None or is_of_best or not _is_by_recipe(run.config()):
        return None
    experiment = _experiment(evaluation, run, protocol, start)
    if experiment is None or _settings_of(protocol) != _published_settings(experiment):
        return None
    return published_numbers().get(experiment)


def _is_by_recipe(config: dict[str, Any]) -> bool:
    """Return True if the recipe alone decided on the weights. An imported run has no such settings."""
    training = config.get("training")
    if training is None or any(config.get(name) is not None for name in ("early_stop", "ema")):
        return False
    return all(training.get(name) is None for name in ("lr", "weight_decay", "clip_norm"))


def _experiment(
    evaluation: Artifact, run: Artifact, protocol: dict[str, Any], start: Artifact | None
) -> Experiment | None:
    config = run.config()
    fraction, num_images = float(config["fraction"]), int(run.result["images"])
    data = _data(fraction, num_images, int(evaluation.result["images"]))
    if data is None:
        return None
    family = config["detector"]["family"]
    schedule = _schedule(family, protocol, fraction, num_images)
    weights, variant = protocol["backbone_weights"], _variant(run, config, start)
    if schedule is None or variant is None:
        return None
    return Experiment(data, family, run.result["backbone"], weights, schedule, fraction, variant)


def _data(fraction: float, num_images: int, num_measured: int) -> str | None:
    if num_measured == _COCO_VAL and num_images in [int(fraction / 100 * count) for count in _COCO_TRAIN]:
        return "coco"
    if num_measured == _VOC_TEST and num_images == _VOC_TRAIN:
        return "voc"
    return None


def _schedule(family: str, protocol: dict[str, Any], fraction: float, num_images: int) -> str | None:
    steps, batch_size = int(protocol["steps"]), int(protocol["batch_size"])
    if fraction != 100:  # as long as with all images
        lengths = {375_000: "50e", 750_000: "100e"} if family == "detr" else {12_000: "12k", 90_000: "1x"}
        return lengths.get(steps) if batch_size == REFERENCE_BATCH else None
    return _named_schedule(steps, batch_size, num_images)


def _named_schedule(steps: int, batch_size: int, num_images: int) -> str | None:
    if batch_size == REFERENCE_BATCH and steps in (12_000, 90_000):
        return "12k" if steps == 12_000 else "1x"
    epochs = steps / steps_per_epoch(num_images, batch_size)
    near = [name for count, name in _EPOCHS.items() if abs(epochs - count) < 0.05]
    return near[0] if near else None


def _settings_of(protocol: dict[str, Any]) -> tuple[Any, ...]:
    """Return the settings of a run that must be the paper's: recipe, batch size, policy, sides, drops of the rate."""
    drops = tuple(round(step / protocol["steps"], 3) for step in protocol["drop_steps"])
    sides = (tuple(protocol["short_sides"]), protocol["long_side"])
    return protocol["recipe"], protocol["batch_size"], protocol["policy"], sides, drops


def _published_settings(one: Experiment) -> tuple[Any, ...]:
    """Return the settings that `_settings_of` returns for a run of an experiment of the paper."""
    recipe, batch_size, policy = "default", REFERENCE_BATCH, "resize"
    sides: tuple[int | str, ...] = SINGLE_SCALE
    long_side = 1333
    drops = _DROPS[one.schedule]
    if one.weights in ("moco", "pixpro", "swav", "soco"):
        sides = MULTI_SCALE
        if one.detector in ("faster-rcnn", "mask-rcnn"):
            recipe = {"moco": "moco-v2"}.get(one.weights, one.weights)
    if one.backbone.startswith("swin"):
        recipe, policy, sides = "swin", "detr", WIDE_SIDES
        drops = (27 / 36, 33 / 36) if one.schedule == "3x" else drops
    if one.backbone == _CBNET:
        recipe, policy, sides, long_side = "cbnet", "resize", _CBNET_SIDES, 1600
        batch_size = _CBNET_BATCHES.get(one.variant, REFERENCE_BATCH)
    if one.weights == "simmim":
        recipe, batch_size, policy, sides, drops = "simmim", 32, "lsj", SINGLE_SCALE, _DROPS[one.schedule]
    if one.weights == "soco":
        drops = (60 / 90, 80 / 90)  # detectron2's
    if one.detector == "detr":
        policy, sides = "detr", WIDE_SIDES
        recipe = "up-detr" if one.variant == "UP-DETR" else recipe
    if one.data == "voc":
        policy, sides = "resize", WIDE_SIDES
        drops = (70 / 100,) if one.detector == "detr" else drops
    return recipe, batch_size, policy, (sides, long_side), tuple(round(drop, 3) for drop in drops)


def _variant(run: Artifact, config: dict[str, Any], start: Artifact | None) -> str | None:
    """Return the `variant` of a run (see `Experiment`), or None if the paper has none like it."""
    if run.result["init"] == "backbone":
        return "plain"
    if start is None:
        return None
    pretraining = start.config()
    if "training" not in pretraining:  # imported
        is_theirs = pretraining["layout"] != "detreg" or not pretraining["detector"]["pre_norm"]
        return _IMPORTED.get((pretraining["layout"], start.result.get("epochs"))) if is_theirs else None
    method = pretraining.get("method", "aligndet")
    changes = _changes_of_pretraining(config, pretraining, start)
    if method == "aligndet" and _is_pretrained_at(pretraining, *_usual_pretraining(config, run.result["protocol"])):
        return changes[0] if len(changes) == 1 else None if changes else "AlignDet"
    if method == "detreg" and _is_pretrained_at(pretraining, *_DETREG) and not pretraining["detector"]["pre_norm"]:
        return None if changes else "DETReg"
    return None


def _changes_of_pretraining(config: dict[str, Any], pretraining: dict[str, Any], start: Artifact) -> list[str]:
    """Return what is not as in most of the paper's pre-trainings; on fewer images it has no name in the paper."""
    length = _named_schedule(
        int(start.result["steps"]), int(pretraining["training"]["batch_size"]), int(start.result["images"])
    )
    changes = []
    modules = set(config["load_modules"]) - {"backbone"}
    if pretraining["tasks"] != "both":
        changes.append(f"tasks {pretraining['tasks']}")
    if not pretraining["freeze_backbone"]:
        changes.append("backbone trained")
    if modules != {"neck", "rpn", "head"}:
        changes.append(f"modules {','.join(sorted(modules))}")
    if length != ("50e" if config["detector"]["family"] == "detr" else "1x"):
        changes.append(f"length {length}")
    if int(start.result["images"]) < 0.95 * _COCO_TRAIN[1]:
        changes.append("fewer images")
    return changes


def _usual_pretraining(config: dict[str, Any], protocol: dict[str, Any]) -> tuple[int, tuple[int | str, ...]]:
    """Return the paper's batch size, and short sides of views, in the pre-training that a run starts from."""
    if protocol["recipe"] == "cbnet":
        return REFERENCE_BATCH, _CBNET_SIDES
    return 64 if config["detector"]["family"] == "detr" else protocol["batch_size"], MULTI_SCALE


def _is_pretrained_at(pretraining: dict[str, Any], batch_size: int, sides: tuple[int | str, ...]) -> bool:
    """Return True if the recipe decided on the rates and the proposals, and batch and short sides are these."""
    own_sides = pretraining.get("views", {}).get("short_side", sides)
    is_usual = pretraining["training"]["batch_size"] == batch_size and pretraining.get("topk") is None
    return is_usual and tuple(own_sides) == tuple(sides) and _is_by_recipe(pretraining)
