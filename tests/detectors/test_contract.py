"""Every detector family keeps the promises of detectors/interface.py."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.detectors.interface import BoxCandidates, Detector, Features
from aligndet_cli.training.placement import compile_parts
from helpers.small_detectors import SMALL

NUM_CLASSES = 3


class TinyBackbone(nn.Module):
    """Five strided convolutions: a ResNet's interface for a hundredth of its time."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 8, 16, 24, 32]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.channels = dict(zip(("c2", "c3", "c4", "c5"), widths[2:], strict=True))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = [pixels]
        for conv in self.convs:
            maps.append(conv(maps[-1]).relu())
        return dict(zip(self.channels, maps[2:], strict=True))

    def use_levels(self, levels: Sequence[str]) -> dict[str, int]:
        return {level: self.channels[level] for level in levels}


# 61 x 83 and 96 x 64 pixels in a 96 x 96 batch: nothing is square, nothing fits the stride
SIZES_HW = ((61, 83), (96, 64))


def make_images(seed: int = 0) -> ImageBatch:
    pixels = torch.zeros(len(SIZES_HW), 3, 96, 96)
    generator = torch.Generator().manual_seed(seed)
    for image, (height, width) in zip(pixels, SIZES_HW, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return ImageBatch(pixels, SIZES_HW)


def make_targets(counts: tuple[int, ...], seed: int = 0) -> list[BoxTargets]:
    """`counts[i]` random boxes of sides 16..48 in image i; instance ids start at 0 and run over the batch."""
    generator = torch.Generator().manual_seed(seed)
    targets, start = [], 0
    for count, (height, width) in zip(counts, SIZES_HW, strict=True):
        sides = 16 + 32 * torch.rand(count, 2, generator=generator)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        class_ids = torch.randint(NUM_CLASSES, (count,), generator=generator)
        targets.append(
            BoxTargets(torch.cat([corner, corner + sides], 1), class_ids, torch.arange(start, start + count))
        )
        start += count
    return targets


@pytest.fixture(params=sorted(DETECTORS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[family].build(TinyBackbone(), NUM_CLASSES)


def layers_of(predictor: nn.Module) -> list[nn.Module]:
    """The layer of a predictor, or those of the heads of a cascade."""
    return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]


def candidates(model: Detector, targets: list[BoxTargets], *, with_losses: bool = True) -> BoxCandidates:
    features = model.extract(make_images())
    return model.box_candidates(features, targets, with_losses=with_losses)


def test_the_backbone_is_shared_and_not_copied(family: str) -> None:
    backbone = TinyBackbone()
    assert SMALL[family].build(backbone, NUM_CLASSES).backbone is backbone


def test_features_carry_sizes(model: Detector) -> None:
    features = model.extract(make_images())
    assert (features.sizes_hw, features.batch_hw) == (SIZES_HW, (96, 96))
    sides = {"c2": 24, "c3": 12, "c4": 6, "c5": 3}  # of a 96 x 96 batch
    assert {name: tuple(of_level.shape[-2:]) for name, of_level in features.maps.items()} == {
        name: (sides[name], sides[name]) for name in features.maps
    }
    assert "c5" in features.maps
    first, second = features.split(1)
    assert (first.sizes_hw, second.sizes_hw) == (SIZES_HW[:1], SIZES_HW[1:])
    assert torch.equal(torch.cat([first.maps["c5"], second.maps["c5"]]), features.maps["c5"])


@pytest.mark.parametrize("counts", [(5, 3), (0, 3), (5, 0), (0, 0), (200, 113)])
def test_losses_are_finite_and_reach_every_trainable_parameter(model: nn.Module, counts: tuple[int, int]) -> None:
    losses = model(make_images(), make_targets(counts))
    assert all(name.startswith("loss_") and loss.shape == () for name, loss in losses.items())
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_class_ids_matter_to_the_class_loss_only(model: nn.Module) -> None:
    images, targets = make_images(), make_targets((5, 3))
    renamed = [BoxTargets(t.boxes, (t.class_ids + 1) % NUM_CLASSES) for t in targets]
    # The same scores everywhere: DETR's matching asks for the classes too, but then they favour no query.
    for layer in layers_of(model.class_predictor):
        nn.init.zeros_(layer.weight)
        nn.init.normal_(layer.bias)
    for name in set(model.class_modules) - {"class_predictor"}:
        for layer in layers_of(model.get_submodule(name)):
            nn.init.zeros_(layer.weight)  # the same box for every class
    model.eval()
    before, after = model(images, targets), model(images, renamed)
    assert before["loss_box_reg"].item() == after["loss_box_reg"].item()
    assert before["loss_cls"].item() != after["loss_cls"].item()


@pytest.mark.parametrize("counts", [(5, 3), (0, 3), (5, 0), (0, 0), (200, 113)])
def test_candidates_have_consistent_shapes_and_known_ids(model: Detector, counts: tuple[int, int]) -> None:
    found = candidates(model, make_targets(counts))
    num = len(found.features)
    assert found.features.shape == (num, model.feature_dim)
    assert found.slots.shape == found.instance_ids.shape == (num,)
    assert found.slots.dtype == found.instance_ids.dtype == torch.int64
    assert set(found.slots.tolist()) <= set(range(model.num_slots))
    assert set(found.instance_ids.tolist()) <= set(range(-1, sum(counts)))
    assert all(torch.isfinite(loss) for loss in found.losses.values())
    assert (found.instance_ids >= 0).any() == (sum(counts) > 0)


def test_more_than_256_instances_stay_apart(model: Detector) -> None:
    # The authors use id 256 as background, so the 257th proposal of a batch vanishes there (docs/differences.md 12).
    targets = [BoxTargets(t.boxes, t.class_ids, t.instance_ids + 200) for t in make_targets((60, 41))]
    ids = set(candidates(model, targets).instance_ids.tolist())
    assert 256 in ids and max(ids) > 280


def test_candidates_without_losses_have_none(model: Detector) -> None:
    assert candidates(model, make_targets((5, 3)), with_losses=False).losses == {}


@pytest.mark.parametrize("counts", [(5, 3), (0, 0)])
def test_pretext_reaches_all_but_the_class_predictor(family: str, model: nn.Module, counts: tuple[int, int]) -> None:
    model.backbone.requires_grad_(False)
    found = candidates(model, make_targets(counts))
    (found.features.square().sum() + sum(found.losses.values())).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    untrained = {*model.fresh_modules}
    if not SMALL[family].RECIPE.needs_clusters:  # which train it
        untrained.add("class_predictor")
    assert without == {n for n, _ in model.named_parameters() if n.partition(".")[0] in untrained}


def test_positives_of_an_image_do_not_depend_on_the_other_image(model: Detector) -> None:
    images, targets = make_images(), make_targets((5, 3))
    both = candidates(model, targets, with_losses=False)
    features = model.extract(ImageBatch(images.pixels[1:], SIZES_HW[1:]))
    alone = model.box_candidates(features, targets[1:], with_losses=False)
    in_both, in_alone = both.instance_ids >= 5, alone.instance_ids >= 0  # ids 5..7 are the second image's
    assert in_alone.any()
    assert torch.equal(both.instance_ids[in_both], alone.instance_ids[in_alone])
    torch.testing.assert_close(both.features[in_both], alone.features[in_alone], rtol=1e-4, atol=1e-6)


def test_ids_agree_across_views_after_one_view_loses_a_box(model: Detector) -> None:
    whole = make_targets((5, 3))
    kept = [t if i else BoxTargets(t.boxes[1:], t.class_ids[1:], t.instance_ids[1:]) for i, t in enumerate(whole)]
    ids = {i for i in candidates(model, kept).instance_ids.tolist() if i >= 0}
    assert ids == {1, 2, 3, 4, 5, 6, 7}


def test_sampling_follows_the_seed(family: str, model: Detector) -> None:
    def draw(seed: int) -> BoxCandidates:
        torch.manual_seed(seed)
        return candidates(model, make_targets((5, 3)))

    model.eval()
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first.features, again.features) and torch.equal(first.slots, again.slots)
    assert first.losses == again.losses
    # Faster and Mask R-CNN draw anchors for a loss, and use all candidates; DETR draws nothing, and cascades as much as
    # in fine-tuning, which is all here
    is_drawn = any(name.startswith("pretext") for name in type(SMALL[family]).model_fields)
    assert is_drawn == (not torch.equal(first.features, other.features) or first.losses != other.losses)


def test_detections_are_sorted_clipped_and_limited(model: Detector) -> None:
    model.eval()
    for layer in layers_of(model.class_predictor):
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)  # scores around 0.5, well above the threshold
    for found, (height, width) in zip(model.detect(make_images()), SIZES_HW, strict=True):
        assert 0 < len(found.boxes) <= 100
        assert found.boxes.shape == (len(found.scores), 4) and found.class_ids.shape == found.scores.shape
        assert (found.scores.diff() <= 0).all() and (found.scores <= 1).all() and (found.scores > 0).all()
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert ((found.class_ids >= 0) & (found.class_ids < NUM_CLASSES)).all()
        assert not found.boxes.requires_grad


