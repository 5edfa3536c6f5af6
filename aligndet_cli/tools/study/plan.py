"""From a study to the list of its runs: their names, their settings, and the runs that they need."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligndet_cli.config import (
    STAGES,
    Sources,
    StageConfig,
    flatten,
    hash_json,
    load_config,
    validated,
    with_absolute_paths,
)
from aligndet_cli.config_errors import fields_at
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.errors import ConfigError, did_you_mean
from aligndet_cli.stage import Read, find_stage
from aligndet_cli.tools.study.spec import COMMON, Start, StudyConfig
from aligndet_cli.workspace import Artifact, Workspace, read_manifest

Settings = dict[str, tuple[str, Any]]  # {dotted.path: (where it was set, value)}

_SET_BY_STUDY = ("name", "label", "init", "fraction", "fold", "run", "proposals", "clusters", "detector.family")
# Settings that `finetune` refuses if it loads no pre-trained detector.
_OF_LOADING = ("load_modules", "min_match", "keep_box_predictor")
# Settings that are not hashed and still make two runs of a study different.
_TOLD_APART = ("data.root", "backbone.weights", "cue_weights", "embedder", "teacher", "import_file", "init", "label")
_SHARED_NAMES = {"pretrain-image": "backbone", "proposals": "proposals", "cluster": "clusters"}


@dataclass(frozen=True)
class StageRun:
    """One run of one stage.

    Attributes:
        settings: all that the study sets.
        needs: keys of the runs whose artifacts it reads.
        start: label of the start that it is for; of several the first.
    """

    stage: str
    name: str
    settings: Settings
    needs: tuple[str, ...]
    start: str = ""

    @property
    def key(self) -> str:
        """Place in the workspace."""
        return f"{self.stage}/{self.name}"

    @property
    def sources(self) -> Sources:
        """Sources of its config."""
        return Sources(flags={"name": ("the study", self.name), **self.settings})

    def config(self) -> StageConfig:
        """Return the validated config.

        Raises:
            ConfigError: a setting that the stage does not have, or a value that does not fit.
        """
        steps = find_stage(self.stage).steps()
        config, _ = load_config(steps.config, self.stage, self.sources)
        steps.check(config)
        return with_absolute_paths(config)  # as recorded


@dataclass(frozen=True)
class _Place:
    """A corner of the cross product. None stands for all values."""

    detector: str | None = None
    start: Start | None = None
    seed: int | None = None


def plan_runs(study: StudyConfig, workspace: Workspace) -> list[StageRun]:
    """Return all runs, each after those it needs, with the starts of one seed and fold side by side.

    Raises:
        ConfigError: settings that no stage has, or values that do not fit.
    """
    planner = _Planner(study, workspace)
    for seed in study.seeds:
        for fraction in study.fractions:
            for fold in study.folds[:1] if fraction == 100 else study.folds:
                for detector in study.detectors:
                    for start in study.starts:
                        if _is_asked(start, detector, fraction, fold, seed):
                            planner.add_pair(_Place(detector, start, seed), fraction, fold)
    planner.refuse_unknown()
    return list(planner.runs.values())


def finished(run: StageRun, workspace: Workspace) -> Artifact | None:
    """Return the artifact of a run if it exists with these settings, whatever its inputs; else None."""
    folder = workspace.root / run.key
    if not (folder / "manifest.json").exists():
        return None
    artifact = Artifact(folder, read_manifest(folder))
    return None if run.config().changes_since(artifact.manifest["settings"]) else artifact


def _is_asked(start: Start, detector: str, fraction: float, fold: int, seed: int) -> bool:
    asked = ((start.detectors, detector), (start.fractions, fraction), (start.seeds, seed))
    is_fold_asked = fraction == 100 or start.folds is None or fold in start.folds
    return is_fold_asked and all(only is None or value in only for only, value in asked)


class _Planner:
    """Collects runs by key. Runs of equal settings and equal inputs are one run."""

    def __init__(self, study: StudyConfig, workspace: Workspace) -> None:
        self.study, self.workspace = study, workspace
        self.runs: dict[str, StageRun] = {}
        self._by_identity: dict[str, StageRun] = {}
        self._known: dict[str, list[tuple[Artifact, list[Any]]]] = {}
        places = [_Place(), *(_Place(detector=name) for name in study.detectors)]
        places += [_Place(start=start) for start in study.starts]
        common = [table for place in places for table in self._tables(place, COMMON)]
        self._idle = {f"{title}.{path}" for title, table in common for path, _ in flatten(table)}

    def add_pair(self, place: _Place, fraction: float, fold: int) -> None:
        """Add fine-tuning and evaluation in one place, and all runs they need."""
        assert place.detector is not None and place.start is not None
        settings = self._settings("finetune", place)
        name = f"{place.detector}-{place.start.slug}"
        if fraction != 100:
            settings |= {"fraction": ("fractions", fraction), "fold": ("folds", fold)}
            name += f"-f{fold}-p{fraction:g}"
        name += f"-s{place.seed}"
        links, needs = self._links("finetune", place)
        init = {} if "init" in links else {"init": ("starts", _init_of(place.start))}
        label = place.start.label
        tuned = self._register(StageRun("finetune", self._own(name), {**settings, **init, **links}, needs, label))
        settings = {**self._settings("evaluate", place), "run": ("the study", tuned.name)}
        self._register(StageRun("evaluate", self._own(name), settings, (tuned.key,), label))

    def refuse_unknown(self) -> None:
        """Raise a ConfigError for a common setting that no stage has."""
        for place in sorted(self._idle):
            table, setting = place.split(f"{COMMON}.", 1)
            if not any(_has_setting(stage, setting, name) for stage in STAGES for name in DETECTORS):
                known = [key for key, _ in flatten(find_stage("finetune").steps().config().to_json())]
                raise ConfigError(f"{table}{COMMON}: no stage has '{setting}'{did_you_mean(setting, known)}")

    def _add(self, stage: str, place: _Place) -> StageRun:
        """Add the run of a stage before fine-tuning, or return the equal run of another place."""
        identity = self._identity(stage, place)
        if identity in self._by_identity:
            return self._by_identity[identity]
        links, needs = self._links(stage, place)
        name = self._own(self._name(stage, place, identity))
        label = "" if place.start is None else place.start.label
        run = self._register(StageRun(stage, name, {**self._settings(stage, place), **links}, needs, label))
        self._by_identity[identity] = run
        return run

    def _own(self, name: str) -> str:
        return name if self.study.name is None else f"{self.study.name}-{name}"

    def _register(self, run: StageRun) -> StageRun:
        """Add a run; if the workspace has an equal run of another name, add that one."""
        run.config()
        if finished(run, self.workspace) is None and (name := self._made_before(run)) is not None:
            run = replace(run, name=name)
        assert run.key not in self.runs, f"two runs of the study are called {run.key}"
        self.runs[run.key] = run
        return run

    def _made_before(self, run: StageRun) -> str | None:
        """Return the name of an artifact of the workspace that has the settings and inputs of this run."""
        needed = [finished(self.runs[key], self.workspace) for key in run.needs]
        if None in needed:
            return None
        config = run.config()
        asked = _told_apart_by(config.to_json())
        for artifact, told_apart_by in self._artifacts(run.stage):
            hashes = artifact.manifest["inputs"].values()
            is_same = told_apart_by == asked and all(one is not None and one.content_hash in hashes for one in needed)
            if is_same and not config.changes_since(artifact.manifest["settings"]):
                return artifact.name
        return None

    def _artifacts(self, stage: str) -> list[tuple[Artifact, list[Any]]]:
        """Return the artifacts of a stage, read once, each with the settings of `_TOLD_APART`."""
        if stage not in self._known:
            found = self.workspace.artifacts(stage)
            self._known[stage] = [(artifact, _told_apart_by(artifact.config())) for artifact in found]
        return self._known[stage]

    def _needs(self, stage: str, place: _Place, settings: Settings) -> list[Read]:
        """Return the artifacts that a stage reads in a place."""
        return [read for read in find_stage(stage).reads if self._is_needed(read, stage, place, settings)]

    def _is_needed(self, read: Read, stage: str, place: _Place, settings: Settings) -> bool:
        start = None if place.start is None or stage != "finetune" else place.start.init
        if read.setting == "init":
            return start == "pretrain"
        if read.setting == "clusters":
            _, method = settings.get("method", ("", "aligndet"))
            return _needs_clusters(str(place.detector), str(method))
        if read.setting == "backbone.weights":
            has_stage = stage != read.stage and bool(self._tables(place, read.stage))
            return has_stage and read.setting not in settings and (stage != "finetune" or start == "backbone")
        if read.setting == "from_run":  # of all detectors together there is no such run
            return place.detector is not None and self._round_before(place, settings) is not None
        return True

    def _place_of(self, read: Read, place: _Place, settings: Settings) -> _Place:
        """Return the place of the run that makes what is read: for a second round it is another start's."""
        return place if read.setting != "from_run" else replace(place, start=self._round_before(place, settings))

    def _round_before(self, place: _Place, settings: Settings) -> Start | None:
        """Return the start whose pre-training finds the boxes of a second round; None if the study has none."""
        title, label = settings.get("from_run", ("", None))
        starts = [s for s in self.study.starts if s.detectors is None or place.detector in s.detectors]
        labels = [start.label for start in starts]
        if label not in labels:
            if label is not None and not (self.workspace.root / "pretrain-box" / label).exists():
                hint = did_you_mean(label, labels)
                raise ConfigError(f"{title}.from_run: '{label}' is no start and no run of the workspace{hint}")
            return None
        before = starts[labels.index(label)]
        if place.start not in starts[labels.index(label) + 1 :] or not title.startswith(_title(place.start)):
            raise ConfigError(f"{title}.from_run: '{label}' is a start, so set this in a start below it")
        if before.init != "pretrain":
            raise ConfigError(f"{title}.from_run: the start '{label}' has no pre-training; name one that has")
        return before

    def _links(self, stage: str, place: _Place) -> tuple[Settings, tuple[str, ...]]:
        """Return the settings that name the artifacts a run reads, and the keys of the runs that make them."""
        links: Settings = {}
        needs = []
        settings = self._settings(stage, place)
        for read in self._needs(stage, place, settings):
            run = self._add(read.stage, self._place_of(read, place, settings))
            if read.setting == "from_run":
                _check_finder(run, *settings["from_run"], str(place.detector))
            needs.append(run.key)
            weights = self.workspace.root.resolve() / run.key / "weights.pt"
            is_file = read.setting in ("init", "backbone.weights")
            links[read.setting] = ("the study", str(weights) if is_file else run.name)
        return links, tuple(needs)

    def _identity(self, stage: str, place: _Place) -> str:
        """Return a hash of everything that decides the result of a run."""
        settings = self._settings(stage, place)
        needed = [
            self._identity(read.stage, self._place_of(read, place, settings))
            for read in self._needs(stage, place, settings)
        ]
        return hash_json([stage, {path: value for path, (_, value) in settings.items()}, needed])

    def _name(self, stage: str, place: _Place, identity: str) -> str:
        """Return the shortest name: detector and start are left out where they make no difference."""
        assert place.detector is not None and place.start is not None
        slug, seed = place.start.slug, place.seed
        if stage == "pretrain-box":
            suffix = f"-s{seed}" if self.study.pretrain_per_seed else ""
            without = self._identity(stage, _Place(place.detector, None, seed))
            return place.detector + ("" if without == identity else f"-{slug}") + suffix
        base = _SHARED_NAMES[stage]
        for detector, start, name in (
            (None, None, base),
            (place.detector, None, f"{base}-{place.detector}"),
            (None, place.start, f"{base}-{slug}"),
        ):
            if self._identity(stage, _Place(detector, start, seed)) == identity:
                return name
        return f"{base}-{place.detector}-{slug}"

    def _settings(self, stage: str, place: _Place) -> Settings:
        """Return the settings of a stage; more special tables win."""
        settings: Settings = {"data.root": ("data", str(self.study.data_of(stage)))}
        if stage in ("pretrain-box", "finetune") and place.detector is not None:
            settings["detector.family"] = ("detectors", place.detector)
        if stage == "finetune" or (stage == "pretrain-box" and self.study.pretrain_per_seed):
            settings["seed"] = ("seeds", place.seed)
        fixed = {*_SET_BY_STUDY, *({"seed"} if "seed" in settings else ())}
        for title, table in self._tables(place, COMMON, stage):
            for path, value in flatten(table):
                if path in fixed or (path == "seed" and title.endswith(COMMON)):
                    raise ConfigError(f"{title}.{path}: the study sets this itself; leave it out")
                if not title.endswith(COMMON) or _has_setting(stage, path, place.detector):
                    settings[path] = (title, value)
                    self._idle.discard(f"{title}.{path}")
        if stage == "finetune" and place.start is not None:
            settings["label"] = ("starts", place.start.label)
        return settings if place.start is None else _without_idle(stage, settings, place.start)

    def _tables(self, place: _Place, *stages: str) -> list[tuple[str, dict[str, Any]]]:
        """Return `(name in messages, settings)` of the tables of some stages, weakest first."""
        layers = [("settings", self.study.settings)]
        if place.detector is not None:
            layers.append((f"detector.{place.detector}", self.study.detector.get(place.detector, {})))
        if place.start is not None:
            layers.append((_title(place.start), place.start.settings))
        return [(f"{title}.{stage}", tables[stage]) for title, tables in layers for stage in stages if stage in tables]


