"""Check that any label files give the same answer everywhere and never a traceback: a program for a child process.

    python -m helpers.label_fuzz coco FOLDER NUM_EXAMPLES     # with tests/ on the path

The child may take 1 GB more than it has after its imports, so that a label that takes all memory ends it alone.
"""

import contextlib
import json
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from pycocotools import mask as coco_mask

from aligndet_cli.artifacts.exchange import classed_boxes_from_coco
from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.doctor import DoctorReport, check_data
from aligndet_cli.data.folds import SplitConfig, write_folds
from aligndet_cli.data.images import read_size_hw
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.errors import AlignDetError, DataError
from aligndet_cli.metrics.measure import measure
from helpers.label_examples import HUGE
from helpers.mutations import Edit, LabelSet, changed, edits_of

SIZE_HW = (12, 16)
MAX_BYTES = 2**30
# Errors of doctor that `open_images` cannot see, since it decodes no image and reads one split.
OF_PIXELS = {"no-boxes", "size-mismatch", "unreadable-images", "images-in-two-splits", "different-classes"}

_RUNS = {"size": [12, 16], "counts": [40, 5, 147]}
_RLE = {"size": [12, 16], "counts": coco_mask.frPyObjects(_RUNS, 12, 16)["counts"].decode()}


def _coco() -> LabelSet:
    names = ("a.png", "b.png", "sub/c.png")
    images = [{"id": 10 * n, "file_name": name, "height": 12, "width": 16} for n, name in enumerate(names, start=1)]
    del images[1]["height"], images[1]["width"]
    shapes: list[Any] = [[[1, 1, 9, 1, 9, 9]], _RLE, _RUNS, [], [[0, 0, 9, 0, 9, 5, 0, 5]]]
    annotations = [
        {"id": n, "image_id": 10 if n < 4 else 20, "category_id": 3 if n % 2 else 7, "bbox": [n, 1, 6.5, 8]}
        | {"area": 52 - n, "iscrowd": int(n == 3), "segmentation": shape}
        for n, shape in enumerate(shapes, start=1)
    ]
    categories = [{"id": 3, "name": "cat", "supercategory": "pet"}, {"id": 7, "name": "dog"}]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    return {"annotations/instances_train.json": json.dumps(content).encode()}


def _xml(*objects: str) -> bytes:
    size = "<size><width>16</width><height>12</height><depth>3</depth></size>"
    return f"<annotation><filename>a.png</filename>{size}{''.join(objects)}</annotation>".encode()


def _object(name: str, box: tuple[int, int, int, int], difficult: int = 0) -> str:
    ends = "".join(f"<{key}>{end}</{key}>" for key, end in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{ends}</bndbox></object>"


VOC: LabelSet = {
    "Annotations/a.xml": _xml(_object("cat", (1, 1, 9, 9)), _object("dog", (3, 2, 16, 12), 1)),
    "Annotations/b c.xml": _xml(),
    "Annotations/sub/c.xml": _xml(_object("dog", (2, 2, 8, 8))),
    "ImageSets/Main/train.txt": b"a\nb c\n",
    "ImageSets/Main/val.txt": b"sub/c\n",
    "ImageSets/Main/cat_train.txt": b"a  1\nb c -1\n",
}
YOLO: LabelSet = {
    "labels/a.txt": b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.9",
    "labels/b c.txt": b"",
    "labels/sub/c.txt": b"1 0.25 0.25 0.5 0.5\n0 0.5 0.5 0.5 0.5\n",
    "list.txt": b"images/a.png\n./images/b c.png\n",
    "data.yaml": b"path: .\ntrain: list.txt\nval: images/sub\nnc: 2\nnames:\n  0: cat\n  1: dog\n",
}
BASES = {"coco": _coco(), "voc": VOC, "yolo": YOLO}
IMAGE_FOLDERS = {"coco": "train", "voc": "JPEGImages", "yolo": "images"}


def main(kind: str, folder: Path, num_examples: int) -> None:
    """Try as many label sets as asked for, the same ones each time."""
    root = folder / kind
    prepare(root, kind)

    def answer(edits: list[Edit]) -> None:
        # What was tried last is in a file, in case the process does not survive it.
        (folder / "edits.txt").write_text(repr(edits), encoding="utf-8", errors="backslashreplace")
        try_labels(root, changed(BASES[kind], edits))

    test = given(edits=edits_of(BASES[kind]))(answer)
    bounds = settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
    limit_memory()
    bounds(test)()
    assert "torch" not in sys.modules


def try_alone(folder: Path, name: str) -> None:
    """Try one example of COCO labels that ask for much memory."""
    prepare(folder, "coco")
    limit_memory()
    try_labels(folder, changed(BASES["coco"], HUGE[name]))


def prepare(root: Path, kind: str) -> None:
    """Draw the images of a label set."""
    for number, name in enumerate(("a.png", "b.png" if kind == "coco" else "b c.png", "sub/c.png")):
        file = root / IMAGE_FOLDERS[kind] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE_HW[::-1], (number, 99, 199)).save(file)


