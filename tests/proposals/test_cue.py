"""A backbone as a cue for the order of a search's boxes."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import mobilenet_v2

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.errors import AlignDetError
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage
from aligndet_cli.proposals.features import contrast_to_surroundings
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet

NUM_IMAGES = 7  # of `root`


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    torch.save(mobilenet_v2().state_dict(), file)
    return file


@pytest.fixture
def make_cued(make_search_config, weights: Path) -> Callable[..., stage.ProposalsConfig]:
    return lambda **settings: make_search_config(
        **{"cue_backbone": "mobilenet_v2", "cue_weights": str(weights), **settings}
    )


def run_stage(config: stage.ProposalsConfig, folder: Path) -> Path:
    plan = stage.prepare(config, Workspace(folder))
    with nullcontext() if plan.output.is_shared else plan.output.lock():
        stage.run(plan, Process())
    return plan.output.folder


def test_contrast_equals_a_loop_over_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 6, 8, generator=generator)
    boxes = torch.tensor([[2, 1, 4, 3], [0, 0, 2, 4], [4, 2, 8, 6], [3, 2, 5, 4]])  # whole cells, as their windows are
    centred = features - features.mean(dim=(1, 2), keepdim=True)
    directions = (centred / centred.norm(dim=0)).double()
    expected = []
    for x1, y1, x2, y2 in boxes.tolist():
        inside, around = torch.zeros(5).double(), torch.zeros(5).double()
        for y in range(6):
            for x in range(8):
                if x1 <= x < x2 and y1 <= y < y2:
                    inside += directions[:, y, x]
                elif abs(x + 0.5 - (x1 + x2) / 2) < x2 - x1 and abs(y + 0.5 - (y1 + y2) / 2) < y2 - y1:
                    around += directions[:, y, x]
        expected.append(1 - float(inside @ around / inside.norm() / around.norm()))
    found = contrast_to_surroundings(features, boxes / torch.tensor([8, 6, 8, 6]).double())
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_what_differs_from_its_surroundings_comes_first() -> None:
    features = torch.zeros(2, 12, 12)
    features[0] = 1
    features[:, 3:7, 4:9] = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    boxes = torch.tensor([[4, 3, 9, 7], [4, 3, 7, 7], [0, 0, 5, 5], [6, 6, 11, 11], [3, 2, 10, 8]]) / 12
    contrast = contrast_to_surroundings(features, boxes.double())
    assert contrast.argmax() == 0 and contrast[0] == pytest.approx(2)


def test_the_boxes_of_the_search_in_another_order(tmp_path: Path, make_search_config, make_cued) -> None:
    plain = ProposalStore(run_stage(make_search_config(), tmp_path / "work"))
    cued = ProposalStore(run_stage(make_cued(), tmp_path / "work"))
    best = ProposalStore(run_stage(make_cued(max_per_image=3, name="best"), tmp_path / "work"))
    num_moved = 0
    for index in range(NUM_IMAGES):
        ours, theirs = cued.boxes_of(index), plain.boxes_of(index)
        np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
        np.testing.assert_array_equal(best.boxes_of(index), ours[:3])
        num_moved += not np.array_equal(ours, theirs)
    assert num_moved >= NUM_IMAGES // 2


def test_bytes_do_not_depend_on_workers_or_shares(tmp_path: Path, make_cued, contents_of) -> None:
    one = contents_of(run_stage(make_cued(), tmp_path / "one"))
    assert contents_of(run_stage(make_cued(num_workers=3, backend="threads"), tmp_path / "threads")) == one
    assert contents_of(run_stage(make_cued(num_workers=2, backend="processes"), tmp_path / "processes")) == one
    for share in ("2/2", "1/2"):
        folder = run_stage(make_cued(shard=share), tmp_path / "shares")
    assert contents_of(folder) == one


def test_other_weights_are_other_proposals(tmp_path: Path, make_cued, weights: Path) -> None:
    folder = run_stage(make_cued(), tmp_path / "work")
    assert stage.prepare(make_cued(), Workspace(tmp_path / "work")).output.action == "complete"
    torch.save(mobilenet_v2().state_dict(), weights)
    with pytest.raises(AlignDetError, match=f"{folder.name}.*backbone"):
        stage.prepare(make_cued(), Workspace(tmp_path / "work"))


def test_names_of_folders_are_plain(make_cued) -> None:
    config = make_cued(cue_backbone="timm:convnext_atto", name=None)
    assert stage._default_name("train/2017", config) == "train-2017-timm-convnext_atto"
    assert (
        stage._default_name("***", make_cued(cue_backbone=None, from_run="retinanet", name=None)) == "images-retinanet"
    )


def test_unreadable_images_are_left_out(tmp_path: Path, root: Path, make_cued) -> None:
    (root / "train2017" / "003.png").write_bytes(b"nothing")
    store = ProposalStore(run_stage(make_cued(), tmp_path / "work"))
    assert len(store.image_ids) == NUM_IMAGES - 1 and store.total


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cue_backbone": "resnet19"}, "'resnet19' is not a choice (from --backbone); did you mean 'resnet18'"),
        ({"cue_weights": "none"}, "--backbone mobilenet_v2: the order of its features means nothing without trained"),
        ({"cue_weights": "auto"}, "--backbone mobilenet_v2: the order of its features means nothing without trained"),
        ({"cue_weights": "nowhere.pth"}, "nowhere.pth"),
        ({"cue_backbone": "resnet18"}, "resnet18"),  # whose weights they are not
        ({"cue_backbone": None}, "--backbone-weights: no effect without --backbone"),
        ({"source": "ground-truth", "mode": "fast", "min_size": 32}, "no effect with --source ground-truth"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, make_cued, settings: dict[str, object], said: str) -> None:
    with pytest.raises(AlignDetError) as raised:
        stage.prepare(make_cued(**settings), Workspace(tmp_path / "work"))
    assert said in str(raised.value)


def test_command(tmp_path: Path, root: Path, weights: Path) -> None:
    words = ["proposals", root, "-w", tmp_path / "work", "--backbone", "mobilenet_v2", "--backbone-weights", weights]
    shown = aligndet(*words, "--dry-run").stderr
    assert f"mobilenet_v2, weights {weights} (torchvision layout)" in shown
    assert "train2017-mobilenet_v2" in shown