def test_detect_returns_empty_tensors_where_nothing_is_found(model: Detector) -> None:
    model.eval()
    for layer in layers_of(model.class_predictor):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, -20.0)
        if len(layer.bias) % NUM_CLASSES:
            nn.init.constant_(layer.bias[-1:], 20.0)  # background is an output of its own
    for found in model.detect(make_images()):
        assert found.boxes.shape == (0, 4) and found.scores.shape == found.class_ids.shape == (0,)


def test_training_mode_does_not_change_what_is_returned(model: Detector) -> None:
    images, targets = make_images(), make_targets((5, 3))
    for mode in (True, False):
        model.train(mode)
        assert set(model(images, targets)) >= {"loss_cls", "loss_box_reg"}
        assert len(model.detect(images)) == len(SIZES_HW)
        assert isinstance(candidates(model, targets), BoxCandidates)


def with_channels_last(model: nn.Module, images: ImageBatch) -> ImageBatch:
    model.to(memory_format=torch.channels_last)
    return ImageBatch(images.pixels.contiguous(memory_format=torch.channels_last), images.sizes_hw)


def with_bf16(model: nn.Module, images: ImageBatch) -> ImageBatch:
    return images


@pytest.mark.parametrize(("prepare", "autocast", "rtol"), [(with_channels_last, False, 1e-4), (with_bf16, True, 0.05)])
def test_losses_hold_in_other_layouts_and_precisions(
    model: nn.Module, prepare: Callable[[nn.Module, ImageBatch], ImageBatch], autocast: bool, rtol: float
) -> None:
    images, targets = make_images(), make_targets((5, 3))
    model.eval()
    plain = copy.deepcopy(model)
    expected = {**plain(images, targets), **candidates(plain, targets).losses}
    images = prepare(model, images)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses: dict[str, Tensor] = {**model(images, targets)}
        features: Features = model.extract(images)
        losses |= model.box_candidates(features, targets, with_losses=True).losses
        model.detect(images)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=rtol, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it
