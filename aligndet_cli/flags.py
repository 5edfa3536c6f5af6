"""All flags of the command line in one place: the same word means the same everywhere.

A flag is data. `with_flags` gives a command its flags, so that no command lists them again, and hands it what was
typed; a flag that was not typed is None, because every default lives in the stage's config.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        names: as typed, e.g. `--workspace`, `-w`, or `--resume/--no-resume`.
        kind: type of the value.
        help: one line.
        path: dotted path of the setting; "" for flags that steer the command itself.
        panel: heading in the help.
        is_list: a comma-separated list of numbers or words.
    """

    names: tuple[str, ...]
    kind: type
    help: str
    path: str = ""
    panel: str = "Settings"
    is_list: bool = False

    @property
    def parameter(self) -> str:
        """Name as a Python parameter."""
        return self.names[0].split("/")[0].lstrip("-").replace("-", "_") + "_"

    @property
    def word(self) -> str:
        """The long name, for messages."""
        return self.names[0].split("/")[0]


@dataclass(frozen=True)
class Given:
    """What was typed.

    Attributes:
        settings: `{dotted.path: (flag, value)}`.
        control: values of the flags without a path, by word without dashes; None when not typed.
    """

    settings: dict[str, tuple[str, Any]]
    control: dict[str, Any]


def _flag(names: str, kind: type, text: str, path: str = "", panel: str = "Settings", *, is_list: bool = False) -> Flag:
    return Flag(tuple(names.split()), kind, text, path, panel, is_list)


RUN = "Running"
MACHINE = "Machine"

