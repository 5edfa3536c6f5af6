"""Transfer of weights between detectors, with a report by module."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import DetectorFile
from aligndet_cli.errors import ConfigError, WeightsError

# Words of `--load-modules`; the head is all top-level modules of a detector except the first three.
MODULE_NAMES = ("backbone", "neck", "rpn", "head")
CLASS_PREDICTOR = "class_predictor"
# Modules that some methods of pre-training do not train, and leave out of their files.
LEFT_OUT = ("rpn", "box_predictor")
SEMANTIC_HEAD = "semantic_head"  # a detector may get one at any fine-tuning


@dataclass
class ModuleReport:
    """Fate of the tensors of one top-level module of a detector.

    Attributes:
        matched: copied.
        restarted: fresh on purpose: class predictor, norms that the source does not have, modules not asked for.
        missing: fresh because the source lacks them.
        unexpected: in the source only.
        mismatched: fresh because shapes differ.
        matched_values, wanted_values: numbers of weights that arrived and should arrive.
    """

    matched: int = 0
    restarted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    matched_values: int = 0
    wanted_values: int = 0


@dataclass(frozen=True)
class LoadReport:
    """Result of a transfer, by top-level module."""

    modules: dict[str, ModuleReport]

    @property
    def share(self) -> float:
        """Share of the wanted weights that arrived, 0..1; restarted modules do not count."""
        wanted = sum(report.wanted_values for report in self.modules.values())
        return sum(report.matched_values for report in self.modules.values()) / max(wanted, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `load_report.json`."""
        modules = {name: asdict(report) for name, report in self.modules.items()}
        return {"matched_share": round(self.share, 6), "modules": modules}

    def table(self) -> list[str]:
        """Return one line per module, for people."""
        head = f"{'module':<16} {'matched':>8} {'restarted':>10} {'missing':>8} {'unexpected':>11} {'shape':>6}"
        lines = [
            f"{name:<16} {report.matched:>8} {len(report.restarted):>10} {len(report.missing):>8} "
            f"{len(report.unexpected):>11} {len(report.mismatched):>6}"
            for name, report in self.modules.items()
        ]
        return [head, *lines, f"{self.share:.1%} of the weights that should arrive did"]

    def check(self, min_match: float, source: str) -> None:
        """Refuse a source if too few weights arrived.

        Raises:
            WeightsError: the share is below `min_match`.
        """
        if self.share >= min_match:
            return
        lost = [name for report in self.modules.values() for name in (*report.missing, *report.mismatched)]
        raise WeightsError(
            f"{source}: only {self.share:.1%} of the weights match (need {min_match:.0%}); not filled: "
            f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}; use the settings it was trained with, "
            "or lower --min-match"
        )


def parse_modules(words: Collection[str]) -> frozenset[str]:
    """Return validated words of `--load-modules`, and "backbone", which is always loaded.

    Raises:
        ConfigError: a word is unknown.
    """
    unknown = [word for word in words if word not in MODULE_NAMES]
    if unknown:
        raise ConfigError(f"--load-modules: '{unknown[0]}' is not one of {', '.join(MODULE_NAMES)}")
    return frozenset({*words, "backbone"})


@torch.no_grad()
def transfer(
    model: nn.Module, source: Mapping[str, Tensor], *, modules: Collection[str], restart: Collection[str]
) -> LoadReport:
    """Copy weights from `source` into `model` in place, by name, where shapes are equal.

    If the model has a norm in place of a convolution's bias, the bias becomes the shift of the norm, so that nothing
    learned is lost (the official converter drops it).

    Args:
        source: state dict, with tensors of any shape.
        modules: words of `MODULE_NAMES` to load; other modules stay fresh.
        restart: top-level modules that stay fresh in any case.
    """
    target = model.state_dict()
    source = _biases_into_norms(source, target)
    norms = {name for name, module in model.named_modules() if hasattr(module, "running_mean")}
    reports: dict[str, ModuleReport] = defaultdict(ModuleReport)
    for key, value in target.items():
        report, owner = reports[_module_of(key)], key.rpartition(".")[0]
        has_new_norm = owner in norms and f"{owner}.weight" not in source
        if _module_of(key) in restart or _word_of(key) not in modules or (has_new_norm and key not in source):
            report.restarted.append(key)
            continue
        report.wanted_values += value.numel()
        if key not in source:
            report.missing.append(key)
        elif source[key].shape != value.shape:
            report.mismatched.append(f"{key} {tuple(source[key].shape)} -> {tuple(value.shape)}")
        else:
            value.copy_(source[key])
            report.matched += 1
            report.matched_values += value.numel()
    for key in source:
        if key not in target:
            reports[_module_of(key)].unexpected.append(key)
    return LoadReport(dict(reports))


def modules_to_restart(
    model: Detector, source: DetectorFile, categories: Sequence[Category], *, keep_box_predictor: bool
) -> set[str]:
    """Return the top-level modules that stay fresh: untouched by pre-training, or made for other classes.

    Box offsets per class fit other classes only if both sides have a single class, as pre-training has: "object".

    Args:
        categories: classes that `model` is to learn.
        keep_box_predictor: False restarts the box predictor in any case.
    """
    restart = set() if keep_box_predictor else {"box_predictor"}
    is_pretrained = source.stage == "pretrain-box"
    own = dict(model.named_children())
    there = {_module_of(key) for key in source.state_dict}
    if SEMANTIC_HEAD in own and SEMANTIC_HEAD not in there:
        restart.add(SEMANTIC_HEAD)
    if is_pretrained:
        restart |= set(model.fresh_modules) | {name for name in LEFT_OUT if name in own and name not in there}
    if source.categories != tuple(categories):
        restart |= {CLASS_PREDICTOR} if is_pretrained and len(categories) == 1 else set(model.class_modules)
    return restart


def _module_of(key: str) -> str:
    return key.partition(".")[0]


def _word_of(key: str) -> str:
    module = _module_of(key)
    return module if module in MODULE_NAMES else "head"


def _biases_into_norms(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename `<block>.0.bias` (convolution) to `<block>.1.bias` (norm) if only the target has that norm."""
    renamed = {}
    for key, value in source.items():
        shift = f"{key.removesuffix('.0.bias')}.1.bias"
        is_replaced = key.endswith(".0.bias") and key not in target and shift in target and shift not in source
        renamed[shift if is_replaced else key] = value
    return renamed
