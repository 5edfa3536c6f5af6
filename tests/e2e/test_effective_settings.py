"""The settings that the scripts of the paper's tables run with at full scale, beside `settings/`.

Nothing is trained: every run of every table is planned as its stage would plan it, on a pretended COCO and Pascal VOC
and on weights in the published layouts, and says its effective settings as `--dry-run` does. The files were compared
line by line with the authors' configs; ALIGNDET_WRITE_SETTINGS=1 before pytest writes them anew.
"""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import models

from aligndet_cli.backbones import BackboneConfig, BackboneWeights, build_backbone, find_backbone_weights
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.data.voc import VOC_CLASSES
from aligndet_cli.detectors.checkpoint import DetectorFile, write_detector
from aligndet_cli.files import write_json
from aligndet_cli.finetune import initial, labels
from aligndet_cli.finetune import stage as finetune
from aligndet_cli.pretrain_box import stage as pretrain_box
from aligndet_cli.pretrain_box.boxes import ProposalData
from aligndet_cli.tools.conversion.convert import convert
from aligndet_cli.tools.conversion.reading import read_checkpoint
from aligndet_cli.tools.report.published import Published, find_published, published_numbers
from aligndet_cli.tools.study.plan import StageRun
from aligndet_cli.workspace import Artifact, Workspace
from helpers.published_files import smoke_weights
from helpers.table_scripts import (
    FILES,
    NUM_BOXES,
    NUM_COCO,
    NUM_VOC,
    TABLES,
    pretend,
    run,
    studies_of,
)

SETTINGS = Path(__file__).with_name("settings")
LEFT_OUT = ("run", "data", "images")  # of the effective settings: what does not follow from the recipe
NUM_IMAGENET = 200_000


def tensors_of(name: str) -> dict[str, Tensor]:
    """The tensors of a torchvision model, all zero, none of which takes up memory or disk."""
    with torch.device("meta"):
        state = getattr(models, name)().state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


def swin_l_tensors() -> dict[str, Tensor]:
    """As `tensors_of`; torchvision has no Swin-L."""
    with torch.device("meta"):
        state = build_backbone(BackboneConfig(name="swin_l")).torchvision_state()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


def prefixed(tensors: dict[str, Tensor], prefix: str, *others: str) -> dict[str, Tensor]:
    beside = dict.fromkeys(others, torch.zeros(1))
    body = {f"{prefix}{name}": value for name, value in tensors.items() if not name.startswith(("fc.", "head."))}
    return body | beside


def official_swin(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Swin under the names of its authors, its classifier included."""
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
        new = new.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        if match := re.match(r"features\.(\d+)\.(.*)", new):
            stage, is_merging = divmod(int(match[1]) - 1, 2)
            new = f"layers.{stage}.{'downsample' if is_merging else 'blocks'}.{match[2]}"
        renamed[new] = value
    return renamed


def write_weights(folder: Path) -> None:
    """Write the files that the scripts ask for, and torchvision's, in their published layouts."""
    resnet, swin = tensors_of("resnet50"), official_swin(tensors_of("swin_b"))
    torch.save({"state_dict": prefixed(resnet, "module.encoder_q.")}, folder / FILES["MOCO"])
    pixpro = prefixed(resnet, "module.encoder.", "module.value_transform.weight")
    torch.save({"model": pixpro}, folder / FILES["PIXPRO"])
    torch.save(prefixed(resnet, "module.", "module.prototypes.weight"), folder / FILES["SWAV"])
    torch.save({"model": prefixed(swin, "encoder.", "encoder.mask_token")}, folder / FILES["SIMMIM"])
    torch.save({"model": {**swin, "head.weight": torch.zeros(1).expand(21841, 1024)}}, folder / FILES["SWIN_B"])
    large = official_swin(swin_l_tensors())
    torch.save({"model": {**large, "head.weight": torch.zeros(1).expand(21841, 1536)}}, folder / FILES["SWIN_L"])
    torch.save({"state_dict": prefixed(resnet, "backbone.", "encoder_q.0.conv1.weight")}, folder / FILES["DENSECL"])
    torch.save({"state_dict": prefixed(resnet, "module.encoder_q.")}, folder / FILES["DETCO"])
    torch.save({"model": prefixed(resnet, "module.encoder_k.", "module.grouping_k.weight")}, folder / FILES["SLOTCON"])
    with torch.device("meta"):
        rcnn, detr = smoke_weights.RCNNSize(), smoke_weights.DETRSize()
        published = {
            "SOCO": (smoke_weights.soco(resnet, rcnn), 400),
            "SOCO_COCO": (smoke_weights.soco(resnet, rcnn), 530),
            "UP_DETR": (smoke_weights.up_detr(resnet, detr), 59),
            "DETREG": (smoke_weights.detreg(resnet, detr, pre_norm=True), 59),
        }
    for name, (tensors, epoch) in published.items():
        empty = {
            key: torch.zeros((), dtype=value.dtype).expand(value.shape)
            for key, value in tensors.items()
            if ".fc." not in key
        }
        torch.save({"model": empty, "epoch": epoch}, folder / FILES[name])
    cache = folder / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for name in ("resnet18", "resnet50", "mobilenet_v2", "swin_s"):
        url = models.get_model_weights(name)["IMAGENET1K_V1"].url
        torch.save(tensors_of(name), cache / Path(url).name)


@functools.cache
def pretended_images(root: Path) -> ImageSet:
    """As many images as a data set has, one box each; none of them is anywhere."""
    is_voc = root.name == "VOCdevkit"
    count = {"VOCdevkit": NUM_VOC[0], "imagenet": NUM_IMAGENET}.get(root.name, NUM_COCO[0])
    names = VOC_CLASSES if is_voc else [f"class {number}" for number in range(80)]
    return ImageSet(
        format="voc" if is_voc else "coco",
        root=root,
        split="trainval" if is_voc else "train2017",
        images_dir=root,
        file_names=[f"{number}.jpg" for number in range(count)],
        image_ids=np.arange(count),
        sizes_hw=np.full((count, 2), (480, 640), dtype=np.int32),
        offsets=np.arange(count + 1),
        boxes=np.tile(np.array([[10, 10, 90, 90]], dtype=np.float32), (count, 1)),
        class_ids=np.zeros(count, dtype=np.int64),
        areas=np.full(count, 6400, dtype=np.float32),
        is_crowd=np.zeros(count, dtype=np.bool_),
        segmentations=None,
        categories=tuple(Category(number + 1, name) for number, name in enumerate(names)),
        fingerprint=root.name,
        problems={},
    )


def pretended_proposals(_workspace: Workspace, _name: str | None, data: object) -> ProposalData:
    images = pretended_images(data.root)  # type: ignore[attr-defined]
    store = SimpleNamespace(counts=np.full(len(images), 70))
    artifact = Artifact(Path("proposals"), {"content_hash": "proposals"})
    return ProposalData(store, images, artifact, np.arange(len(images)), list(range(len(images))))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("effective")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, patch)
        yield folder


