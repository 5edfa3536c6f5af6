"""`aligndet predict`: detect in any images and videos; write annotated copies, a COCO json, YOLO's files, a table."""

import itertools
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aligndet_cli.config import StageConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import counted
from aligndet_cli.data.loaders import batch_of, evaluation_batches, resolve_workers
from aligndet_cli.detectors.checkpoint import BEST, LoadedDetector, WeightsName, load_detector, weights_file
from aligndet_cli.detectors.results import EvaluationBatch, entries_of_each, forward_pass, predict_each
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.files import naming
from aligndet_cli.logs import Progress, logger
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.processes.launch import Shown, launch
from aligndet_cli.tools.predict.annotate import annotate
from aligndet_cli.tools.predict.exchange import LABELS, NAMES, TABLE, Results, label_file, write_table, write_yolo
from aligndet_cli.tools.predict.images import Inputs, find_inputs
from aligndet_cli.tools.predict.pictures import CROPS, IMAGES, Pictures
from aligndet_cli.tools.predict.videos import VideoReader, VideoWriter
from aligndet_cli.training.placement import place
from aligndet_cli.workspace import Workspace

PREDICTIONS = "predictions.json"
_WRITTEN = (PREDICTIONS, IMAGES, CROPS, LABELS, NAMES, TABLE)


class PredictConfig(StageConfig):
    """Settings of `predict`."""

    run: str | None = Field(None, description="Fine-tuned run, by name (the newest).")
    weights: Path | None = Field(
        None, description="Weights of the run: last, best; or a weights.pt, without run (last)."
    )
    # low enough to see what a detector hesitates about
    score: float = Field(0.3, ge=0, le=1, description="Least score of what is kept, 0 to 1.")
    output: Path | None = Field(
        None, description="Folder to write to (predict/RUN, then RUN-2 and so on, in the workspace)."
    )
    annotated: bool = Field(True, description="Draw what was found into copies of the images.")
    save_crops: bool = Field(False, description="Also cut out what was found, one folder per class.")
    save_txt: bool = Field(False, description="Also write the boxes as YOLO's text files, without scores.")
    save_conf: bool = Field(False, description="Add the scores to these text files; needs --save-txt.")
    csv: bool = Field(False, description="Also write one table of all boxes, detections.csv.")
    every: int = Field(1, ge=1, description="Take every Nth frame of videos.")
    # as in evaluate: what is found in an image depends on nothing but the image
    batch_size: int = Field(1, ge=1, description="Images per forward pass.")
    short_side: int | None = Field(None, ge=32, description="Short side of resized images in pixels (the run's).")
    long_side: int | None = Field(None, ge=32, description="Largest long side in pixels (the run's).")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.save_conf and not self.save_txt:
            raise ValueError("--save-conf: scores are added to the files of --save-txt; ask for both")
        return self


@dataclass(frozen=True)
class Predicted:
    """Result of `predict`.

    Attributes:
        num_images: number of readable images.
        num_frames: number of frames of videos.
        skipped: file and reason of each image or video that could not be read, or not to its end.
        per_class: number of detections by label of the class (see `class_labels`), the largest first.
    """

    folder: Path
    weights: Path
    score: float
    num_images: int
    num_frames: int
    skipped: tuple[tuple[str, str], ...]
    per_class: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        files = [self.folder / name for name in _WRITTEN]
        return {
            "status": "done",
            "folder": str(self.folder),
            "weights": str(self.weights),
            "score": self.score,
            "images": self.num_images,
            "frames": self.num_frames,
            "skipped": [{"file": file, "reason": reason} for file, reason in self.skipped],
            "detections": sum(self.per_class.values()),
            "per_class": self.per_class,
            "written": [str(file) for file in files if file.exists()],
        }

    def lines(self) -> list[str]:
        """Return lines for people: number of detections, in all and per class, and files."""
        skipped = f", {len(self.skipped)} unreadable" if self.skipped else ""
        total = sum(self.per_class.values())
        width = max((len(name) for name in self.per_class), default=0)
        places = [counted(self.num_images, "image")] if self.num_images or not self.num_frames else []
        places += [counted(self.num_frames, "frame")] if self.num_frames else []
        return [
            f"{counted(total, 'detection')} of score >= {self.score:g} in {' and '.join(places)}{skipped}",
            *(f"  {name:<{width}}  {count}" for name, count in self.per_class.items()),
            *self.to_json()["written"],
        ]


@dataclass(frozen=True)
class _Plan:
    """Input of `_run`; it writes into `folder`, which is renamed later."""

    config: PredictConfig
    weights: Path
    inputs: Inputs
    folder: Path

    @property
    def image_set(self) -> ImageSet:
        """The images."""
        return self.inputs.images