CONTROL = (
    _flag("--workspace -w", Path, "Folder of the artifacts ($ALIGNDET_WORKSPACE, ./workspace).", "", RUN),
    _flag("--config -c", Path, "TOML file with settings, plain or one table per stage.", "", RUN),
    _flag("--set -s", list, "One setting as some.key=value; repeatable.", "", RUN),
    _flag("--name", str, "Name of the run.", "name", RUN),
    _flag("--resume/--no-resume", bool, "Continue an interrupted run, or start it over (resume).", "", RUN),
    _flag("--force", bool, "Redo the stage although it is complete.", "", RUN),
    _flag("--dry-run -n", bool, "Check everything, print the effective settings, and stop.", "", RUN),
    _flag("--json", bool, "Print one JSON object on stdout.", "", RUN),
    _flag("--progress", str, "auto | bar | plain | none.", "", RUN),
    _flag("--quiet -q", bool, "Warnings only.", "", RUN),
    _flag("--verbose -v", bool, "More detail.", "", RUN),
    _flag("--seed", int, "Seed of everything random.", "seed", RUN),
)
DATA = (
    _flag("--format", str, "auto | coco | voc | yolo | folder.", "data.format", "Data"),
    _flag("--split", str, "Split to read, e.g. train2017.", "data.split", "Data"),
    _flag("--annotations", Path, "Label file, instead of the split's.", "data.annotations", "Data"),
    _flag("--images", Path, "Image folder, instead of the split's.", "data.images", "Data"),
    _flag("--limit", int, "First N images only.", "data.limit", "Data"),
)
WORKERS = (
    _flag(
        "--num-workers",
        str,
        "Workers that read and prepare images: auto or a number.",
        "runtime.num_workers",
        MACHINE,
    ),
)
DEVICES = (
    _flag("--accelerator", str, "auto | cpu | gpu.", "runtime.accelerator", MACHINE),
    _flag("--devices", str, "auto, a number of processes, or GPUs like 0,1.", "runtime.devices", MACHINE),
    _flag("--num-nodes", int, "Machines, under torchrun or Slurm.", "runtime.num_nodes", MACHINE),
    *WORKERS,
)
OFFLINE = (_flag("--offline", bool, "Never download; $ALIGNDET_OFFLINE=1 does the same.", "runtime.offline", MACHINE),)
PRECISION = (
    _flag("--precision", str, "32-true | bf16-mixed | 16-mixed.", "runtime.precision", MACHINE),
    _flag("--compile/--no-compile", bool, "torch.compile the model.", "runtime.compile", MACHINE),
    _flag("--deterministic", bool, "Only deterministic GPU kernels.", "runtime.deterministic", MACHINE),
)
MODEL = (
    _flag("--detector", str, "Detector family; see `aligndet ls detectors`.", "detector.family"),
    _flag("--backbone", str, "Backbone; see `aligndet ls backbones`.", "backbone.name"),
    _flag(
        "--backbone-weights",
        str,
        "torchvision name, file, none, or workspace (what pretrain-image made; the default).",
        "backbone.weights",
    ),
    *OFFLINE,
)
TRAINING = (
    _flag("--schedule", str, "12k | 90k | 1x | 2x | 3x | 4x | 50e | 90e | 100e | 150e | 200e.", "training.schedule"),
    _flag("--epochs", int, "Length in epochs, instead of the schedule's.", "training.epochs"),
    _flag("--steps", int, "Length in steps, instead of the schedule's.", "training.steps"),
    _flag(
        "--batch-size", str, "Images per step over all processes; auto: what fits on the GPUs.", "training.batch_size"
    ),
    _flag("--accumulate", int, "Micro-batches per step.", "training.accumulate"),
    _flag("--lr", float, "Learning rate, used as it is.", "training.lr"),
    _flag("--weight-decay", float, "Weight decay.", "training.weight_decay"),
    _flag("--logger", str, "none | tensorboard, beside metrics.jsonl.", "training.logger"),
    _flag("--on-error", str, "skip | fail on unreadable images.", "on_error"),
)
PROPOSALS = (
    _flag("--mode", str, "fast | quality | soco | opencv-fast | opencv-quality | opencv-single.", "mode"),
    _flag("--source", str, "selective-search | ground-truth.", "source"),
    _flag("--min-size", int, "Smallest side in pixels.", "min_size"),
    _flag("--max-ratio", float, "Largest ratio of the sides.", "max_ratio"),
    _flag("--max-size", float, "Largest size as a share of the image's.", "max_size"),
    _flag("--nms", float, "IoU above which the later of two boxes goes.", "nms"),
    _flag("--max-per-image", int, "Best N boxes per image.", "max_per_image"),
    _flag("--import", Path, "Take boxes from a COCO json instead of searching.", "import_file"),
    _flag("--export", Path, "Also write the boxes as a COCO json."),
    _flag("--on-error", str, "skip | fail on unreadable images.", "on_error"),
    _flag("--shard", str, "I/N: only this share of the images; the last of N puts all together.", "shard", MACHINE),
    _flag("--backend", str, "auto | processes | threads | dask | ray.", "backend", MACHINE),
    _flag("--scheduler", str, "Address of the Dask scheduler or Ray head.", "scheduler", MACHINE),
)
CLUSTER = (
    _flag("--k", int, "Number of clusters.", "k"),
    _flag("--pca-dim", int, "Dimensions kept of the features.", "pca_dim"),
    _flag("--import", Path, "Take the categories of a COCO json as clusters instead of making some.", "import_file"),
    *MODEL[1:],
    _flag("--batch-size", int, "Images per forward pass.", "batch_size"),
    _flag("--short-side", int, "Resolution the images are resized to.", "short_side"),
    _flag("--long-side", int, "Largest long side.", "long_side"),
)
PRETRAIN_IMAGE = (
    _flag("--method", str, "simsiam | moco-v2 | supervised (images in one folder per class).", "method"),
    MODEL[1],
    _flag("--backbone-weights", str, "To start from: torchvision name, file, workspace or none.", "backbone.weights"),
    *OFFLINE,
    _flag("--image-size", int, "Side of the square views.", "image_size"),
    *(flag for flag in TRAINING if flag.word != "--batch-size"),
    _flag("--batch-size", str, "Images per step over all processes; auto: the method's.", "training.batch_size"),
)
RECIPE = (
    _flag("--recipe", str, "auto | default | self-supervised | moco-v2 | pixpro | swav | swin | simmim.", "recipe"),
)
PRETRAIN_BOX = (
    *MODEL,
    _flag("--topk", int, "Best N proposals per image; 100000: all (by recipe: 50 or 70).", "topk"),
    _flag("--limit-boxes", int, "Draw images until they have N proposals.", "limit_boxes"),
    _flag("--temperature", float, "Of the contrastive loss.", "temperature"),
    _flag("--momentum", float, "First EMA coefficient.", "momentum"),
    _flag("--tasks", str, "both | contrastive | regression.", "tasks"),
    _flag("--freeze-backbone/--no-freeze-backbone", bool, "Keep the backbone as it is (freeze).", "freeze_backbone"),
    *RECIPE,
    *TRAINING,
    _flag("--short-side", str, "Resolutions to draw from, e.g. 640,672.", "views.short_side", is_list=True),
    _flag("--long-side", int, "Largest long side.", "views.long_side"),
)
FINETUNE = (
    *MODEL,
    _flag("--init", str, "pretrain | backbone | scratch | a weights.pt.", "init"),
    _flag("--label", str, "What reports call the start of this run.", "label"),
    _flag("--load-modules", str, "Of neck,rpn,head: which to load.", "load_modules", is_list=True),
    _flag("--min-match", float, "Least share of weights that must fit.", "min_match"),
    _flag("--fraction", float, "Percent of the labelled images.", "fraction"),
    _flag("--fold", int, "Which fold of that fraction.", "fold"),
    _flag("--evaluate-every", int, "Epochs between evaluations.", "evaluate_every"),
    *RECIPE,
    *TRAINING,
    _flag(
        "--short-side",
        str,
        "Training resolutions, e.g. 640,672; tested at the largest.",
        "resolution.short_side",
        is_list=True,
    ),
    _flag("--long-side", int, "Largest long side.", "resolution.long_side"),
    _flag("--policy", str, "auto | resize | detr (crops) | lsj (large-scale jitter).", "resolution.policy"),
)
EVALUATE = (
    _flag("--run", str, "Fine-tuned run (the newest).", "run"),
    _flag("--metric", str, "auto | coco | voc.", "metric"),
    _flag("--compare", str, "Another evaluated run: print the difference.", "compare"),
    _flag("--fail-under", float, "Exit 6 when AP (0..1) is lower.", "fail_under"),
    _flag("--batch-size", int, "Images per forward pass.", "batch_size"),
    _flag("--short-side", int, "Test resolution (the run's).", "short_side"),
    _flag("--long-side", int, "Largest long side (the run's).", "long_side"),
)