def prepare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    pretend(folder)
    write_weights(folder)
    for name in ("coco", "VOCdevkit", "imagenet"):
        (folder / name).mkdir()
    clusters = Artifact(folder / "clusters", {"content_hash": "clusters"})
    clusters.folder.mkdir()
    write_json(clusters.folder / "report.json", {"k": 256})
    patch.setenv("TORCH_HOME", str(folder / "torch"))
    patch.setattr(pretrain_box, "open_proposal_data", pretended_proposals)
    patch.setattr(
        pretrain_box,
        "_find_clusters",
        lambda config, *_: clusters if config.needs_clusters else None,
    )
    patch.setattr(labels, "open_images", lambda data, **_: pretended_images(data.root))
    patch.setattr(labels, "_masks_of", lambda *_: None)

    @functools.cache  # hundreds of runs start from the same few files
    def find_weights(weights: str, backbone_name: str) -> BackboneWeights:
        config = BackboneConfig.model_validate({"name": backbone_name, "weights": weights})
        return find_backbone_weights(config, Workspace(folder / "empty"), offline=True)

    patch.setattr(initial, "find_backbone_weights", lambda config, *_, **__: find_weights(config.weights, config.name))


@functools.cache
def imports_of(folder: Path) -> dict[Path, Artifact]:
    """What the scripts have imported so far, by its file of weights, which has no tensors."""
    found: dict[Path, Artifact] = {}
    record = folder / "imported.txt"
    for line in record.read_text().splitlines() if record.exists() else ():
        file, name = line.split()
        converted = convert(read_checkpoint(Path(file)))
        assert converted.pretraining is not None
        weights = folder / "workspace" / "pretrain-box" / name / "weights.pt"
        content = DetectorFile(
            converted.stage,
            converted.detector,
            converted.backbone,
            categories=(),
            resolution=None,
            state_dict={},
            recipe=converted.pretraining.recipe,
            backbone_training=converted.pretraining.backbone,
        )
        write_detector(weights, content)
        config = {"layout": converted.layout, "detector": converted.detector.model_dump()}
        result = {"epochs": converted.pretraining.epochs}
        found[weights] = Pretended(Path("run"), {"config": config, "result": result})
    return found


@functools.cache
def plans_of(script: str, folder: Path) -> list[tuple[StageRun, finetune.Plan | pretrain_box.Plan]]:
    """What every run of a script would do, pre-training before what starts from it."""
    return list(planned(script, folder))


