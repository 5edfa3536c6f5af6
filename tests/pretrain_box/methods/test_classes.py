"""`--method classes`: the detector's own training, with clusters for labels."""

import pytest
import torch

from aligndet_cli.data.transforms import draw_view, make_batch
from aligndet_cli.detectors import DETECTORS
from helpers.methods import SETTINGS, assert_gradients_reach_what_is_trained, build, config_of, draw_samples

NUM_CLUSTERS = 5


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_it_is_the_training_of_the_family_on_clusters(family: str) -> None:
    module = build("classes", family, num_classes=NUM_CLUSTERS)
    samples = draw_samples((4, 3), num_classes=NUM_CLUSTERS)
    torch.manual_seed(0)
    losses, shown = module(samples, 0)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: p.grad.clone() for name, p in module.detector.named_parameters() if p.grad is not None}
    assert shown == {}
    assert_gradients_reach_what_is_trained(module)
    # Once more, step by step: the first view of AlignDet, and the losses of fine-tuning.
    params = [draw_view((SETTINGS.seed, place, 1), (64,), 120, with_colour=True) for place in (0, 1)]
    images, targets = make_batch(samples, params, torch.device("cpu"))
    module.zero_grad()
    torch.manual_seed(0)
    expected = module.detector(images, targets)
    expected.pop("loss_mask", None)
    torch.stack(list(expected.values())).sum().backward()
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=1e-6)
    for name, parameter in module.detector.named_parameters():
        if name in found:
            torch.testing.assert_close(parameter.grad, found[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_only_the_backbone_and_masks_stay_as_they_are(family: str) -> None:
    module = build("classes", family, num_classes=NUM_CLUSTERS).train()
    model = module.detector
    idle = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert idle == {"backbone", *model.fresh_modules}
    assert not any(part.training for part in model.backbone.modules())
    assert set(module.left_out) == set(model.class_modules) and "class_predictor" in module.left_out
    free = build("classes", family, num_classes=NUM_CLUSTERS, freeze_backbone=False)
    assert any(p.requires_grad for p in free.detector.backbone.parameters())


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_objects_are_found_by_what_is_kept_of_it(family: str) -> None:
    module = build("classes", family, num_classes=NUM_CLUSTERS)
    is_kept = module.detector.has_objectness and not {*module.detector.box_branch} & {*module.left_out}
    assert config_of("classes", family).finds_objects == is_kept
