"""The workspace: a folder of finished artifacts with manifests, and of partial ones that can be resumed."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aligndet_cli import cards
from aligndet_cli.config import StageConfig, describe_differences, hash_json
from aligndet_cli.errors import ChangedError, ConfigError, MissingError, TakenError
from aligndet_cli.files import (
    hash_files,
    is_locked,
    is_still,
    naming,
    read_json,
    refuse_newer,
    try_lock,
    write_bytes,
    write_json,
)

# Format of artifacts with all their files, and of workspace.json. To be raised when a program of before would misread
# them; older formats are read on.
FORMAT_VERSION = 1
_FROM_IMAGES = ("pretrain-image", "proposals")  # stages that are told where the data is
_PACKAGES = (
    *("aligndet", "torch", "torchvision", "numpy", "numba", "opencv-contrib-python-headless"),
    *("scikit-learn", "pycocotools", "hotcoco"),
)


@dataclass(frozen=True)
class Artifact:
    """A finished stage: a folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the run, e.g. `retinanet-resnet18`."""
        return self.folder.name

    @property
    def content_hash(self) -> str:
        """Hash of the files that later stages read; they record it as their input."""
        return str(self.manifest["content_hash"])

    @property
    def result(self) -> dict[str, Any]:
        """Summary of the result, as printed by `--json`."""
        return dict(self.manifest["result"])

    def config(self) -> dict[str, Any]:
        """Read the resolved config of the run."""
        return dict(read_json(self.folder / "config.json"))


@dataclass(frozen=True)
class Output:
    """The place a stage writes to, and the decision of `prepare` about it. Picklable, so that workers can hold it.

    Attributes:
        action: `start` (nothing there), `resume` (an interrupted run is there) or `complete` (nothing to do).
        folder: the artifact, which exists only once the stage has finished.
        partial: folder in which the stage works until then.
        header: manifest fields known before the run.
        is_shared: several processes work on it at once, each joining by `processes/sharing.py`; none holds `lock` for
            a whole run.
    """

    action: Literal["start", "resume", "complete"]
    folder: Path
    partial: Path
    header: dict[str, Any] = field(default_factory=dict)
    is_shared: bool = False

    @property
    def lacks_shares(self) -> bool:
        """True after a process has done its share of the work, while those of others are missing."""
        return self.is_shared and (self.partial / "manifest.json").exists()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the partial folder for this process; the lock ends with the process, however it dies.

        Raises:
            TakenError: another process is writing this artifact, or has just finished it.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        with self.held(fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def held(self, kind: int) -> Iterator[None]:
        """Hold `partial/lock`, alone (`LOCK_EX`) or with others (`LOCK_SH`).

        Raises:
            TakenError: another process holds it in a way that excludes this one, or has just finished the artifact.
        """
        try:
            handle = (self.partial / "lock").open("a+")
        except FileNotFoundError:
            raise self.just_finished() from None
        with handle:
            if not try_lock(handle, kind):
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                raise TakenError(
                    f"{self.folder}: another aligndet process ({owner}) is writing it; "
                    "wait for it, or choose another --workspace or --name"
                )
            if not is_still(self.partial / "lock", handle):
                raise self.just_finished()
            with naming(self.partial / "lock"):
                handle.truncate(0)
                handle.write(f"pid {os.getpid()} on {platform.node()}")
                handle.flush()
            yield

    def just_finished(self) -> TakenError:
        """Return the error for a run that comes too late."""
        return TakenError(f"{self.folder}: another aligndet process has just finished it; run the command again")

    def begin(self, config: StageConfig) -> None:
        """Prepare the partial folder: delete leftovers unless resuming, then write config and manifest."""
        if self.action == "start":
            # First the manifest: a folder without one is never resumed, should the process die during the deletion.
            (self.partial / "manifest.json").unlink(missing_ok=True)
            for leftover in self.partial.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
        write_json(self.partial / "config.json", config.to_json())
        write_json(self.partial / "manifest.json", self.header)

    def complete(self, result: Mapping[str, Any], content: Sequence[str]) -> Artifact:
        """Turn the partial folder into the artifact, with a JSON summary of the result.

        `content` names the files that later stages read; their bytes make the content hash. Weights get a card.
        """
        manifest = {
            **self.header,
            "content_hash": hash_files([self.partial / name for name in content]),
            "finished": now(),
            "result": dict(result),
        }
        if "weights.pt" in content:
            text = cards.card(manifest, read_json(self.partial / "config.json"))
            write_bytes(self.partial / cards.FILE, text.encode())
        write_json(self.partial / "manifest.json", manifest)
        _put_in_place(self.folder, self.partial)
        return Artifact(self.folder, manifest)


class Workspace:
    """A folder of artifacts: `<stage>/<name>/`, and `workspace.json` with the remembered data."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def locate(cls, folder: Path | None) -> "Workspace":
        """Return the workspace at `folder`, else at `$ALIGNDET_WORKSPACE`, else at `./workspace`."""
        return cls(folder or Path(os.environ.get("ALIGNDET_WORKSPACE") or "workspace"))

    @property
    def index_dir(self) -> Path:
        """Folder of parsed label files; may be deleted at any time."""
        return self.root / ".index"

    def remember(self, key: str, value: Any) -> None:
        """Store a value that later commands use as their default."""
        content = self._read_state()
        if content.get(key) == value:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        own = self.root / f".workspace.{uuid.uuid4().hex}.json"  # several commands may do this at once
        write_json(own, {**content, key: value})
        own.replace(self.root / "workspace.json")

    def recall(self, key: str) -> Any:
        """Return the remembered value, or None."""
        return self._read_state().get(key)

    def artifacts(self, stage: str) -> list[Artifact]:
        """Return the finished artifacts of a stage, oldest first."""
        place = self.root / stage
        names = {_replaced(one.name) or one.name for one in (place.iterdir() if place.is_dir() else [])}
        found = [self._artifact(stage, name) for name in names if not name.startswith(".")]
        there = (artifact for artifact in found if artifact is not None)
        return sorted(there, key=lambda artifact: (artifact.manifest.get("finished", ""), artifact.name))

    def _artifact(self, stage: str, name: str) -> Artifact | None:
        """Return an artifact, None where there is none; while a redone one takes its place, it is still the old one."""
        folder = self.root / stage / name
        for place in (folder, _retired(folder), folder):
            if place == folder or is_locked(self.partial(stage, name) / "lock"):
                with contextlib.suppress(MissingError):
                    return Artifact(folder, read_manifest(place))
        return None

    def partial(self, stage: str, name: str) -> Path:
        """Return the hidden folder in which a run works before it is finished."""
        return self.root / stage / f".{name}.partial"

    def partials(self, stage: str) -> list[Path]:
        """Return the folders of interrupted and running runs of a stage."""
        return sorted(self.root.glob(f"{stage}/.*.partial"))

    def find(self, stage: str, name: str | None = None) -> Artifact | None:
        """Return the artifact of that name, or the newest of the stage; None if there is none."""
        found = [artifact for artifact in self.artifacts(stage) if name is None or artifact.name == name]
        return found[-1] if found else None

    def require(self, stage: str, name: str | None = None) -> Artifact:
        """Return the artifact as `find` does.

        Raises:
            ConfigError: not found; the message names the command that makes it.
        """
        artifact = self.find(stage, name)
        if artifact is not None:
            return artifact
        others = ", ".join(other.name for other in self.artifacts(stage))
        if name is not None and others:
            raise ConfigError(f"{self.root / stage / name}: not found; finished {stage} runs here: {others}")
        place = self.root / stage / (name or "")
        words = f"{stage} DATA" if stage in _FROM_IMAGES else stage
        raise ConfigError(f"{place} not found: run `aligndet {words}` first")

    def require_of(self, stages: Sequence[str], run: str | None, advice: str) -> Artifact:
        """Return the artifact of a run that is named `STAGE/NAME`, or of the first stage `NAME`; None: its newest.

        Raises:
            ConfigError: not found, or of none of the stages; the message is `advice` then.
        """
        stage, _, name = (run or "").rpartition("/")
        if stage not in ("", *stages):
            raise ConfigError(advice)
        return self.require(stage or stages[0], name or None)

    def begun(self, stage: str, name: str, *, resume: bool = True, force: bool = False) -> Path | None:
        """Return the folder of the run that is complete or would be continued, see `plan_output`; None: it begins."""
        candidates = [] if force else [self.root / stage / name, *([self.partial(stage, name)] if resume else [])]
        return next((folder for folder in candidates if (folder / "manifest.json").exists()), None)

    def plan_output(
        self,
        stage: str,
        name: str,
        config: StageConfig,
        inputs: Mapping[str, str],
        *,
        resume: bool = True,
        force: bool = False,
    ) -> Output:
        """Decide between start, resume, already complete and refuse.

        Writes nothing, except that it completes the renaming of a finished run that was killed during it.

        Args:
            inputs: `{name: hash}` of everything the stage reads.
            resume: continue an interrupted run; False throws its partial folder away.
            force: redo a finished run, or restart an interrupted one.

        Raises:
            ChangedError: a finished or interrupted run of this name had other settings or inputs; the message lists
                the differences and the flag to use.
        """
        folder, partial = self.root / stage / name, self.partial(stage, name)
        _finish_interrupted_completion(folder, partial)
        settings = config.hashed_settings()
        header = {
            "stage": stage,
            "name": name,
            "format_version": FORMAT_VERSION,
            "seed": config.seed,
            "config_hash": hash_json(settings),
            "settings": settings,
            "inputs": dict(inputs),
            "packages": _package_versions(),
            "started": now(),
        }
        begun = self.begun(stage, name, resume=resume, force=force)
        if begun == folder:
            _refuse_if_changed(folder, config, inputs, "is complete", "--force to redo it, or --name for a second run")
            return Output("complete", folder, partial)
        if begun == partial:
            _refuse_if_changed(partial, config, inputs, "was interrupted", "--no-resume to start over")
            return Output(
                "resume", folder, partial, {**header, "started": read_json(partial / "manifest.json")["started"]}
            )
        return Output("start", folder, partial, header)

    def _read_state(self) -> dict[str, Any]:
        file = self.root / "workspace.json"
        if not file.exists():
            return {"format_version": FORMAT_VERSION}
        try:
            content = dict(read_json(file))
        except ConfigError:
            raise ConfigError(f"{file}: damaged; delete this one file and name DATA again") from None
        refuse_newer(file, content.get("format_version", 1), FORMAT_VERSION, ConfigError)
        return content


