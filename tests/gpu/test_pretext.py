"""Views and the pretext on a GPU against those on a CPU."""

import pytest
import torch
from torch.nn.functional import normalize

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.transforms import COLOUR_OPS, STD, ColourOp, ViewParams, make_batch
from aligndet_cli.detectors import DETECTORS, DetectorConfig
from aligndet_cli.pretrain_box.contrastive import contrastive_loss
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.training.placement import place
from helpers import methods
from helpers.gpu import (
    DEVICE,
    NUM_CLASSES,
    PROCESS,
    assert_close,
    assert_same_gradients,
    batch_of,
    copied,
    decide_alike,
    draw,
    moved,
    undrawn,
)
from helpers.host_reads import host_reads, shown
from helpers.small_detectors import SMALL, build_pretext

LEVEL = 1 / 255 / min(STD)  # one of 256 levels, as a detector gets it


def build(config: DetectorConfig) -> BoxPretext:
    torch.manual_seed(0)
    num_classes = 3 if config.RECIPE.needs_clusters else 1
    return build_pretext(config.build(build_backbone(BackboneConfig(name="resnet18")), num_classes), config)


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_losses_and_gradients(family: str) -> None:
    reference = build(undrawn(family))
    reference.eval()  # dropout draws
    other = copied(reference)
    for ours, theirs in ((other.momentum, reference.momentum), (other.online, reference.online)):
        decide_alike(theirs, ours)
    samples = draw(family)
    views = [batch_of(samples, short_side, instance_offset=0) for short_side in (96, 120)]
    expected, their_numbers = reference(*views, with_health=True)
    found, our_numbers = other(*moved(views), with_health=True)
    assert_close(found, expected, 1e-4)
    # The rank counts directions near zero, too; whether a pair is a hit depends on last bits.
    assert_close(our_numbers, their_numbers, 1e-2)
    for losses in (expected, found):
        sum(losses.values()).backward()
    assert_same_gradients(other.online, reference.online, 1e-2)
    assert_same_gradients(other, reference, 1e-2)


# Waits of the host in the losses of two views of two images, with their gradients, as counted on a CPU; orphans make
# one more for each head. More images make more only where an R-CNN suppresses its proposals.
MOST_WAITS = {
    "cascade-mask-rcnn": 25,
    "cascade-rcnn": 25,
    "detr": 4,
    "faster-rcnn": 13,
    "fcos": 4,
    "htc": 25,
    "mask-rcnn": 13,
    "retinanet": 6,
}


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_the_host_waits_no_more_than_known(family: str) -> None:
    pretext = build(SMALL[family])
    place(pretext, PROCESS)
    views = moved([batch_of(draw(family), short_side, instance_offset=0) for short_side in (96, 120)])
    pretext(*views)
    found = host_reads(lambda: sum(pretext(*views)[0].values()).backward(), DEVICE)
    assert found.total() <= MOST_WAITS[family], shown(found)


def test_the_contrast_of_a_whole_batch() -> None:
    """As many boxes as a step of 16 images has: several blocks on a CPU, few on a GPU."""
    generator = torch.Generator().manual_seed(0)
    online, momentum = (normalize(torch.randn(n, 32, generator=generator), dim=1) for n in (4096, 8192))
    ids = [torch.randint(-1, 300, (len(of),), generator=generator) for of in (online, momentum)]
    ids[1][ids[1] == 7] = -1  # orphans
    inputs = [online.clone().requires_grad_(), moved(online).requires_grad_()]
    expected = contrastive_loss(inputs[0], ids[0], momentum, ids[1], temperature=0.5)
    found = contrastive_loss(inputs[1], moved(ids[0]), moved(momentum), moved(ids[1]), temperature=0.5)
    assert_close({"loss": found.loss} | found.shown(), {"loss": expected.loss} | expected.shown(), 1e-4)
    for contrast in (expected, found):
        contrast.loss.backward()
    torch.testing.assert_close(inputs[1].grad.cpu(), inputs[0].grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("colour", COLOUR_OPS)
def test_views(colour: ColourOp) -> None:
    samples = draw("mask-rcnn")
    params = [ViewParams(80, 150, flip=flip, colour=colour, magnitude=7) for flip in (False, True)]
    batch, targets = make_batch(samples, params, DEVICE, instance_offset=5)
    expected, their_targets = make_batch(samples, params, torch.device("cpu"), instance_offset=5)
    assert batch.sizes_hw == expected.sizes_hw and batch.pixels.device == DEVICE
    distance = (batch.pixels.cpu() - expected.pixels).abs() / LEVEL
    # A resized pixel may be a level off; where levels are few or spread, that is more, in few pixels.
    assert distance.mean() < 1 and (distance > 8).float().mean() < 0.02
    for ours, theirs in zip(targets, their_targets, strict=True):
        assert torch.equal(ours.boxes.cpu(), theirs.boxes) and torch.equal(ours.class_ids.cpu(), theirs.class_ids)
        assert torch.equal(ours.instance_ids.cpu(), theirs.instance_ids)
        assert (ours.masks.cpu() != theirs.masks).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("method", "family"), [("classes", "fcos"), ("detreg", "detr"), ("up-detr", "detr"), ("soco", "faster-rcnn")]
)
def test_other_methods(method: str, family: str) -> None:
    num_classes = NUM_CLASSES if method == "classes" else 1
    torch.manual_seed(0)
    views = copied(methods.build(method, family, num_classes=num_classes))
    samples = methods.draw_samples((4, 3), num_classes=num_classes)
    losses, shown = views(samples, 0)
    assert losses and all(loss.isfinite() and loss.device == DEVICE for loss in losses.values())
    assert all(value.isfinite() for value in shown.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in views.parameters() if p.requires_grad)
    views.after_step(0)