def _check_finder(run: StageRun, title: str, label: str, detector: str) -> None:
    """Refuse a second round with a pre-training that finds no boxes."""
    config: Any = run.config()
    if config.tasks == "contrastive":
        raise ConfigError(
            f"{title}.from_run: '{label}' is pre-trained on contrast alone, so its boxes are random; name another start"
        )
    if not config.finds_objects and config.method != "aligndet":
        raise ConfigError(
            f"{title}.from_run: '{label}' is pre-trained by {config.method}, which leaves {detector} no boxes to find "
            "objects with; name a start that AlignDet pre-trains"
        )
    if not config.finds_objects:
        raise ConfigError(
            f"{title}.from_run: {detector} of '{label}' learns no score to find objects with; write pretrain-box = "
            "{ objectness = true } there, or limit both starts to R-CNNs: detectors = [...]"
        )


def _told_apart_by(config: dict[str, Any]) -> list[Any]:
    values = dict(flatten(config))
    return [values.get(path) for path in _TOLD_APART]


def _title(start: Start) -> str:
    return f"start '{start.label}'"


def _init_of(start: Start) -> str:
    return start.init if start.init in ("backbone", "scratch") else str(Path(start.init).resolve())


def _without_idle(stage: str, settings: Settings, start: Start) -> Settings:
    """Drop general settings that have no effect on this start; its own stay, and are refused later."""
    own = _title(start)
    idle: tuple[str, ...] = ()
    if stage == "finetune" and start.init in ("backbone", "scratch"):
        idle = _OF_LOADING if start.init == "backbone" else (*_OF_LOADING, "backbone.weights")
    title, method = settings.get("method", ("", None))
    if title.startswith(own):  # other starts may have methods that use them
        idle = find_stage(stage).steps().idle(method)

    def is_idle(path: str) -> bool:
        return path in idle or path.partition(".")[0] in idle  # `projector.start` alone, or all of `projector`

    return {path: entry for path, entry in settings.items() if entry[0].startswith(own) or not is_idle(path)}


@functools.cache
def _needs_clusters(detector: str, method: str) -> bool:
    settings = {"detector": {"family": detector}, "method": method}
    needs: bool = validated(find_stage("pretrain-box").steps().config, settings, {}).needs_clusters
    return needs


def _has_setting(stage: str, path: str, detector: str | None) -> bool:
    """Return True if a stage knows a setting; a detector's settings are looked up in its family."""
    config_class = find_stage(stage).steps().config
    location: list[str] = []
    for part in path.split("."):
        if part not in fields_at(config_class, location):
            return False
        location += ["detector", detector] if part == "detector" and detector is not None else [part]
    return True
