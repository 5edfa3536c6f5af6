"""The command `aligndet proposals`: help and flags."""

from aligndet_cli.flags import CONTROL, DATA, LAYOUTS, MACHINE, WORKERS, setting
from aligndet_cli.stage import Stage

STAGE = Stage(
    name="proposals",
    summary="Find boxes of possible objects in unlabelled images.",
    data=f"{LAYOUTS}, or any folder of images.",
    examples=(
        "aligndet proposals coco/",
        "aligndet proposals photos/ --mode quality --max-per-image 200",
        "aligndet proposals coco/ --import proposals.json",
    ),
    flags=(
        setting("--mode", "mode"),
        setting("--source", "source"),
        setting("--min-size", "min_size"),
        setting("--max-ratio", "max_ratio"),
        setting("--max-size", "max_size"),
        setting("--nms", "nms"),
        setting("--max-per-image", "max_per_image"),
        setting("--import", "import_file"),
        setting("--export", "export_file"),
        setting("--on-error", "on_error"),
        *DATA,
        *CONTROL,
        WORKERS,
        setting("--shard", "shard", MACHINE),
        setting("--backend", "backend", MACHINE),
        setting("--scheduler", "scheduler", MACHINE),
    ),
    remembers_data="always",
)
