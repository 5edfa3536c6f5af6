"""A network before and after pre-training, and its embeddings and boxes for images."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from aligndet_cli.artifacts.clusters import ClusterLabels
from aligndet_cli.backbones import find_backbone_weights
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.dataset import ImageSet, class_labels
from aligndet_cli.data.loaders import load_image
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, make_batch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import read_detector
from aligndet_cli.detectors.parts.two_stage import RCNN, refine_boxes
from aligndet_cli.detectors.results import rescale_boxes
from aligndet_cli.errors import AlignDetError, ConfigError
from aligndet_cli.plotting import COLOURS, shorten
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.methods.aligndet import build_pretext
from aligndet_cli.pretrain_box.pretext import BoxPretext, embed
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.placement import place
from aligndet_cli.workspace import Artifact, Workspace

NUM_CLASSES = 3  # as in figure 4
MAX_BOXES = 300  # per class; the paper takes 5000
MAX_IMAGES = 200
NUM_NEIGHBOURS = 5
NUM_CENTRES = 100  # per image


class Stages(NamedTuple):
    """A network before and after pre-training, in evaluation mode.

    Attributes:
        has_own_backbone: True if `before` has the backbone that pre-training started from; else it has `after`'s.
    """

    before: BoxPretext
    after: BoxPretext
    config: PretrainBoxConfig
    has_own_backbone: bool


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of labelled objects. N = objects, D = embedding size.

    Attributes:
        values: (N, D) of length 1.
        places: (N,) int64 positions in `classes`.
        sides: (N,) square roots of the areas of the objects in pixels.
        class_ids: of `classes`, which give them the colours that they have in other pictures.
    """

    values: NDArray[np.float32]
    places: NDArray[np.int64]
    sides: NDArray[np.float32]
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]

    @property
    def colours(self) -> list[str]:
        """Return a colour for each of `classes`."""
        return [COLOURS[class_id % len(COLOURS)] for class_id in self.class_ids]


def load_stages(run: Artifact, workspace: Workspace, device: str) -> Stages:
    """Build a `pretrain-box` run's network as its seed made it, and once more with its weights.

    Raises:
        ConfigError: the run was imported, made by another version, or by a method other than AlignDet's.
        WeightsError: its weights cannot be read.
    """
    try:
        config = PretrainBoxConfig.model_validate(run.config())
    except ValidationError:
        raise ConfigError(f"{run.folder}: imported or of another version, how it started is not known") from None
    if config.method != "aligndet":
        raise ConfigError(
            f"{run.folder}: made by the method {config.method}, and the figure shows AlignDet's embeddings"
        )
    content = read_detector(run.folder / "weights.pt")
    process, num_classes = Process(device=device), _num_classes(run, workspace)
    file = None
    try:
        found = find_backbone_weights(config.backbone, workspace, offline=True)
        has_own_backbone = found.content_hash == run.manifest["inputs"]["backbone weights"]
        file = found.file if has_own_backbone else None
    except AlignDetError:
        has_own_backbone = False
    before, after = (build_pretext(config, num_classes, weights) for weights in (file, None))
    for pretext in (before, after):
        place(pretext, process)
    after.online.load_state_dict(content.state_dict, strict=False)  # what the file leaves out is not used here
    after.projector.load_state_dict(content.extra["projector"])
    if not has_own_backbone:
        before.online.backbone.load_state_dict(after.online.backbone.state_dict())
    return Stages(before.eval(), after.eval(), config, has_own_backbone)


def _num_classes(run: Artifact, workspace: Workspace) -> int:
    """Return the number of classes that the network was built with; its first weights depend on it."""
    wanted = run.manifest["inputs"].get("clusters")
    fitting = [found for found in workspace.artifacts("cluster") if found.content_hash == wanted]
    return ClusterLabels(fitting[0].folder).num_clusters if fitting else 1


