"""The two records of a stage: what the command line says about it, and the functions that carry it out.

A stage is a folder. Its `command.py` ends in a `Stage`, which needs no torch; its `stage.py` ends in `STEPS`. The name
of the folder in `config.STAGES` is all that the rest of the package knows.
"""

import functools
import importlib
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Generic, Literal, Protocol, TypeVar

from aligndet_cli.config import StageConfig
from aligndet_cli.errors import AlignDetError
from aligndet_cli.flags import Flag
from aligndet_cli.processes.devices import Process
from aligndet_cli.workspace import Artifact, Output, Workspace


class Plan(Protocol):
    """The result of `prepare`: frozen and picklable, with everything that `run` needs."""

    @property
    def config(self) -> StageConfig:
        """The settings as they were asked for."""

    @property
    def output(self) -> Output:
        """The place to write to, and whether to start, resume or do nothing."""


ConfigT = TypeVar("ConfigT", bound=StageConfig)
PlanT = TypeVar("PlanT", bound=Plan)
ConfigT_contra = TypeVar("ConfigT_contra", bound=StageConfig, contravariant=True)
PlanT_co = TypeVar("PlanT_co", bound=Plan, covariant=True)


class Prepare(Protocol[ConfigT_contra, PlanT_co]):
    """Open the inputs, check everything a user can get wrong, and decide what to do; nothing is written."""

    def __call__(
        self, config: ConfigT_contra, workspace: Workspace, *, resume: bool = True, force: bool = False
    ) -> PlanT_co:
        """Return the plan.

        Raises:
            AlignDetError: whatever the user has to put right.
        """


@dataclass(frozen=True)
class Conclusion:
    """Output after the stage's own result, of every call.

    Attributes:
        result: more of the result, for programs.
        lines: the same, for people.
        error: a gate that was not passed, to be raised after the output.
    """

    result: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    error: AlignDetError | None = None


def _nothing(_plan: Plan) -> Conclusion:
    return Conclusion()


@dataclass(frozen=True)
class Steps(Generic[ConfigT, PlanT]):
    """The functions of a stage, in the order in which the driver calls them.

    Attributes:
        describe: effective settings by name, for people.
        run: the work, called on every process; only the main one writes.
        conclude: called on the main process after the work, whether it was done now or before, by all or one shard.
        has_own_workers: `run` starts processes itself and is called on the main one only.
        check: refuses settings that do not go together as far as they tell by themselves; `prepare` does so, too.
        look_ahead: those checks of `prepare` that need no artifact that is yet to be made; the collection has the
            settings that name such artifacts. Nothing is downloaded.
        idle: names the settings that have no effect on one of the stage's methods, which refuses them.
        rebuild: returns the `training.learner.Trainable` of a run, of any weights; None where nothing is trained.
    """

    config: type[ConfigT]
    prepare: Prepare[ConfigT, PlanT]
    describe: Callable[[PlanT], dict[str, Any]]
    run: Callable[[PlanT, Process], None]
    conclude: Callable[[PlanT], Conclusion] = _nothing
    has_own_workers: bool = False
    rebuild: Callable[[PlanT, Process], Any] | None = None
    check: Callable[[ConfigT], None] = lambda _config: None
    look_ahead: Callable[[ConfigT, Workspace, Collection[str]], None] = lambda _config, _workspace, _pending: None
    idle: Callable[[str], tuple[str, ...]] = lambda _method: ()


@dataclass(frozen=True)
class Read:
    """An artifact of another stage that a stage may read.

    Attributes:
        input: its name among the `inputs` of the reader's manifest.
        setting: dotted path of the reader's setting that names it.
    """

    stage: str
    input: str
    setting: str


@dataclass(frozen=True)
class Stage:
    """The torch-free facts of a stage.

    Attributes:
        name: of the command, of the folder in the workspace and, with underscores, of the package.
        data: help of the argument DATA.
        headline: the number of an artifact that matters, in words.
        look_at: files and folders of an artifact, the first to look at first; some may be missing.
        go_on: the words of the next command, `finetune --detector detr`, without the workspace.
        purpose: which split of the data it takes by default.
        remembers_data: later stages find the data of this one: `always`, `never`, or `first`, if there was none before.
    """

    name: str
    summary: str
    data: str
    examples: tuple[str, str, str]
    flags: tuple[Flag, ...]
    headline: Callable[[Artifact], str]
    look_at: tuple[str, ...]
    go_on: Callable[[Artifact, Workspace], Sequence[str]]
    reads: tuple[Read, ...] = ()
    purpose: Literal["train", "val"] = "train"
    remembers_data: Literal["always", "first", "never"] = "first"

    @property
    def is_of_proposals(self) -> bool:
        """The stage works on the images of a proposals artifact."""
        return any(read.stage == "proposals" for read in self.reads)

    def steps(self) -> Steps[Any, Any]:
        """Import the functions of the stage, and torch with most of them."""
        steps: Steps[Any, Any] = importlib.import_module(f"{_package(self.name)}.stage").STEPS
        return steps


DEFAULT_BACKBONE = "resnet50"


def backbone_words(workspace: Workspace) -> list[str]:
    """Return the flags with which `pretrain-box` finds a trained backbone: the workspace's own, or torchvision's."""
    own = workspace.find("pretrain-image")
    if own is None:
        return ["--backbone-weights", "DEFAULT"]
    name = str(own.config()["backbone"]["name"])
    return [] if name == DEFAULT_BACKBONE else ["--backbone", name]


def same_backbone_words(backbone: Mapping[str, Any]) -> list[str]:
    """Return the flags for the backbone and the weights of a recorded config."""
    name, weights = str(backbone["name"]), str(backbone["weights"])
    words = [] if name == DEFAULT_BACKBONE else ["--backbone", name]
    return words if weights == "auto" else [*words, "--backbone-weights", shlex.quote(weights)]


def detector_words(artifact: Artifact) -> list[str]:
    """Return the flag that names the detector of a run."""
    return ["--detector", str(artifact.config()["detector"]["family"]).replace("_", "-")]


def data_words(artifact: Artifact, workspace: Workspace) -> list[str]:
    """Return the words with which `evaluate` finds the validation split of an artifact's data."""
    data, known = artifact.config().get("data", {}), workspace.recall("data") or {}
    if data.get("annotations") is not None:  # nothing tells where the others are
        return ["--annotations", "FILE", "--images", "DIR"]
    root = data.get("root")
    return [] if root is None or root == known.get("root") else [shlex.quote(str(root))]


class StagePackage(ModuleType):
    """The package of a stage, which Python programs call as the stage itself: `aligndet_cli.finetune(config)`.

    Once any part of it is imported, the import system puts the package in the place of a function of its name.
    """

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Carry the stage out, see `api.stages.StageFunction`."""
        functions = importlib.import_module("aligndet_cli.api.stages")
        return getattr(functions, self.__name__.rpartition(".")[2])(*args, **settings)


@functools.cache
def find_stage(name: str) -> Stage:
    """Return the stage of that name, one of `config.STAGES`."""
    stage: Stage = importlib.import_module(f"{_package(name)}.command").STAGE
    return stage


def _package(name: str) -> str:
    return f"aligndet_cli.{name.replace('-', '_')}"