DOCTOR = (
    *(flag for flag in CONTROL if flag.word in ("--workspace", "--json")),
    _flag("--strict", bool, "Exit 6 on warnings too (errors: always 3)."),
    *DATA,
)

SPLIT = (
    *(flag for flag in CONTROL if flag.word == "--json"),
    *(flag for flag in DATA if flag.word != "--limit"),
    _flag("--fractions", str, "Percents of the images (1,5,10,20).", "fractions", is_list=True),
    _flag("--folds", str, "Numbers of the folds (1,2,3,4,5).", "folds", is_list=True),
    _flag("--output -o", Path, "Folder to write to (semi_supervised, beside the labels).", "output"),
    _flag("--unlabeled", bool, "Also write the images that each fold leaves out.", "unlabeled"),
)

IMPORT = (
    *(flag for flag in CONTROL if flag.word in ("--workspace", "--name", "--force", "--json")),
    _flag("--from", str, "auto | mmdet | aligndet | detectron2 | torchvision | detr.", "layout"),
    _flag("--detector", str, "What it must be; tells a pre-trained Faster from a Mask R-CNN.", "detector"),
    _flag("--backbone", str, "What its backbone must be.", "backbone"),
    _flag("--style", str, "Of its images and strides, where the file does not say: caffe | pytorch.", "style"),
    _flag("--categories", str, "Its classes, where the file does not say: coco | voc | a COCO json.", "categories"),
)

BENCH = (
    *(flag for flag in CONTROL if flag.word in ("--set", "--json", "--seed")),
    *DATA,
    *DEVICES[:1],
    *WORKERS,
    *PRECISION,
    *MODEL[:2],
    _flag("--stage", str, "pretrain-box | finetune | both.", "stage"),
    _flag("--batch-size", int, "Images per step on one device.", "batch_size"),
    _flag("--short-side", str, "Resolutions of the short side (those of the stages).", "short_side", is_list=True),
    _flag("--long-side", int, "Largest long side.", "long_side"),
    _flag("--proposals", int, "Proposals per image in pre-training.", "num_proposals"),
    _flag("--steps", int, "Steps that are timed.", "steps"),
)