def predict_files(
    words: Sequence[str], config: PredictConfig, workspace: Workspace, *, force: bool, shown: Shown
) -> Predicted:
    """Detect in the images that the words name, and write the results; they appear at once when complete.

    Without `config.output`, every call gets a folder of its own: `predict/RUN`, `predict/RUN-2` and so on.

    Args:
        words: see `find_images`.
        force: replace results of an earlier call, and nothing else, in `config.output` or `predict/RUN`.

    Raises:
        AlignDetError: an error of the user; DataError if no image can be read.
    """
    weights, name = _find_weights(config, workspace)
    asked = config.output or workspace.root / "predict" / name
    is_numbered = config.output is None and not force
    folder = next(filter(_is_free, _numbered(asked))) if is_numbered else asked
    _check_output(folder, force=force)
    inputs = find_inputs(words, leave_out=_earlier(asked) if is_numbered else [folder])
    _check_inputs(inputs, config)
    logger.info(f"{_in_words(inputs)}, results to {folder}")
    results: list[Predicted] = []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        plan = _Plan(config, weights, inputs, Path(partial))
        devices = Devices(kind=resolve_devices(config.runtime).kind)
        launch(lambda plan, process: results.append(_run(plan, process, folder)), plan, devices, shown)
        if is_numbered:
            folder = next(filter(_is_made, _numbered(asked)))  # somebody else may have been faster
        _check_output(folder, force=force)
        _put_in_place(Path(partial), folder)
    return replace(results[0], folder=folder)


def _in_words(inputs: Inputs) -> str:
    numbers = {"image": len(inputs.images), "video": len(inputs.videos)}
    return " and ".join(counted(number, noun) for noun, number in numbers.items() if number)


def _numbered(folder: Path) -> Iterator[Path]:
    """Yield the folder of a first call, and those of later ones: `folder`, `folder`-2 and so on."""
    return (folder.with_name(f"{folder.name}-{number}") if number > 1 else folder for number in itertools.count(1))


def _earlier(folder: Path) -> list[Path]:
    """Return the folders of earlier calls."""
    names = re.compile(rf"{re.escape(folder.name)}(-[0-9]+)?")
    return [one for one in folder.parent.glob("*") if names.fullmatch(one.name)]


def _is_free(folder: Path) -> bool:
    return not folder.exists()


