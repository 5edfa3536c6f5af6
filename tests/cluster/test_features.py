"""Features of proposals: right pixels, right rows, and the same for any number of processes."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from aligndet_cli.artifacts.open import open_proposals
from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.cluster import features
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.cluster.features import ProposalImages, find_places, pool_boxes, scale_boxes, write_features
from aligndet_cli.cluster.rows import DoneMarks, RowFile, Watch
from aligndet_cli.data.images import read_image
from aligndet_cli.errors import RunError
from aligndet_cli.logs import Progress
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.signals import StopSignal


class Pixels(nn.Module):
    """A "backbone" whose map is the image itself, undone from its normalisation, at full resolution."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return {"c5": pixels * std.view(3, 1, 1) + mean.view(3, 1, 1)}


def silent() -> Watch:
    return Watch(Progress("test", 1, mode="none"), StopSignal())


def open_source(workspace, batch_size=2):
    store, images, _ = open_proposals(workspace)
    return ProposalImages(images, store, find_places(store, images), batch_size)


def extract(source, folder, backbone, channels, ranks=((0, 1),), **settings):
    rows = RowFile(folder / "features.f16", "<f2", source.store.total, channels)
    marks = DoneMarks(folder / "features.done", source.num_batches)
    rows.create()
    marks.create()
    runtime = {"num_workers": 0, "precision": "32-true"}
    config = ClusterConfig.model_validate({"short_side": 71, "long_side": 999, "runtime": runtime, **settings})
    for rank, world_size in ranks:
        process = Process(rank=rank, world_size=world_size)
        write_features(backbone, source, rows, marks, config, process, silent())
    assert marks.read().all()
    return rows


def test_places_skip_images_without_boxes(make_workspace):
    source = open_source(make_workspace())
    # NUM_BOXES = (0, 3, 7, 0, 0, 2, 5, 1, 0): images 1, 2, 5, 6 and 7 have boxes
    assert source.places.tolist() == [[1, 1], [2, 2], [5, 5], [6, 6], [7, 7]]
    assert [source.rows_of(index) for index in range(source.num_batches)] == [(0, 10), (10, 17), (17, 18)]


def test_rows_are_the_mean_colour_of_their_boxes(make_workspace, tmp_path):
    source = open_source(make_workspace())
    # Twice the size, so boxes have to be scaled; scaled by 2, bilinear pooling still averages the inside of a box.
    rows = extract(source, tmp_path, Pixels(), 3, short_side=1000, long_side=2000).read(0, 18)
    for in_store, in_images in source.places.tolist():
        image = read_image(source.images.record(in_images).path) / 255
        first = int(source.store.offsets[in_store])
        for row, (x1, y1, x2, y2) in enumerate(source.store.boxes_of(in_store).astype(int).tolist(), start=first):
            expected = image[y1:y2, x1:x2].mean(axis=(0, 1))
            np.testing.assert_allclose(rows[row].astype(float), expected, atol=0.03)


def test_any_number_of_processes_gives_the_same_rows(make_workspace, tmp_path):
    source = open_source(make_workspace())
    folders = [tmp_path / name for name in ("one", "three")]
    for folder in folders:
        folder.mkdir()
    extract(source, folders[0], Pixels(), 3)
    extract(source, folders[1], Pixels(), 3, ranks=((2, 3), (0, 3), (1, 3)))
    one, three = ((folder / "features.f16").read_bytes() for folder in folders)
    assert one == three


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_cpu_that_takes_few_images_at_a_time_makes_the_same_rows(
    make_workspace, tmp_path, monkeypatch, name, precision
):
    source = open_source(make_workspace(), batch_size=3)
    backbone = build_backbone(BackboneConfig.model_validate({"name": name})).eval()
    sizes, found = [], []
    backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for pixels in (features._CPU_PIXELS, 1):
        monkeypatch.setattr(features, "_CPU_PIXELS", pixels)
        folder = tmp_path / str(pixels)
        folder.mkdir()
        runtime = {"num_workers": 0, "precision": precision}
        found.append(extract(source, folder, backbone, backbone.channels["c5"], runtime=runtime).read(0, 18))
    assert sizes == [3, 2, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=1e-6)  # but for the last bit


def test_pooling_is_the_mean_of_a_7x7_roi_align():
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 5, 11, 13, generator=generator)
    boxes = [torch.tensor([[3.0, 5.0, 100.0, 77.0], [0.0, 0.0, 32.0, 32.0]]), torch.tensor([[10.0, 0.0, 400.0, 352.0]])]
    expected = roi_align(feature_map, boxes, 7, spatial_scale=1 / 32, sampling_ratio=2, aligned=True).mean(dim=(2, 3))
    torch.testing.assert_close(pool_boxes(feature_map, boxes, (352, 416)), expected, rtol=1e-5, atol=1e-6)


def test_features_that_are_not_finite(make_workspace, tmp_path):
    class Broken(nn.Module):
        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"c5": pixels * float("nan")}

    with pytest.raises(RunError, match="not finite"):
        extract(open_source(make_workspace()), tmp_path, Broken(), 3)


def test_boxes_follow_each_axis_of_the_resize():
    # 100 x 40 (h x w) becomes 50 x 80: y halves, x doubles
    boxes = np.array([[1, 10, 5, 100]], np.float32)
    assert scale_boxes(boxes, (100, 40), (50, 80)).tolist() == [[2, 5, 10, 50]]
