"""What pre-training does to classes: how often an object's five nearest neighbours have its class, before and after.

    python tests/benchmarks/class_separation.py path/to/data -w workspace

Objects of the images that are measured on, by the features that the class branch ends in and by the embeddings that the
projector makes of them; for every run of `pretrain-box` with AlignDet's method in the workspace.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import normalize

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.tools.figures import pretrained
from aligndet_cli.workspace import Workspace


class Features(nn.Module):
    """In the place of a projector: the features themselves."""

    def forward(self, features: Tensor, _slots: Tensor) -> Tensor:
        """Return (S, C) features of length 1."""
        return normalize(features.float(), dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-w", "--workspace", type=Path, default=Path("workspace"))
    parser.add_argument("--classes", type=int, default=6, help="most frequent ones")
    parser.add_argument("--boxes", type=int, default=80, help="of each class at most")
    options = parser.parse_args(arguments)
    pretrained.NUM_CLASSES, pretrained.MAX_BOXES, pretrained.MAX_IMAGES = options.classes, options.boxes, 120
    workspace = Workspace(options.workspace)
    images = open_images(DataConfig(root=options.data), purpose="val", with_truths=True, index_dir=None)
    for run in workspace.artifacts("pretrain-box"):
        stages = pretrained.load_stages(run, workspace, "cpu")
        shown = []
        for time, pretext in (("before", stages.before), ("after", stages.after)):
            for kind, projector in (("embeddings", pretext.projector), ("features", Features())):
                pretext.add_module("projector", projector)
                objects = pretrained.embed_objects(pretext, stages.config, images, "cpu")
                share, chance = pretrained.neighbour_share(objects)
                shown.append(f"{kind} {time} {share:.1%}")
        print(f"{run.name}: {len(objects.places)} objects, by chance {chance:.1%}, {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
