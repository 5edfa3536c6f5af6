"""What checkpoints of mmdetection 2.x and 3.x, and stripped ones, tell about themselves, setting by setting."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli.data.transforms import MEAN, STD
from aligndet_cli.detectors.checkpoint import read_detector
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.tools.conversion import mmdet_config
from aligndet_cli.tools.conversion.convert import Converted, convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.mmdet_config import NEEDS, SHARED, model_of, parse_config
from aligndet_cli.tools.conversion.reading import Checkpoint
from helpers.commandline import aligndet
from helpers.small_detectors import CONFIGS, detector_file

FILE = Path("some.pth")
NAMES = ("defect0", "defect1", "defect2")
VERSIONS = ("2.x", "3.x", "stripped")
RGB = {"mean": [255 * mean for mean in MEAN], "std": [255 * std for std in STD]}
BGR = {"mean": RGB["mean"][::-1], "std": [1.0, 1.0, 1.0]}


def python(value: Any) -> str:
    """The text that mmcv and mmengine write."""
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={python(part)}' for key, part in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(python, value))}]"
    return repr(value)


def tree(path: str, value: Any) -> dict[str, Any]:
    """Nested settings with one value at a dotted path, in which numbers are places in a list."""
    first, _, rest = path.partition(".")
    place, _, below = rest.partition(".")
    if place.isdigit():
        return {first: [*[{}] * int(place), tree(below, value)]}
    return {first: tree(rest, value) if rest else value}


def merged(one: Mapping, other: Mapping) -> dict:
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], Mapping)}
    return {**one, **other, **both}


def meta_of(version: str, model: Mapping = {}, *, norm: Mapping = RGB, is_bgr: bool = False) -> dict[str, Any]:
    """The meta data of a file of a version."""
    if version == "stripped":
        return {}
    if version == "2.x":
        norm = {"img_norm_cfg": {**norm, "to_rgb": not is_bgr}}
        text = "\n".join(f"{name} = {python(value)}" for name, value in ({"model": model} | norm).items())
        return {"epoch": 12, "config": text, "CLASSES": NAMES}
    model = {"data_preprocessor": {"type": "DetDataPreprocessor", **norm, "bgr_to_rgb": not is_bgr}} | model
    return {"epoch": 12, "cfg": f"model = {python(model)}", "dataset_meta": {"classes": NAMES, "palette": None}}


# What mmdetection means where a config says nothing: its HTC has no soft NMS.
USUAL = {**CONFIGS, "htc": CONFIGS["htc"].model_copy(update={"nms_type": "nms"})}


def imported(family: str, meta: dict, **asked: str) -> Converted:
    tensors = mmdet_checkpoint(detector_file(family))[0]["state_dict"]
    return convert(Checkpoint(FILE, tensors, meta), **asked)


# ---- settings that our detectors have ----

OTHER = {float: 0.123, int: 7, bool: False, str: "on_output"}
HAVE = [(family, path, name) for family, paths in SHARED.items() for path, name in paths.items()]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("family", "path", "name"), HAVE)
def test_settings_of_ours_are_taken_from_the_config(version: str, family: str, path: str, name: str) -> None:
    default = getattr(USUAL[family], name)
    special = {"num_heads": 4, "nms_type": "nms" if default == "soft_nms" else "soft_nms"}
    value = special.get(name, OTHER[type(default)])
    assert value != default
    meta = meta_of(version, tree(path, value))
    if version == "stripped":
        with pytest.raises(WeightsError, match="no config beside its tensors.* --style pytorch .* or caffe"):
            imported(family, meta)
        assert imported(family, meta, style="pytorch").detector == USUAL[family]
        return
    assert imported(family, meta).detector == USUAL[family].model_copy(update={name: value})


@pytest.mark.parametrize("version", ["2.x", "3.x"])
@pytest.mark.parametrize(
    ("neck", "levels"),
    [
        ({"add_extra_convs": "on_input"}, "from_c5"),
        ({"add_extra_convs": True}, "from_c5"),
        ({"add_extra_convs": "on_input", "relu_before_extra_convs": True}, "from_c5_relu"),
        ({"add_extra_convs": "on_output", "relu_before_extra_convs": True}, "from_p5"),
        ({"add_extra_convs": True, "extra_convs_on_inputs": False, "relu_before_extra_convs": True}, "from_p5"),
        ({"add_extra_convs": "on_output"}, None),
        ({"add_extra_convs": "on_lateral"}, None),
        ({"add_extra_convs": False}, None),
    ],
)
def test_the_last_levels_of_retinanet_are_those_of_the_config(version: str, neck: dict, levels: str | None) -> None:
    content = detector_file("retinanet")
    tensors = mmdet_checkpoint(content)[0]["state_dict"]
    if levels == "from_p5":  # as wide as the pyramid
        tensors = tensors | {"neck.fpn_convs.3.conv.weight": torch.rand(8, 8, 3, 3)}
    checkpoint = Checkpoint(FILE, tensors, meta_of(version, {"neck": neck}))
    if levels is None:
        with pytest.raises(WeightsError, match="has neck.add_extra_convs = .* would detect something else"):
            convert(checkpoint)
        return
    assert convert(checkpoint).detector.extra_levels == levels


# ---- settings that they lack ----

REFUSED = [(family, path) for family, paths in NEEDS.items() for path in paths]


@pytest.mark.parametrize("version", ["2.x", "3.x"])
@pytest.mark.parametrize(("family", "path"), REFUSED)
def test_settings_that_ours_lack_are_refused_by_name(version: str, family: str, path: str) -> None:
    right = NEEDS[family][path]
    for value in right:
        if path.endswith("operation_order") and value[0] == "norm":
            continue  # norms first, which this file's tensors are not: see test_pretraining.py
        told = {SHARED[family][path]: value} if path in SHARED[family] else {}
        expected = USUAL[family].model_copy(update=told)
        assert imported(family, meta_of(version, tree(path, value))).detector == expected
    wrong = _other(right[0])
    if wrong in right:
        return  # both are the same here
    with pytest.raises(WeightsError) as caught:
        imported(family, meta_of(version, tree(path, wrong)))
    line = str(caught.value)
    assert line.startswith(f"some.pth: has {path} = ") and line.endswith("it would detect something else")
    assert "\n" not in line and caught.value.exit_code == 4


def _other(value: Any) -> Any:
    if isinstance(value, list):
        return [*value[:-1], 77]
    return (not value) if isinstance(value, bool) else "other" if isinstance(value, str) else value + 77


@pytest.mark.parametrize("family", CONFIGS)
def test_values_that_no_detector_of_ours_has_are_refused(family: str) -> None:
    path = next(path for path, name in SHARED[family].items() if name == "max_detections")
    with pytest.raises(WeightsError, match="no detector of ours has max_detections = -1"):
        imported(family, meta_of("3.x", tree(path, -1)))


# ---- images ----


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("version", "style"), list(itertools.product(VERSIONS, ("pytorch", "caffe"))))
def test_the_style_is_the_files_or_asked_for(version: str, family: str, style: str) -> None:
    is_bgr = style == "caffe"
    meta = meta_of(version, {"backbone": {"style": style}}, norm=BGR if is_bgr else RGB, is_bgr=is_bgr)
    kernels = [imported(family, meta, style=style).state_dict["backbone.conv1.weight"]]
    if version != "stripped":
        kernels.append(imported(family, meta).state_dict["backbone.conv1.weight"])
        with pytest.raises(ConfigError, match=f"says {'BGR' if is_bgr else 'RGB'}; leave it out"):
            imported(family, meta, style="pytorch" if is_bgr else "caffe")
    original = detector_file(family).state_dict["backbone.conv1.weight"]
    for kernel in kernels:
        assert torch.equal(kernel, original) == (not is_bgr)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"config": "model = dict(type='X')"}, "no mean, deviation and order of channels in its config"),
        ({"cfg": "model = dict(data_preprocessor=dict(mean=[1., 2., 3.], std=[1., 1., 1.]))"}, "no mean, deviation"),
        ({"config": "norm = dict(mean=[123.675, 116.28, 103.53], std=[1., 1., 1.], to_rgb=True)"}, "no config"),
        ({"config": "this is no Python"}, "no config beside its tensors"),
        ({"config": "(" * 5000}, "no config beside its tensors"),
        ({"cfg": 3, "dataset_meta": None}, "no config beside its tensors"),
        ({}, "no config beside its tensors"),
    ],
)
def test_what_the_file_does_not_tell_is_asked_for(family: str, meta: dict, said: str) -> None:
    with pytest.raises(WeightsError, match=f"some.pth: has {said}.* --style pytorch .* or caffe"):
        imported(family, meta)
    assert imported(family, meta, style="pytorch").detector == USUAL[family]


# ---- classes, and the command ----


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("version", VERSIONS)
def test_class_names_and_settings_arrive_in_the_run(version: str, family: str, tmp_path: Path) -> None:
    file, workspace = tmp_path / "model.pth", tmp_path / "workspace"
    state = mmdet_checkpoint(detector_file(family))[0]["state_dict"]
    torch.save({"meta": meta_of(version, {"test_cfg": {}}), "state_dict": state}, file)
    words = ("import-weights", file, "-w", workspace, "--name", "it")
    if version == "stripped":
        assert "add --style" in aligndet(*words, code=4).error_line()
        line = aligndet(*words, "--style", "pytorch", code=4).error_line()
        assert "3 classes without names; name them with --categories FILE.json" in line
        return
    aligndet(*words)
    assert tuple(one.name for one in read_detector(workspace / "finetune/it/weights.pt").categories) == NAMES


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"dataset_meta": {"CLASSES": NAMES}}, NAMES),
        ({"dataset_meta": {"classes": list(NAMES)}}, NAMES),
        ({"CLASSES": NAMES, "dataset_meta": {"classes": None}}, NAMES),
        ({"dataset_meta": {"classes": NAMES[:2]}}, "names 2 classes, but has 3"),
        ({"CLASSES": "cat"}, "names 1 classes, but has 3"),
        ({"dataset_meta": {"classes": None}}, "3 classes without names"),
    ],
)
def test_names_are_found_wherever_mmdetection_puts_them(meta: dict, names: object, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    torch.save({"meta": meta, "state_dict": mmdet_checkpoint(detector_file("detr"))[0]["state_dict"]}, file)
    words = ("import-weights", file, "-w", tmp_path / "w", "--name", "it", "--style", "pytorch")
    if isinstance(names, str):
        assert names in aligndet(*words, code=4).error_line()
        return
    aligndet(*words)
    assert tuple(one.name for one in read_detector(tmp_path / "w/finetune/it/weights.pt").categories) == names


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ("test_pipeline = [dict(type='Resize', scale=(1000, 600), keep_ratio=True)]", (600, 1000)),
        ("data = dict(test=dict(pipeline=[dict(type='MultiScaleFlipAug', img_scale=(512, 512))]))", (512, 512)),
        ("test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=[(512, 512), (800, 512)])]", None),
        ("test_pipeline = [dict(type='Resize', scale=0.5), dict(type='Pad', size=(1, 2))]", None),
        ("train_pipeline = [dict(type='Resize', scale=(1000, 600))]", None),
    ],
)
def test_images_are_as_large_as_in_the_config(config: str, size: tuple[int, int] | None) -> None:
    assert mmdet_config.test_size(parse_config({"cfg": config})) == size


def test_a_detr_of_3x_is_named() -> None:
    tensors = {"encoder.layers.0.self_attn.attn.in_proj_weight": torch.zeros(1), "bbox_head.fc_cls.bias": torch.ones(1)}
    with pytest.raises(WeightsError, match="a DETR of mmdetection 3.x, .*; one of 2.x or of facebookresearch/detr"):
        convert(Checkpoint(FILE, tensors, {}))


def test_configs_are_parsed_and_never_run(tmp_path: Path) -> None:
    model = "model = dict(a=open('x'), b={'c': (1, -2.5)}, **rest)\ntest_cfg = dict(d=1)"
    config = parse_config({"config": f"open({str(tmp_path / 'ran')!r}, 'w')\n{model}"})
    assert model_of(config) == {"test_cfg": {"d": 1}, "a": "open('x')", "b": {"c": [1, -2.5]}}
    assert not (tmp_path / "ran").exists()
    assert model_of(parse_config({"cfg": "model = dict(backbone=dict(backbone=dict(depth=50)))"})) == {
        "backbone": {"depth": 50}
    }
