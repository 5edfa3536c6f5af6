"""Settings and labels of fine-tuning, checked before anything is loaded."""

from collections.abc import Collection
from dataclasses import replace

from aligndet_cli.backbones.checks import check_weights, is_by_name
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.folds import fraction_of
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.open import open_images
from aligndet_cli.data.pixel_maps import PixelMaps
from aligndet_cli.data.stray import require_boxes
from aligndet_cli.detectors import DetectorConfig, semantic_classes_of
from aligndet_cli.detectors.recipes import ALIKE
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import find_initial
from aligndet_cli.finetune.transfer import parse_modules
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import resolve_devices
from aligndet_cli.workspace import Workspace


def look_ahead(config: FinetuneConfig, workspace: Workspace, pending: Collection[str]) -> None:
    """See `Steps`."""
    resolve_devices(config.runtime)
    check_settings(config)
    image_set, indices, _ = open_labelled(config, workspace)
    detector = config.detector
    if config.init == "backbone" and is_by_name(config.backbone.weights):
        check_weights(config.backbone, workspace, offline=config.runtime.offline)
    elif not {"init", "backbone.weights"} & set(pending):
        detector = find_initial(config, workspace).detector
    if (maps := pixel_maps_of(config, detector, image_set)) is not None:
        maps.check(indices)


def check_settings(config: FinetuneConfig) -> None:
    """Refuse settings that contradict each other or cannot take effect."""
    parse_modules(config.load_modules)
    if config.early_stop is not None and config.evaluate_every is None:
        raise ConfigError("--early-stop: needs --evaluate-every, which finds out what is better")
    if config.fraction == 100 and "fold" in config.model_fields_set:
        raise ConfigError("--fold: goes with --fraction; all images have no folds")
    if config.init in ("backbone", "scratch"):
        idle = {"load_modules", "min_match", "keep_box_predictor"} & config.model_fields_set
        if idle:
            raise ConfigError(f"{', '.join(sorted(idle))}: no effect with --init {config.init}; leave it out")


def open_labelled(config: FinetuneConfig, workspace: Workspace) -> tuple[ImageSet, list[int], LabelMasks | None]:
    """Return the labelled images, the indices of the fraction to train on, and masks if the detector needs them."""
    needs_masks = config.detector.RECIPE.needs_masks
    image_set = open_images(config.data, purpose="train", with_masks=needs_masks, index_dir=workspace.index_dir)
    require_boxes(image_set, "finetune needs labelled images")
    indices = fraction_of(len(image_set), config.fraction, config.fold)
    masks = _masks_of(image_set, indices, config.detector.family) if needs_masks else None
    return replace(image_set, segmentations=None), indices, masks


def _masks_of(image_set: ImageSet, indices: list[int], family: str) -> LabelMasks:
    masks = LabelMasks(image_set)
    with_mask, num_boxes = masks.count(indices)
    if num_boxes and not with_mask:
        without_masks = next(families[0] for families in ALIKE if family in families)
        raise DataError(
            f"{image_set.annotations or image_set.root}: none of the {num_boxes} boxes has a mask, and {family} trains "
            f"on masks; use --detector {without_masks}, or labels with polygons"
        )
    if with_mask < num_boxes:
        logger.warning("%d of %d boxes have no mask: they train the boxes only", num_boxes - with_mask, num_boxes)
    return masks


def pixel_maps_of(config: FinetuneConfig, detector: DetectorConfig, image_set: ImageSet) -> PixelMaps | None:
    """Return the maps of a detector with a semantic branch; None without one."""
    num_classes = semantic_classes_of(detector)
    if config.pixel_maps is None:
        if num_classes:
            raise ConfigError(
                f"detector.semantic_classes = {num_classes}: trains on the class of every pixel, so give the folder of "
                "its maps by --set pixel_maps=FOLDER; detector.semantic_classes=0 leaves the branch out"
            )
        return None
    if not num_classes:
        raise ConfigError(
            "pixel_maps: no effect without a semantic branch; leave it out, or use --detector htc --set "
            "detector.semantic_classes=183"
        )
    return PixelMaps(image_set, config.pixel_maps, num_classes)