def try_labels(root: Path, files: LabelSet) -> None:
    """Write labels beside their images, check them, and remove them."""
    with written(root, files):
        check(root)


@contextlib.contextmanager
def written(root: Path, files: LabelSet) -> Iterator[None]:
    """Have files in a folder for a while."""
    try:
        for name, content in files.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.mkdir() if content is None else file.write_bytes(content)
        yield
    finally:
        for file in [root / name for name in files]:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def limit_memory() -> None:
    """Let this process take no more than `MAX_BYTES` beyond what it has."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, taken + MAX_BYTES))


def check(root: Path) -> None:
    """Make sure that doctor, opening, masks and evaluation agree about a data set, and raise nothing else."""
    whole = sayable(check_data(DataConfig(root=root), num_threads=1))
    try:
        found = locate_data(root)
    except DataError as error:
        assert is_told(error, whole), f"doctor does not say: {error}"
        return
    for split in found.splits if found.format != "folder" else [None]:
        check_split(DataConfig(root=root, split=split))
    with contextlib.suppress(AlignDetError), tempfile.TemporaryDirectory() as output:
        write_folds(SplitConfig(data=DataConfig(root=root), fractions=(60,), folds=(1,), output=Path(output)))


def check_split(data: DataConfig) -> None:
    """Make sure of the same for one split."""
    report = sayable(check_data(data, num_threads=1))
    try:
        image_set = open_images(data, purpose="train", with_masks=True, with_truths=True)
    except DataError as error:
        assert is_told(error, report), f"doctor does not say: {error}"
        return
    plain = open_images(data, purpose="train")
    assert (plain.fingerprint, plain.boxes.tolist()) == (image_set.fingerprint, image_set.boxes.tolist())
    errors = [finding for finding in report.findings if finding.severity == "error"]
    hidden = [finding for finding in errors if finding.code not in OF_PIXELS]
    assert not hidden, f"only doctor says: {hidden[0].code}: {hidden[0].message}"
    if not errors:
        use(image_set)


def sayable(report: DoctorReport) -> DoctorReport:
    """Return a report, of which every message is one line that can be printed and written."""
    json.dumps(report.to_json(), allow_nan=False)
    for finding in report.findings:
        for text in (finding.message, finding.example):
            assert len(text.splitlines()) <= 1, f"more than one line: {text[:300]!r}"
            text.encode()
    return report


def is_told(error: AlignDetError, report: DoctorReport) -> bool:
    """Return True if doctor reports an error with this text."""
    return any(str(error) in finding.message for finding in report.findings if finding.severity == "error")


def use(image_set: ImageSet) -> None:
    """Draw all masks as the loader does, and measure a few predictions as `evaluate` does; both may refuse labels."""
    masks = LabelMasks(image_set)
    for index in range(len(image_set)):
        record = image_set.record(index)
        try:
            masks.masks_of(index, read_size_hw(record.path))
        except DataError:  # a warning of doctor
            continue
    if image_set.has_labels:
        compare(image_set)
    if image_set.annotations is not None:  # labels can be imported as proposals too
        with contextlib.suppress(DataError):
            classed_boxes_from_coco(image_set.annotations, image_set)


def compare(image_set: ImageSet) -> None:
    """Measure a prediction of each of the first two classes in all images, and make sure that all boxes are counted."""
    predictions = [
        {"image_id": image_id, "category_id": category.category_id, "bbox": [2.0, 1.0, 6.5, 8.0], "score": score}
        | {"segmentation": _RLE}
        for image_id in image_set.image_ids.tolist()
        for category, score in zip(image_set.categories, (0.9, 0.5), strict=False)
    ]
    for found in (predictions, []):
        metrics = measure(image_set, found, metric="voc", has_masks=True, loose_iou=0.1).metrics
        json.dumps(metrics, allow_nan=False)
        if not image_set.problems:  # nothing was left out
            crowds = int(image_set.is_crowd.sum())
            counts = {"ground_truths": len(image_set.is_crowd) - crowds, "ignored_ground_truths": crowds}
            assert counts.items() <= metrics["counts"].items(), f"{counts} trained, {metrics['counts']} measured"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
