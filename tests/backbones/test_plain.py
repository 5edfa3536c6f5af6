"""Files of weights as programs write them: prefixes, wrappers, containers, and what lies beside the tensors."""

import argparse
import datetime
import itertools
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.backbones.plain import bare_name, read_plain, state_dicts
from aligndet_cli.backbones.weights import read_backbone
from aligndet_cli.detectors.checkpoint import read_detector, write_detector
from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.reading import read_checkpoint
from helpers.small_detectors import detector_file

PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.")
WRAPPERS: dict[str, tuple[str, ...]] = {
    "itself": (),
    **{key: (key,) for key in ("state_dict", "model", "model_state_dict", "net", "ema", "model_ema", "state_dict_ema")},
    "ema.module": ("ema", "module"),
    "model.state_dict": ("model", "state_dict"),
}
CONTAINERS = ("zip", "legacy", "half", "safetensors")
CASES = [
    (prefix, wrapper, container)
    for prefix, wrapper, container in itertools.product(PREFIXES, WRAPPERS, CONTAINERS)
    if container != "safetensors" or wrapper == "itself"  # it holds names and tensors, nothing else
]


@pytest.fixture(scope="module")
def body() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return build_backbone(BackboneConfig(name="resnet18")).state_dict()


@pytest.fixture(scope="module")
def detector() -> dict[str, Tensor]:
    return mmdet_checkpoint(detector_file("retinanet"))[0]["state_dict"]


def write(folder: Path, tensors: dict[str, Tensor], prefix: str, wrapper: str, container: str) -> Path:
    content: dict = {f"{prefix}{name}": t.half() if container == "half" else t for name, t in tensors.items()}
    file = folder / f"weights.{'safetensors' if container == 'safetensors' else 'pth'}"
    if container == "safetensors":
        save_file(content, file)
        return file
    for key in reversed(WRAPPERS[wrapper]):
        content = {"epoch": 3, key: content}
    torch.save(content, file, _use_new_zipfile_serialization=container != "legacy")
    return file


@pytest.mark.parametrize(("prefix", "wrapper", "container"), CASES)
def test_every_wrapping_gives_the_same_tensors_to_every_reader(
    prefix: str, wrapper: str, container: str, tmp_path: Path, body: dict, detector: dict
) -> None:
    few = {name: tensor for name, tensor in body.items() if name.startswith(("conv1", "bn1"))}
    found = read_backbone(write(tmp_path, few, prefix, wrapper, container))
    assert found.layout == "torchvision"
    heads = {name: tensor for name, tensor in detector.items() if name.startswith("bbox_head")}
    read = read_checkpoint(write(tmp_path, heads, prefix, wrapper, container)).tensors
    for given, expected in ((found.tensors, few), (read, heads)):
        assert given.keys() == expected.keys()
        for name, tensor in given.items():
            wanted = expected[name].half() if container == "half" and tensor.is_floating_point() else expected[name]
            assert torch.equal(tensor.float(), wanted.float()), name


def test_prefixes_of_parts_are_no_part_of_a_name() -> None:
    assert bare_name("module.backbone._orig_mod.conv1.weight") == "backbone.conv1.weight"
    assert bare_name("model.model.fc.weight") == "fc.weight"
    assert bare_name("ema_model.fc.weight") == "ema_model.fc.weight" and bare_name("model") == "model"


def test_weights_come_before_their_averages() -> None:
    one, other = {"a": torch.ones(1)}, {"a": torch.zeros(1), "n_averaged": torch.tensor(3)}
    found = list(state_dicts({"model_ema": other, "model": one}))
    assert [keys for keys, _ in found] == [("model",), ("model_ema",)] and list(found[1][1]) == ["a"]
    knot: dict = {}
    knot["model"] = knot
    assert list(state_dicts(knot)) == []


# ---- beside the tensors ----


class AttributeDict(dict):
    pass


class HistoryBuffer:
    """As in mmengine: a buffer carries its methods by name."""

    def __init__(self) -> None:
        self.log_history = np.arange(3.0)
        self.methods = {"min": HistoryBuffer.least}

    def least(self) -> None: ...