def planned(script: str, folder: Path) -> Iterator[tuple[StageRun, finetune.Plan | pretrain_box.Plan]]:
    run(script, cwd=folder, programs=folder / "bin", smoke="")
    imports_of.cache_clear()
    imports_of(folder)
    for runs in studies_of(script, folder, "empty"):
        workspace = Workspace(folder / "empty")
        for one in runs:
            config = one.config()
            if isinstance(config, finetune.FinetuneConfig):
                yield one, finetune.prepare(config, workspace)
            elif isinstance(config, pretrain_box.PretrainBoxConfig):
                plan = pretrain_box.prepare(config, workspace)
                place = workspace.root / one.stage / one.name
                place.mkdir(parents=True, exist_ok=True)
                write_detector(
                    place / "weights.pt",
                    DetectorFile(
                        "pretrain-box",
                        pretrain_box.pretrain_detector(plan.config),
                        plan.config.backbone,
                        categories=(),
                        resolution=None,
                        state_dict={},
                        recipe=plan.recipe.name,
                        backbone_training=plan.weights.training,
                    ),
                )
                yield one, plan


def settings_of(plan: finetune.Plan | pretrain_box.Plan, folder: Path) -> str:
    stage = finetune if isinstance(plan, finetune.Plan) else pretrain_box
    lines = [f"  {key}: {value}" for key, value in stage.describe(plan).items() if key not in LEFT_OUT]
    text = "\n".join(lines).replace(f"{folder}/", "").replace("torch/hub/checkpoints/", "")
    return re.sub(r"(?:empty|workspace)/pretrain-box/\S+/weights.pt", "its pre-training", text)


def rows_of(script: str, folder: Path) -> str:
    """All rows of a table: a title for what has the same settings, then these."""
    blocks: dict[tuple[str, str], dict[str, None]] = {}
    for one, plan in plans_of(script, folder):
        config = plan.config
        title = f"{one.stage}: {config.detector.family}, {config.backbone.name}"
        if isinstance(config, finetune.FinetuneConfig):
            schedule = config.training.schedule or plan.initial.rates.schedule  # type: ignore[union-attr]
            title += f", {config.label}, {schedule}"
            fraction = f"{config.fraction:g} %"
        else:
            fraction = ""
        blocks.setdefault((title, settings_of(plan, folder)), {})[fraction] = None
    return "\n".join(
        f"{title}{', of ' + ', '.join(fractions) if any(fractions) else ''}\n{text}"
        for (title, text), fractions in blocks.items()
    )


@pytest.mark.parametrize("script", TABLES)
def test_every_row_runs_with_the_settings_of_the_paper(script: str, folder: Path) -> None:
    file = (SETTINGS / script).with_suffix(".txt")
    rows = rows_of(script, folder) + "\n"
    if os.environ.get("ALIGNDET_WRITE_SETTINGS"):
        SETTINGS.mkdir(exist_ok=True)
        file.write_text(rows)
    assert rows == file.read_text(), (
        "settings changed: on purpose? then compare them with the source, and write them anew"
    )


@pytest.mark.parametrize("script", [name for name in TABLES if name != "table12.sh"])
def test_full_scale_is_the_table_of_the_paper(script: str, folder: Path) -> None:
    """Every number of the table would stand beside a run, and every run beside a number of the paper."""
    plans = plans_of(script, folder)
    done = {one.key: carried_out(plan) for one, plan in plans}
    found: set[Published] = set()
    missing = set()
    for one, plan in plans:
        if isinstance(plan, finetune.Plan):
            assert plan.config.label is not None
            num_measured = NUM_VOC[1] if plan.image_set.format == "voc" else NUM_COCO[1]
            evaluation = Pretended(Path("evaluation"), {"result": {"images": num_measured}})
            own = (done[key] for key in one.needs if key.startswith("pretrain-box/"))
            start = next(own, None) or imports_of(folder).get(Path(plan.config.init))
            published = find_published(evaluation, done[one.key], start)
            if published is None:
                missing.add(f"{one.name.rsplit('-', 3)[0]}: {plan.config.label}")
            else:
                found.add(published)
    number = str(int(script[5:7]))
    of_table = {one for one in published_numbers().values() if number in re.findall(r"\d+", one.source)}
    assert of_table and of_table <= found
    # No run tells that its boxes were ImageNet's, and no file of weights on which images, or how long, it was trained.
    expected = {
        "table05.sh": {"densecl", "detco", "slotcon", "soco"},
        "table06.sh": {"DETReg, ImageNet"},  # the paper's is another
        "table08.sh": {"ImageNet subset"},
    }
    assert {word for word in expected.get(script, ()) if any(word in entry for entry in missing)} == expected.get(
        script, set()
    )
    assert all(any(word in entry for word in expected.get(script, ())) for entry in missing), missing


class Pretended(Artifact):
    """An artifact that is nowhere."""

    def config(self) -> dict[str, object]:
        return dict(self.manifest["config"])


def carried_out(plan: finetune.Plan | pretrain_box.Plan) -> Artifact:
    """What a stage would have made."""
    if isinstance(plan, finetune.Plan):
        kind = "backbone" if plan.config.init == "backbone" else "file"
        result = {"init": kind, "backbone": plan.initial.backbone.name, "protocol": finetune.protocol_of(plan)}
    else:
        result = {"steps": plan.settings.schedule.num_steps}
        assert plan.config.limit_boxes in (None, NUM_BOXES)
    config = plan.config.to_json()
    return Pretended(Path("run"), {"config": config, "result": {"images": len(plan.indices), **result}})
