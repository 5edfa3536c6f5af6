"""Model cards: the `README.md` beside a `weights.pt`, in the format of the Hugging Face Hub."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

FILE = "README.md"
PAPER = "https://arxiv.org/abs/2307.11077"
_TASKS = {"finetune": "object-detection", "pretrain-image": "image-feature-extraction"}
_MADE = {
    "pretrain-image": "A backbone ({backbone}) trained on images",
    "pretrain-box": "The neck and head of a {detector} on a {backbone}, pre-trained on boxes found without labels",
    "finetune": "A {detector} on a {backbone}, trained on labelled images",
}
_USES = {
    "pretrain-image": ("aligndet pretrain-box --backbone {backbone} --backbone-weights weights.pt",),
    "pretrain-box": ("aligndet finetune DATA --detector {detector} --init weights.pt",),
    "finetune": (
        "aligndet predict photos/ --weights weights.pt",
        "aligndet finetune DATA --detector {detector} --init weights.pt",
    ),
}
_TORCHVISION = "BSD-3-Clause for torchvision's code; its weights learned from {data}, whose own terms may hold for them"
_TIMM = "timm"  # as the setting `backbone.weights`
# Terms under which programs publish weights in their layout.
_LICENCES = {
    "torchvision": _TORCHVISION.format(data="ImageNet and COCO"),
    "mmdet": "Apache-2.0 for MMDetection's model zoo",
    "detectron2": "CC BY-SA 3.0 for Detectron2's model zoo",
    "detr": "Apache-2.0 for the weights of facebookresearch/detr",
}
_UNKNOWN = "not known to aligndet; see where the file is from"
_UNRECORDED = "not recorded; see where timm has them from"  # by runs of before
_TOLD_ELSEWHERE = ("explanation", "backbone_licence", "teacher_licence")


def card(manifest: Mapping[str, Any], config: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the card of a run that has weights. It holds no times and no folders: the same run has the same card.

    Args:
        manifest: of the run, with its result.
        config: content of its `config.json`.
        measured: contents of the `metrics.json` of its evaluations.
    """
    stage, name = str(manifest["stage"]), str(manifest["name"])
    backbone = str(config["backbone"]["name"]) if "backbone" in config else str(manifest["result"]["backbone"])
    detector = str(config.get("detector", {}).get("family", "")).replace("_", "-")
    words = {"name": name, "backbone": backbone, "detector": detector}
    front: dict[str, Any] = {
        "library_name": "aligndet",
        "tags": [word for word in ("aligndet", stage, detector, backbone) if word],
        **({"pipeline_tag": _TASKS[stage]} if stage in _TASKS else {}),
        **({"model-index": [{"name": name, "results": list(map(_result, measured))}]} if measured else {}),
    }
    sections: dict[str, Iterable[str]] = {
        "Numbers": _numbers(manifest["result"], measured),
        "Use": [f"    {line.format(**words)}" for line in _USES[stage]],
        "Data and licences": _origin(manifest, config),
        "Settings": _settings(manifest),
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {name}", ""]
    lines += [f"{_MADE[stage].format(**words)}, by [AlignDet]({PAPER}) as `aligndet` has it."]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _result(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of the Hub's `model-index`; AP is from 0 to 1 there, too."""
    numbers = {key: metrics[key] for key in ("AP", "AP50", "AP75") if metrics.get(key) is not None}
    numbers |= {f"mask_{key}": metrics["segm"][key] for key in numbers if metrics.get("segm")}
    return {
        "task": {"type": "object-detection"},
        "dataset": {"type": str(metrics["split"]), "name": str(metrics["split"])},
        "metrics": [{"type": key, "name": key, "value": value} for key, value in numbers.items()],
    }


def _numbers(result: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one table of what evaluations measured, or the remark that there is none, and one of the run's result."""
    if measured:
        yield from ("| split | weights | AP | AP50 | AP75 |", "|---|---|---:|---:|---:|")
        for metrics in measured:
            numbers = (metrics.get(key) for key in ("AP", "AP50", "AP75"))
            shown = " | ".join("-" if value is None else f"{100 * value:.1f}" for value in numbers)
            yield f"| {metrics['split']} | {metrics.get('weights', 'last')} | {shown} |"
        yield ""
    else:
        yield from ("Not evaluated when this was written.", "")
    yield from _table(result)


def _origin(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the weights were made from, and under which terms that is, as far as it is known."""
    data, result = config.get("data", {}), manifest["result"]
    place = data.get("annotations") or data.get("root") or data.get("images")
    if place is not None:
        count = f", {result['images']:,} images" if "images" in result else ""
        yield f"- Data: `{Path(place).name}`{count}. Licence: {_UNKNOWN.replace('file', 'data')}."
    if "layout" in config:
        yield f"- Imported from `{Path(config['file']).name}`. Licence: {_LICENCES.get(config['layout'], _UNKNOWN)}."
    else:
        yield f"- {_start(str(manifest['stage']), config, result)}"
    if config.get("teacher"):
        yield f"- {_teacher(str(config['teacher']), result)}"
    yield "- `aligndet` is under Apache-2.0, which says nothing about weights."


def _start(stage: str, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    init, weights = str(config.get("init", "")), str(config["backbone"]["weights"])
    kind = result.get("backbone_weights") or result.get("protocol", {}).get("backbone_weights", "none")
    if stage == "finetune" and init == "pretrain":
        return f"It started from a run of `pretrain-box`, whose card says from what (backbone: {kind})."
    if init not in ("", "pretrain", "backbone", "scratch"):
        return f"It started from `{Path(init).name}`. Licence: {_UNKNOWN}."
    if kind == "none" and weights in ("auto", "none"):
        return "It started from random numbers."
    if weights in ("auto", "workspace"):
        return f"Its backbone started from weights that `aligndet` had made ({kind})."
    if weights == _TIMM:
        licence = result.get("backbone_licence", _UNRECORDED)
        return f"Its backbone started from timm's weights of `{config['backbone']['name']}`. Licence: {licence}."
    licence = _TORCHVISION.format(data="ImageNet") if _is_of_torchvision(weights) else _UNKNOWN
    return f"Its backbone started from `{Path(weights).name}`. Licence: {licence}."


def _teacher(teacher: str, result: Mapping[str, Any]) -> str:
    if teacher.startswith("timm:"):
        return f"It learned from timm's `{teacher}`. Licence: {result.get('teacher_licence', _UNRECORDED)}."
    return f"It learned from the network in `{Path(teacher).name}`. Licence: {_UNKNOWN}."


def _is_of_torchvision(weights: str) -> bool:
    """Return True for a name such as `DEFAULT` or `ResNet50_Weights.IMAGENET1K_V1`."""
    owner, _, name = weights.rpartition(".")
    return "/" not in weights and name.isupper() and (owner == "" or owner.endswith("_Weights"))


def _settings(manifest: Mapping[str, Any]) -> Iterator[str]:
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    yield from (f"Made with {packages}.", "", *_table(manifest["settings"]))


def _table(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of values; of paths the last name, and nothing of what is not there or a sentence."""
    yield from ("| | |", "|---|---|")
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from (f"| `{key}.{inner}` | {_cell(text)} |" for inner, text in value.items() if text is not None)
        elif value is not None and key not in _TOLD_ELSEWHERE:
            yield f"| `{key}` | {_cell(value)} |"


def _cell(value: Any) -> str:
    if isinstance(value, str) and value.startswith("/"):
        value = Path(value).name
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
