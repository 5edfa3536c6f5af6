from pathlib import Path

import pytest
import torch
from torchvision.models import mobilenet_v2


@pytest.fixture(scope="session")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a MobileNet v2 with its classifier, as torchvision's file has them."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "mobilenet_v2-b0353104.pth"
    torch.save(mobilenet_v2().state_dict(), file)
    return file