def objects_of(image_set: ImageSet) -> tuple[list[int], dict[int, list[int]]]:
    """Choose objects of the most frequent classes.

    Returns:
        ids of the classes, and rows of the objects in an image by index of the image.
    """
    counts = np.bincount(image_set.class_ids[~image_set.is_crowd], minlength=len(image_set.categories))
    chosen = [int(class_id) for class_id in np.argsort(-counts, kind="stable")[:NUM_CLASSES] if counts[class_id]]
    num_found = dict.fromkeys(chosen, 0)
    rows: dict[int, list[int]] = {}
    for index in range(len(image_set)):
        record = image_set.record(index)
        for row, (class_id, is_crowd) in enumerate(zip(record.class_ids.tolist(), record.is_crowd, strict=True)):
            if not is_crowd and num_found.get(class_id, MAX_BOXES) < MAX_BOXES:
                num_found[class_id] += 1
                rows.setdefault(index, []).append(row)
        if len(rows) == MAX_IMAGES or min(num_found.values(), default=MAX_BOXES) == MAX_BOXES:
            break
    return chosen, rows


@torch.no_grad()
def embed_objects(pretext: BoxPretext, config: PretrainBoxConfig, image_set: ImageSet, device: str) -> Embeddings:
    """Return the mean embedding of each labelled object over the candidates that the detector assigns to it.

    A cascade has embeddings from each head; these are the first one's.

    Source: figure 4, of which the paper says only that it shows features of the contrastive head.
    """
    classes, chosen = objects_of(image_set)
    values, places, sides = [], [], []
    for index, rows in chosen.items():
        record = image_set.record(index)
        boxes, class_ids = torch.from_numpy(record.boxes[rows]), torch.from_numpy(record.class_ids[rows])
        sample = Sample(0, index, load_image(image_set, index), boxes, torch.zeros_like(class_ids))
        view = ViewParams(max(config.views.short_side), config.views.long_side)
        images, targets = make_batch([sample], [view], torch.device(device), instance_offset=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # candidates are sampled
            found = pretext.online.box_candidates(pretext.online.extract(images), targets, with_losses=False)
        embeddings, ids = embed(pretext.projector, found)[0]
        is_object = ids >= 0
        sums = embeddings.new_zeros(len(rows), embeddings.shape[1])
        sums.index_add_(0, ids[is_object], embeddings[is_object])
        has_any = (torch.bincount(ids[is_object], minlength=len(rows)) > 0).cpu()
        values.append(normalize(sums, dim=1).cpu()[has_any])
        places += [classes.index(class_id) for class_id in class_ids[has_any].tolist()]
        sides.append(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()[has_any])
    labels = class_labels({category.category_id: shorten(category.name) for category in image_set.categories})
    names = tuple(labels[image_set.categories[class_id].category_id] for class_id in classes)
    return Embeddings(torch.cat(values).numpy(), np.array(places), torch.cat(sides).numpy(), names, tuple(classes))


def neighbour_share(embeddings: Embeddings) -> tuple[float, float]:
    """Return the share of an object's nearest neighbours that have its class, on average, and its value by chance.

    By chance, it is (n - 1) / (N - 1) for each object of a class with n of the N objects.
    """
    num_objects = len(embeddings.places)
    num_neighbours = min(NUM_NEIGHBOURS, num_objects - 1)
    similarity = embeddings.values @ embeddings.values.T
    np.fill_diagonal(similarity, -np.inf)
    places = embeddings.places
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :num_neighbours]
    share = (places[nearest] == places[:, None]).mean()
    counts = np.bincount(places)
    return float(share), float((counts * (counts - 1)).sum() / (num_objects * (num_objects - 1)))


def finds_without_classes(model: Detector) -> bool:
    """Return True if a detector tells objects from background before it knows any class, as those with an RPN do."""
    return isinstance(model, RCNN)


@torch.no_grad()
def class_free_centres(model: Detector, images: ImageBatch, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Return (N, 2) centres, x and y, of the boxes that the heads make from the RPN's 100 best ones in one image.

    Source: D.2 and figures 5 and 9, for Faster and Mask R-CNN.

    Args:
        size_hw: size of the original image, in whose pixels the centres are.
    """
    assert isinstance(model, RCNN)
    pyramid = model.pyramid(model.extract(images).maps)
    [proposals] = model.rpn.propose(
        model.rpn(pyramid.levels), images.sizes_hw, model.config.test_proposals_per_level, NUM_CENTRES
    )
    [boxes] = refine_boxes(model, pyramid, images.sizes_hw, [proposals])
    return centres_of(rescale_boxes(boxes, images.sizes_hw[0], size_hw))


def centres_of(boxes: Tensor) -> NDArray[np.float64]:
    """Return (N, 2) centres, x and y, of (N, 4) boxes."""
    return np.asarray(((boxes[:, :2] + boxes[:, 2:]) / 2).double().cpu().numpy())