PREDICT = (
    *(flag for flag in CONTROL if flag.word in ("--workspace", "--json", "--progress", "--quiet")),
    _flag("--force", bool, "Replace what an earlier call has written there.", "", RUN),
    *DEVICES[:1],
    *WORKERS,
    *PRECISION[:1],
    *(flag for flag in EVALUATE if flag.word in ("--run", "--batch-size", "--short-side", "--long-side")),
    _flag("--weights", Path, "A weights.pt, instead of a run.", "weights"),
    _flag("--score", float, "Least score of what is kept, 0..1 (0.3).", "score"),
    _flag("--output -o", Path, "Folder to write to (predict/RUN in the workspace).", "output"),
    _flag(
        "--annotated/--no-annotated", bool, "Draw what was found into copies of the images (annotated).", "annotated"
    ),
    _flag("--save-crops", bool, "Also cut out what was found, one folder per class.", "save_crops"),
)

REPORT = (
    *(flag for flag in CONTROL if flag.word in ("--workspace", "--json")),
    _flag("--html", bool, "One page of tables, commands and pictures (report.html in the workspace).", "", RUN),
    _flag("--format", str, "table | markdown | csv | json (table).", "", RUN),
    _flag("--output -o", Path, "File to write.", "", RUN),
    _flag("--study", list, "Only the runs of this study file; repeatable.", "", RUN),
    _flag("--baseline", str, "Start to compare with (backbone only).", "", RUN),
    _flag("--metric", str, "AP, AP50, AP75, mask_AP and so on (AP,AP50,AP75).", "", RUN),
)

VIEWS = (
    *(flag for flag in CONTROL if flag.word in ("--workspace", "--config", "--set", "--json", "--seed")),
    *DATA[:-1],
    _flag("--count", int, "Images to show (4).", "", RUN),
    _flag("--output -o", Path, "File to write (views.jpg in the workspace).", "", RUN),
    *(flag for flag in PRETRAIN_BOX if flag.word in ("--detector", "--topk", "--short-side", "--long-side")),
)

STAGE_FLAGS: dict[str, tuple[Flag, ...]] = {
    "pretrain-image": (*CONTROL, *DATA, *DEVICES, *PRECISION, *PRETRAIN_IMAGE),
    "proposals": (*CONTROL, *DATA, *WORKERS, *PROPOSALS),
    "cluster": (*CONTROL, *DATA, *DEVICES, *CLUSTER),
    "pretrain-box": (*CONTROL, *DATA, *DEVICES, *PRECISION, *PRETRAIN_BOX),
    "finetune": (*CONTROL, *DATA, *DEVICES, *PRECISION, *FINETUNE),
    "evaluate": (*CONTROL, *DATA, *DEVICES, *PRECISION[:1], *EVALUATE),
}


def with_flags(
    flags: tuple[Flag, ...], argument: tuple[str, str] | None = ("DATA", "Data set."), kind: Any = Path
) -> Callable[[Callable[[Any, Given], None]], Callable[..., None]]:
    """Turn `command(data, given)` into a Typer command with these flags and an optional argument.

    Args:
        argument: name and help of the argument; None: there is none, and `data` is None.
        kind: type of its value; of a list, any number of them.
    """

    def decorate(command: Callable[[Any, Given], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def typed(**values: Any) -> None:
            data = values.pop("data", None)
            command(data, collect(flags, values))

        parameters = []
        if argument is not None:
            metavar, text = argument
            path = typer.Argument(help=text, metavar=metavar, show_default=False)
            parameters.append(_parameter("data", Annotated[kind | None, path]))
        parameters += [_parameter(flag.parameter, _annotation(flag)) for flag in flags]
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
        typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return typed

    return decorate


def collect(flags: tuple[Flag, ...], values: dict[str, Any]) -> Given:
    """Sort typed values into settings and control."""
    settings: dict[str, tuple[str, Any]] = {}
    control: dict[str, Any] = {}
    for flag in flags:
        value = values[flag.parameter]
        if not flag.path:
            control[flag.word.lstrip("-")] = value
        elif value is not None:
            # What is wrong with a value is said when the config is validated.
            parts = [part.strip() for part in value.split(",")] if flag.is_list else value
            settings[flag.path] = (flag.word, parts)
    return Given(settings, control)


def _annotation(flag: Flag) -> Any:
    kind: Any = list[str] | None if flag.kind is list else flag.kind | None
    return Annotated[kind, typer.Option(*flag.names, help=flag.help, rich_help_panel=flag.panel, show_default=False)]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
