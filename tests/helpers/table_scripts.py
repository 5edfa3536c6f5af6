"""What the tests of the scripts in examples/ share: running them, for real or with an `aligndet` that does nothing."""

import os
import subprocess
import sys
from pathlib import Path

from aligndet_cli.files import write_json
from aligndet_cli.tools.study.plan import StageRun, plan_runs
from aligndet_cli.tools.study.spec import load_study
from aligndet_cli.workspace import Workspace
from helpers.commandline import environment

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = ("common.sh", "effect.sh")  # sourced by others; hours long at its smallest, and a study like the rest
SCRIPTS = sorted(file.name for file in EXAMPLES.glob("*.sh") if file.name not in SHARED)
TABLES = [name for name in SCRIPTS if name.startswith("table")]
OTHERS = [name for name in SCRIPTS if name not in TABLES and name != "figures.sh"]
NUM_COCO, NUM_VOC = (118_287, 5_000), (16_551, 4_952)  # images to train on and to measure
NUM_BOXES = 123_456  # of the pre-training run that the pretended command has made
# Weights that the scripts ask for, by the variable that names them.
FILES = {
    "MOCO": "moco_v2_800ep_pretrain.pth.tar",
    "PIXPRO": "pixpro_base_r50_400ep_md5_919c6612.pth",
    "SWAV": "swav_800ep_pretrain.pth.tar",
    "SIMMIM": "simmim_pretrain__swin_base__img192_window6__800ep.pth",
    "SWIN_B": "swin_base_patch4_window7_224_22k.pth",
    "SWIN_L": "swin_large_patch4_window7_224_22k.pth",
    "DENSECL": "densecl_r50_imagenet_200ep.pth",
    "DETCO": "detco_200ep.pth",
    "SLOTCON": "slotcon_coco_r50_800ep.pth",
    "SOCO": "soco_imagenet_400ep.pth",
    "SOCO_COCO": "soco_coco_530ep.pth",
    "UP_DETR": "up_detr_imagenet_60ep.pth",
    "DETREG": "checkpoint_imagenet_detr.pth",
}
# In the place of `aligndet`: runs nothing, and says that all is complete. What it should import is written down.
PRETENDED = """\
#!/bin/sh
case "$*" in *--dry-run) printf 'complete     pretrain-box/one\\ncomplete     finetune/one\\n' ;; esac
case "$*" in *--costs*--json) echo '{"rows": [{"cost": {"hours": 1.5}, "tuning_cost": {"hours": null}}]}' ;; esac
if [ "$1" = import-weights ]; then
  mkdir -p "workspace/pretrain-box/$4"
  : > "workspace/pretrain-box/$4/weights.pt"
  echo "$2 $4" >> imported.txt
fi
"""


def pretend(folder: Path) -> None:
    """Write an `aligndet` that does nothing, and what it claims to have made."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "aligndet"
    command.write_text(PRETENDED)
    command.chmod(0o755)
    for stage in ("pretrain-box", "finetune"):
        result = {"boxes": NUM_BOXES, "images": 1, "steps": 1, "trained_parameters": 1}
        times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T01:30:00+00:00"}
        made = folder / "workspace" / stage / "one"
        made.mkdir(parents=True)
        write_json(made / "manifest.json", {"stage": stage, "result": result, **times})


def start(script: str, *words: str, cwd: Path, programs: Path, smoke: str = "1") -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = environment(PATH=path, SMOKE=smoke)
    for name in ("COCO", "VOC", "IMAGENET", "ALIGNDET_WORKSPACE", *FILES):
        variables.pop(name, None)
    command = ["bash", str(EXAMPLES / script), *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def run(script: str, *words: str, cwd: Path, programs: Path, smoke: str = "1") -> str:
    """What a script printed; it must succeed."""
    done = start(script, *words, cwd=cwd, programs=programs, smoke=smoke)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "not drawn" not in done.stderr
    return done.stdout


def studies_of(script: str, cwd: Path, workspace: str = "workspace") -> list[list[StageRun]]:
    """The runs of the studies that a script has written, to be made in a workspace."""
    files = sorted((cwd / "workspace" / "studies").glob(f"{Path(script).stem}*.toml"))
    assert files
    return [plan_runs(load_study(file), Workspace(cwd / workspace)) for file in files]