PLAIN: dict[str, object] = {
    **{
        f"numpy.{kind.__name__}": kind(1) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8)
    },
    "numpy.bool": np.bool_(True),
    "numpy.str": np.str_("best"),
    "numpy array": np.arange(6.0).reshape(2, 3),
    "argparse": argparse.Namespace(lr=np.float64(0.1), output=Path("out"), names=["a"]),
    "namespace": SimpleNamespace(a=1),
    "path": Path("a/b"),
    "time": [datetime.datetime(2024, 1, 2), datetime.date(2024, 1, 2), datetime.timedelta(1)],
    "defaultdict": defaultdict(list, {"a": [1]}),
    "defaultdict of dicts": defaultdict(dict, {0: {"step": 1}}),
    "set": {1, 2},
    "size, dtype, device": [torch.Size([1]), torch.float16, torch.device("cpu")],
    "complex": 1j,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_data_beside_the_tensors_is_no_obstacle(kind: str, body: dict, detector: dict, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": body, "best": PLAIN[kind], "optimizer": {"state": {0: PLAIN[kind]}}}, file)
    assert read_backbone(file).tensors.keys() == body.keys()
    torch.save({"state_dict": detector, "meta": {"CLASSES": ("a",), "hook_msgs": {"best": PLAIN[kind]}}}, file)
    assert read_checkpoint(file).meta["CLASSES"] == ("a",)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("mmengine.logging.history_buffer", HistoryBuffer), ("pytorch_lightning.utilities.parsing", AttributeDict)],
)
def test_objects_of_training_programs_are_read_without_them(
    module: str, kind: type, body: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.pth"
    with monkeypatch.context() as installed:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            installed.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        setattr(sys.modules[module], kind.__name__, kind)
        installed.setattr(kind, "__module__", module)
        torch.save({"state_dict": body, "beside": {"a": kind()}}, file)
    assert read_backbone(file).tensors.keys() == body.keys()


def test_scalars_keep_their_value(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    values = [np.float32(0.5), np.int16(-3), np.bool_(False), np.str_("é"), np.float64(np.inf), np.dtype(">f4").type(2)]
    torch.save(values, file)
    assert read_plain(file, "x") == [0.5, -3, False, "é", np.inf, 2.0]


class Recipe:
    """Not plain: code."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda s: {"model": s, "recipe": Recipe()}, r"test_plain\.Recipe, which is code\); save just"),
        (lambda s: {"model": s, "loss": torch.nn.Linear(1, 1)}, r"torch\.nn\.modules\.linear\.Linear, which is code"),
        (lambda s: {"model": s, "fn": torch.compile}, r"torch\.compile, which is code"),
    ],
)
def test_code_in_a_file_is_named(content: object, said: str, body: dict, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(content(body), file)
    for read in (read_backbone, read_checkpoint, read_detector):
        with pytest.raises(WeightsError, match=said) as caught:
            read(file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("read", [read_backbone, read_checkpoint, read_detector])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull` there"),
        ("a.pth", b"<html>", "not a readable PyTorch file, or damaged .*; get it again"),
        ("a.safetensors", b"<html>", "not a readable safetensors file, or damaged .*; get it again"),
        ("a.safetensors", b"", "not a readable safetensors file"),
        ("a.safetensors", None, "no such file"),
        ("", None, "is a folder"),
    ],
)
def test_files_that_are_none_say_what_to_do(
    read: object, name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=said) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize("read", [read_backbone, read_checkpoint, read_detector])
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(read: object, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="a pipe or a device"):
        read(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("read", [read_backbone, read_checkpoint])
def test_sparse_tensors_are_left_out(read: object, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2).to_sparse()}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no tensors in it"):
        read(tmp_path / "a.pth")


def test_a_changed_bit_of_a_detector_is_found(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    write_detector(file, detector_file("retinanet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged .*differs from its checksum.*; get it again"):
        read_detector(file)


CHANGES = [
    {"detector": {"family": "new"}},
    {"categories": [{}]},
    {"resolution": [64]},
    {"state_dict": None},
    {"state_dict": {"a": 1}},
    {"extra": {"projector": [1]}},
]


@pytest.mark.parametrize("change", CHANGES)
def test_detectors_of_other_versions_are_one_line(change: dict, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    write_detector(file, detector_file("retinanet"))
    torch.save(torch.load(file, weights_only=True) | change, file)
    with pytest.raises(WeightsError, match="another version of aligndet, or by hand; use the version that wrote it"):
        read_detector(file)


# ---- numbers that are none ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named_by_every_reader(
    bad: float, body: dict, detector: dict, tmp_path: Path
) -> None:
    file, content = tmp_path / "weights.pth", detector_file("retinanet")
    place, head = "layer1.0.conv1.weight", "bbox_head.retina_cls.weight"
    files = [
        (read_backbone, place, lambda: torch.save({**body, place: body[place] + bad}, file)),
        (read_checkpoint, head, lambda: torch.save({"state_dict": {**detector, head: detector[head] * bad}}, file)),
        (read_detector, "neck", lambda: write_detector(file, _spoilt(content, bad))),
    ]
    for read, name, make in files:
        make()
        with pytest.raises(WeightsError, match=f"'{name}.*' holds NaN or infinity, so nothing can come of it"):
            read(file)
    torch.save({**body, "fc.weight": torch.full((1000, 512), bad)}, file)
    assert read_backbone(file).num_classes == 1000  # not a tensor of the backbone


def _spoilt(content: object, bad: float) -> object:
    name = next(name for name in content.state_dict if name.startswith("neck"))
    changed = {**content.state_dict, name: content.state_dict[name] + bad}
    return type(content)(**{**vars(content), "state_dict": changed})