def test_each_network_is_one_graph(family: str, model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--compile` compiles has no place at which it would fall apart, and is not given up."""
    images, targets = make_images(), make_targets((5, 3))
    model.eval()
    torch.manual_seed(0)  # of the sampling
    expected = {**model(images, targets), **candidates(model, targets).losses}
    names = {module: name for name, module in model.named_modules()}
    num_calls = Counter[str]()

    def counted(name: str, graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            num_calls[name] += 1
            return graph.forward(*arguments)

        return call

    def compile_whole(network: nn.Module, **settings: object) -> None:
        whole = torch.compile(network._call_impl, **settings, fullgraph=True, backend=partial(counted, names[network]))
        network._compiled_call_impl = whole

    monkeypatch.setattr(nn.Module, "compile", compile_whole)
    with torch._dynamo.config.patch(recompile_limit=8):  # and back
        compile_parts([model], RuntimeConfig(compile=True))
        torch.manual_seed(0)
        found = {**model(images, targets), **candidates(model, targets).losses}
    assert all(torch.equal(found[name], loss) for name, loss in expected.items())
    sum(found.values()).backward()
    convolved = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.grad is not None
    }
    # The weights of a mask predictor and of attention are used without calling it.
    alone = {name for name in convolved if not any(name.startswith(part) for part in num_calls)}
    assert alone <= {"mask_predictor", "mask_predictor.0", "mask_predictor.1", "mask_predictor.2"}
