"""Starts of fine-tuned runs: one name and one colour in every table and picture of a workspace."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aligndet_cli.files import read_json
from aligndet_cli.plotting import COLOURS, all_colours
from aligndet_cli.workspace import Artifact, Workspace

IMPORT = "import"
_LABELS = {"scratch": "scratch", "backbone": "backbone only"}  # of runs that load no pre-trained detector
# Of pre-trained detectors, by the method of their pre-training.
_METHODS = {
    "aligndet": "AlignDet",
    "classes": "clusters as classes",
    "detreg": "DETReg",
    "up-detr": "UP-DETR",
    "soco": "SoCo",
}
# The first start of a kind has its own colour, so that it is the same in most workspaces; the others take the next.
_COLOURS = {"backbone": COLOURS[0], "pretrain": COLOURS[1], "scratch": COLOURS[2]}


@dataclass(frozen=True)
class Start:
    """Weights that a fine-tuned run began with, as people call them.

    Attributes:
        run: name of the run.
        label: the user's, or a usual one.
        kind: `pretrain`, `backbone`, `scratch` or `import`.
        weights: hash of the weights it started from.
        is_labelled: True if the user chose the label.
        colour: that of the label.
    """

    run: str
    label: str
    kind: str
    weights: str
    is_labelled: bool
    colour: str = ""


def find_starts(workspace: Workspace) -> dict[str, Start]:
    """Return the start of each fine-tuned run by the run's name, oldest first.

    Runs without a label are called by the method of their pre-training. Those that started from several pre-trainings
    of one method are told apart by the names of these.
    """
    pretrained = {artifact.content_hash: artifact for artifact in workspace.artifacts("pretrain-box")}
    found: dict[str, Start] = {}
    rivals: dict[tuple[str, ...], set[str]] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for run in workspace.artifacts("finetune"):
        config, init = run.config(), run.result["init"]
        kind = init if init in (*_LABELS, IMPORT) else "pretrain"
        weights, given = str(run.manifest["inputs"]["weights"]), config.get("label")
        settings = pretrained[weights].config() if weights in pretrained else {}
        method = settings.get("method", settings.get("layout"))  # imported runs have a layout
        named = _METHODS.get(str(method), _METHODS["aligndet"])
        usual = run.name if "training" not in config else _LABELS.get(kind, named)
        found[run.name] = Start(run.name, given or usual, kind, weights, bool(given))
        if kind == "pretrain" and not given:
            groups[run.name] = usual, config["detector"]["family"], str(run.result.get("backbone"))
            rivals.setdefault(groups[run.name], set()).add(weights)
    for key, group in groups.items():
        start = found[key]
        if len(rivals[group]) > 1 and start.label in _METHODS.values():
            name = pretrained[start.weights].name if start.weights in pretrained else start.weights[:6]
            found[key] = replace(start, label=f"{start.label}, {name}")
    return _coloured(found)


def measured_run(evaluation: Artifact, tuned: Sequence[Artifact]) -> Artifact | None:
    """Return the fine-tuned run that was evaluated, None if it is gone: of several with the same weights that one."""
    fitting = [run for run in tuned if run.content_hash == evaluation.manifest["inputs"]["weights"]]
    if len(fitting) > 1:
        name = read_json(evaluation.folder / "metrics.json")["run"]
        fitting = [run for run in fitting if run.name == name] or fitting
    return fitting[-1] if fitting else None


def _coloured(starts: dict[str, Start]) -> dict[str, Start]:
    """Add colours, in the order in which the starts were first used, so that a new one changes no other."""
    own, others = dict(_COLOURS), itertools.islice(all_colours(), len(_COLOURS), None)
    colours: dict[str, str] = {}
    for start in starts.values():
        if start.label not in colours:
            colours[start.label] = own.pop(start.kind, "") or next(others)
    return {key: replace(start, colour=colours[start.label]) for key, start in starts.items()}


def tell_apart(starts: Sequence[Start]) -> dict[str, str]:
    """Return the colours of runs in one picture by their names there: the labels, or where these are equal the runs'.

    A colour that is taken in the picture is replaced by a free one.
    """
    labels = [start.label for start in starts]
    colours: dict[str, str] = {}
    for start in starts:
        taken, is_unique = set(colours.values()), start.label and labels.count(start.label) == 1
        free = (colour for colour in itertools.chain([start.colour], all_colours()) if colour not in taken)
        colours[start.label if is_unique else start.run] = next(free)
    return colours
