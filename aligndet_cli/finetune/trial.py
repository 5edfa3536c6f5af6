"""The steps that are tried before fine-tuning, to see how much memory they need."""

from dataclasses import replace
from functools import partial

import numpy as np

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.detectors import semantic_classes_of
from aligndet_cli.detectors.recipes import RCNN
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import Initial
from aligndet_cli.finetune.views import Resolution, build_views
from aligndet_cli.training.learner import build_to_try
from aligndet_cli.training.settings import resolve_settings
from aligndet_cli.training.trial import GAPS_IN_FINETUNING, Trial


def largest_trial(config: FinetuneConfig, initial: Initial, image_set: ImageSet, resolution: Resolution) -> Trial:
    """Return steps on images of the largest size, each with as many boxes as any image has."""
    one = config.training.model_copy(update={"batch_size": 1, "accumulate": 1})
    num_classes, rates = len(image_set.categories), initial.rates
    policy = "resize" if resolution.policy == "detr" else resolution.policy  # crops are smaller
    largest = replace(resolution, policy=policy, short_sides=(max(resolution.short_sides),))
    settings = resolve_settings(one, rates, num_images=len(image_set), seed=config.seed, runtime=config.runtime)
    make_views = partial(build_views, initial.detector, initial.backbone, num_classes, largest, config.seed)
    return Trial(
        build=partial(build_to_try, make_views, rates, settings, config.runtime),
        settings=settings,
        sizes_hw=resolution.worst_sizes(),
        num_boxes=int(np.diff(image_set.offsets).max()),
        num_classes=num_classes,
        num_images=len(image_set),
        gaps=GAPS_IN_FINETUNING,
        pools_regions=initial.detector.family in RCNN,
        with_masks=initial.detector.RECIPE.needs_masks,
        semantic_classes=semantic_classes_of(initial.detector),
    )