def now() -> str:
    """Return the UTC time in ISO form, to the microsecond, so that artifacts sort by age."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact or of a partial one.

    Raises:
        MissingError: there is none.
        ConfigError: damaged, or written by a newer version of the program.
    """
    manifest = dict(read_json(folder / "manifest.json"))
    refuse_newer(folder, manifest.get("format_version", 1), FORMAT_VERSION, ConfigError)
    return manifest


def run_name(folder: Path) -> str:
    """Return the name of a run from its folder, finished or partial."""
    return folder.name.removeprefix(".").removesuffix(".partial")


def _refuse_if_changed(folder: Path, config: StageConfig, inputs: Mapping[str, str], state: str, remedy: str) -> None:
    old = read_manifest(folder)
    settings, changed = config.changes_since(old["settings"]), describe_differences(old["inputs"], inputs)
    if settings or changed:
        raise ChangedError(f"{folder.parent / run_name(folder)} {state}", remedy, settings, changed, folder)


def _retired(folder: Path) -> Path:
    """Return the place of an artifact that a redone one replaces, until it is deleted."""
    return folder.with_name(f".{folder.name}.old")


def _replaced(name: str) -> str | None:
    """Return the name of the run that a folder made by `_retired` is of; None for other folders."""
    return name[1:-4] if name.startswith(".") and name.endswith(".old") else None


def _put_in_place(folder: Path, partial: Path) -> None:
    """Rename a finished partial folder to the artifact; an older artifact is deleted after that.

    The lock is removed last, so that no other process resumes a folder that is about to be renamed.
    """
    retired = _retired(folder)
    shutil.rmtree(partial / "resume", ignore_errors=True)
    if folder.exists():
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
    partial.rename(folder)
    _clear_remains(folder, retired)


def _clear_remains(folder: Path, retired: Path) -> None:
    (folder / "lock").unlink(missing_ok=True)
    shutil.rmtree(retired, ignore_errors=True)


def _finish_interrupted_completion(folder: Path, partial: Path) -> None:
    """Complete a `_put_in_place` during which the process was killed."""
    retired = _retired(folder)
    with contextlib.suppress(MissingError, FileNotFoundError):  # its process has just completed it
        if "finished" in read_json(partial / "manifest.json"):
            with (partial / "lock").open() as handle:
                if try_lock(handle, fcntl.LOCK_EX) and is_still(partial / "lock", handle):
                    _put_in_place(folder, partial)
                    return
    if (folder / "lock").exists() and not is_locked(folder / "lock") or folder.exists() and retired.exists():
        _clear_remains(folder, retired)


def _package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
