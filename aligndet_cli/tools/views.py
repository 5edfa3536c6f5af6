"""`aligndet views`: draw the first images as `pretrain-box` would train on them."""

from functools import partial
from pathlib import Path

from aligndet_cli.config import Sources, load_config
from aligndet_cli.data.loaders import SampleStream
from aligndet_cli.detectors.recipes import training_of_backbone
from aligndet_cli.driver import with_data
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import check_output_file
from aligndet_cli.pretrain_box.boxes import ProposalBoxes, open_proposal_data
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.pretrain_box.pictures import NUM_IMAGES, draw_first_views
from aligndet_cli.stage import find_stage
from aligndet_cli.training.recipe import REFERENCE_BATCH
from aligndet_cli.workspace import Workspace

MAX_IMAGES = 64


def write_views(sources: Sources, workspace: Workspace, file: Path | None = None, count: int | None = None) -> Path:
    """Write the views of the first images that `pretrain-box` with these settings trains on; return the file.

    The views depend on the batch size; `auto`, which only a run can resolve, is taken as the recipes' batch size.

    Args:
        sources: settings of `pretrain-box`.
        file: None: `views.jpg` in the workspace.
        count: number of images, at most 64; None: 4.

    Raises:
        ConfigError: settings that the method refuses, no proposals or those of other data, a wrong count, or a file
            that cannot be written.
        DataError: an image cannot be read.
    """
    config, _ = load_config(PretrainBoxConfig, "pretrain-box", sources)
    config = with_data(config, workspace, "pretrain-box", find_stage("pretrain-box"))
    METHODS[config.method].check(config)
    data = open_proposal_data(workspace, config.proposals, config.data)
    count = min(NUM_IMAGES, len(data.indices)) if count is None else count
    if not 1 <= count <= min(MAX_IMAGES, len(data.indices)):
        raise ConfigError(f"--count {count}: write a number from 1 to {min(MAX_IMAGES, len(data.indices))}")
    recipe = config.full_recipe(training_of_backbone(config.backbone))
    boxes = ProposalBoxes(data.store, data.rows, config.topk or recipe.topk)
    file = file or workspace.root / "views.jpg"
    if file.suffix not in (".jpg", ".jpeg"):
        raise ConfigError(f"--output {file}: name a .jpg file")
    check_output_file(file)
    draw_first_views(
        file,
        SampleStream(data.image_set, data.indices, boxes, config.on_error),
        partial(METHODS[config.method].show, config),
        seed=config.seed,
        batch_size=REFERENCE_BATCH if config.training.batch_size == "auto" else config.training.images_per_step,
        count=count,
    )
    return file