def _is_made(folder: Path) -> bool:
    """Make a folder; return False if it is there already."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _find_weights(config: PredictConfig, workspace: Workspace) -> tuple[Path, str]:
    """Return the weights file, and a name for the results."""
    which = str(config.weights or "last")
    if which in get_args(WeightsName):
        run = workspace.require("finetune", config.run)
        file = weights_file(run.folder, cast(WeightsName, which))
        return file, run.name if which == "last" else f"{run.name}-best"
    if config.run is not None:
        raise ConfigError("--run and a file of --weights: name one of them")
    file = Path(which)
    folder = file.absolute().parent.name  # of our own files it has the telling name
    return file, {"weights.pt": folder, BEST: f"{folder}-best"}.get(file.name, file.stem)


def _check_inputs(inputs: Inputs, config: PredictConfig) -> None:
    """Make sure that the settings fit the images and videos."""
    if config.every > 1 and not inputs.videos:
        raise ConfigError("--every: takes frames of videos, and there are only images; leave it out")
    if config.save_txt:
        seen: dict[str, str] = {}
        for name in inputs.images.file_names:
            other = seen.setdefault(label_file(name), name)
            if other != name:
                raise ConfigError(f"--save-txt: {other} and {name} would share one text file; rename one of them")


def _check_output(folder: Path, *, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder}: is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / PREDICTIONS).exists():
        raise ConfigError(f"--output {folder}: holds other files; name an empty or a new folder")
    if not force:
        raise ConfigError(f"{folder}: has predictions already; use --force to replace them, or another --output")


def _put_in_place(partial: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / PREDICTIONS).unlink(missing_ok=True)
    for name in reversed(_WRITTEN):  # the one that shows that all is there comes last
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)
        if (partial / name).exists():
            (partial / name).rename(folder / name)


def _run(plan: _Plan, process: Process, folder: Path) -> Predicted:
    config, image_set = plan.config, plan.image_set
    loaded = load_detector(plan.weights)
    categories = [category for category in loaded.categories if not category.is_unused]
    sizes: dict[int, tuple[int, int]] = {}
    unreadable: dict[int, DataError] = {}
    results = Results(categories)
    skipped: list[tuple[str, str]] = []
    readers, started = _open_videos(plan, skipped), time.monotonic()
    total = len(image_set) + sum(-(-reader.num_frames // config.every) for reader in readers.values())
    with Progress("predict", total, mode=process.progress) as progress, ThreadPoolExecutor(max_workers=2) as pool:
        pictures = Pictures(
            plan.image_set, plan.folder, categories, pool, annotated=config.annotated, save_crops=config.save_crops
        )
        for index, entries in _detections(plan, loaded, process, sizes, unreadable):
            found = [entry for entry in entries if entry["score"] >= config.score]
            image = {"id": int(image_set.image_ids[index]), "file_name": image_set.file_names[index]}
            results.add(image, sizes[index], found)
            pictures.draw(index, found)
            progress.advance()
        pictures.finish()
        for name, reader in readers.items():
            _detect_in_video(plan, loaded, process, _Film(name, reader, results, pictures, progress))
            if reader.num_read < reader.num_frames:
                lost = reader.num_frames - reader.num_read
                skipped.append((name, f"{reader.path}: {lost} of {reader.num_frames} frames cannot be read"))
    skipped = [(image_set.file_names[index], str(error)) for index, error in sorted(unreadable.items())] + skipped
    for _, reason in skipped:
        logger.warning("left out: %s", reason)
    if not results.images:
        raise DataError(
            f"{image_set.root}: nothing can be read of {_in_words(plan.inputs)}; the first: {skipped[0][1]}"
        )
    logger.info(f"{len(results.images) / (time.monotonic() - started):.1f} images/s")
    _write(plan, results.content())
    counts = Counter(pictures.labels[entry["category_id"]] for entry in results.annotations)
    num_images = len(results.images) - results.num_frames
    per_class = dict(counts.most_common())
    return Predicted(folder, plan.weights, config.score, num_images, results.num_frames, tuple(skipped), per_class)


def _open_videos(plan: _Plan, skipped: list[tuple[str, str]]) -> dict[str, VideoReader]:
    """Return readers by name; videos that cannot be opened are added to `skipped`."""
    readers = {}
    for name in plan.inputs.videos:
        try:
            readers[name] = VideoReader(plan.image_set.images_dir / name)
        except DataError as error:
            skipped.append((name, str(error)))
    return readers


def _write(plan: _Plan, content: dict[str, Any]) -> None:
    """Write everything but pictures."""
    with naming(plan.folder / PREDICTIONS):
        (plan.folder / PREDICTIONS).write_text(json.dumps(content) + "\n")
    if plan.config.save_txt:
        with naming(plan.folder / LABELS):
            write_yolo(content, plan.folder, with_scores=plan.config.save_conf)
    if plan.config.csv:
        with naming(plan.folder / TABLE):
            write_table(content, plan.folder / TABLE)


def _detections(
    plan: _Plan,
    loaded: LoadedDetector,
    process: Process,
    sizes: dict[int, tuple[int, int]],
    skipped: dict[int, DataError],
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield index and COCO results of each image, the same as `evaluate`'s.

    Args:
        sizes: filled with (height, width) of each image.
        skipped: filled with errors of images that cannot be read.
    """
    config, device = plan.config, torch.device(process.device)

    def noting_sizes(batches: Iterator[EvaluationBatch]) -> Iterator[EvaluationBatch]:
        for batch in batches:
            sizes.update(zip(batch[0], batch[2], strict=True))
            yield batch

    batches = evaluation_batches(
        plan.image_set,
        indices=range(len(plan.image_set)),
        batch_size=config.batch_size,
        resolution=loaded.sides(config.short_side, config.long_side),
        num_workers=resolve_workers(config.runtime.num_workers, process),
        device=device,
        skipped=skipped,
    )
    with forward_pass(device, config.runtime.precision):
        model = loaded.model.eval()
        place(model, process)
        yield from predict_each(model, noting_sizes(batches), plan.image_set, loaded.categories)


@dataclass(frozen=True)
class _Film:
    """A video that is looked at, and where its results go."""

    name: str
    reader: VideoReader
    results: Results
    pictures: Pictures
    progress: Progress


def _detect_in_video(plan: _Plan, loaded: LoadedDetector, process: Process, film: _Film) -> None:
    """Detect in the frames of a video; a batch of them is in memory at a time."""
    config, device = plan.config, torch.device(process.device)
    sides = loaded.sides(config.short_side, config.long_side)
    waiting: dict[int, NDArray[np.uint8]] = {}

    def batches() -> Iterator[EvaluationBatch]:
        frames = film.reader.frames(config.every)
        while chunk := list(itertools.islice(frames, config.batch_size)):
            waiting.update(chunk)
            tensors = [torch.from_numpy(pixels).permute(2, 0, 1) for _, pixels in chunk]
            yield ([number for number, _ in chunk], *batch_of(tensors, sides, device))

    writer = VideoWriter(plan.folder / IMAGES / film.name, film.reader.fps / config.every)
    try:
        with forward_pass(device, config.runtime.precision):
            model = loaded.model.eval()
            place(model, process)
            for number, entries in entries_of_each(model, batches(), loaded.categories):
                pixels = waiting.pop(number)
                found = [entry for entry in entries if entry["score"] >= config.score]
                frame = {"file_name": f"{film.name}/{number:06d}.jpg", "video": film.name, "frame": number}
                image = {"id": len(plan.image_set) + film.results.num_frames + 1, **frame}
                film.results.add(image, (pixels.shape[0], pixels.shape[1]), found)
                if config.annotated:
                    writer.write(number, annotate(pixels, found, film.pictures.categories))
                if config.save_crops:
                    film.pictures.cut_out(pixels, found, str(frame["file_name"]))
                film.progress.advance()
    finally:
        writer.close()
