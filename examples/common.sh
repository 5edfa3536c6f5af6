# What the scripts of the paper's tables share. Sourced by them, not run.
#
# Data sets, by environment variable or as links in the current folder: COCO (coco), VOC (VOCdevkit, with both years),
# IMAGENET (imagenet/train, one folder per class). ALIGNDET_WORKSPACE (workspace) keeps all runs: those that several
# tables need are made once, and a script that was interrupted goes on when it is run again.
#
# Costs named by the scripts are estimates in hours of one A100, from table 12 of the paper (FCOS on eight of them):
# 45 for a pre-training, 35 for 90k iterations or 12 epochs of fine-tuning, 5 for 12k.
#
# SMOKE=1 runs a script in a minute on a CPU: drawn pictures of 64 pixels, slim models, random backbone weights in the
# published layouts, one or two steps. The numbers mean nothing then.
set -euo pipefail

table=$(basename "$0" .sh)
workspace=${ALIGNDET_WORKSPACE:-workspace}
studies=()
coco=$(realpath -m "${COCO:-coco}")
voc=$(realpath -m "${VOC:-VOCdevkit}")
imagenet=$(realpath -m "${IMAGENET:-imagenet}")
backbone=${BACKBONE:-resnet50}
weights=IMAGENET1K_V1
plain='[[starts]]
label = "backbone only"
init = "backbone"'
starts="$plain
[[starts]]
label = \"AlignDet\""

# Ends the script where a data set is missing: needs COCO VOC IMAGENET.
needs() {
  local name folder
  for name in "$@"; do
    folder=${name,,}
    if [[ ! -d "${!folder}" ]]; then
      echo "$table: no folder ${!folder}; name the data set by $name=FOLDER" >&2
      exit 3
    fi
  done
}

# pick FULL SMALL: the first word at full scale, the second with SMOKE=1.
pick() { if [[ -n "${SMOKE:-}" ]]; then echo "$2"; else echo "$1"; fi; }

# A schedule as a setting; with SMOKE=1 one step, or two of the longer ones.
schedule() {
  case $1 in 2x | 3x | 100e) steps=2 ;; 4x) steps=3 ;; *) steps=1 ;; esac
  pick "\"training.schedule\" = \"$1\"" "\"training.steps\" = $steps"
}

# Path of a file of backbone weights; where it is missing, says so and fails.
weights_of() {
  if [[ ! -e "$2" ]]; then
    echo "$table: skipped $1: no file $2" >&2
    return 1
  fi
  realpath "$2"
}

# import_weights NAME FILE: make a run of a detector that others have pre-trained, with its weights in $init; where the
# file is missing, say so and fail.
import_weights() {
  local file
  file=$(weights_of "$1" "$2") || return 1
  aligndet import-weights "$file" --name "$table-$1" > /dev/null || exit
  init=$(realpath "$workspace/pretrain-box/$table-$1/weights.pt")
}

# study NAME < TOML: run it, with the backbone and what SMOKE=1 makes small added.
study() {
  local file="$workspace/studies/$1.toml"
  mkdir -p "$workspace/studies"
  {
    printf 'name = "%s"\n' "$1"
    cat
    printf '[settings.common]\n"backbone.name" = "%s"\n"backbone.weights" = "%s"\n' "$backbone" "$weights"
    if [[ -n "${SMOKE:-}" ]]; then cat "$(dirname "$0")/smoke_settings.toml"; fi
  } > "$file"
  aligndet study "$file" > /dev/null # its table is a part of the report
  studies+=(--study "$file")
}

# Complete runs of a stage in the latest study, in its order.
runs_of() { aligndet study "${studies[-1]}" --dry-run | sed -n "s|^complete *$1/||p"; }

# All studies of the script together, ours beside the paper's numbers.
report() {
  if ((${#studies[@]} == 0)); then
    echo "$table: all was skipped" >&2
    exit 3
  fi
  aligndet report "${studies[@]}" "$@"
}

# Drawn pictures in the place of all data sets, and weights as they are published.
if [[ -n "${SMOKE:-}" ]]; then
  mkdir -p "$workspace"
  smoke=$(realpath "$workspace")/smoke
  if [[ ! -e "$smoke" ]]; then
    rm -rf "$smoke.new"
    aligndet toy "$smoke.new/toy" --train 11 --val 5 > /dev/null
    aligndet toy "$smoke.new/objects" --objects --train 15 --val 5 > /dev/null
    python3 "$(dirname "$0")/smoke_weights.py" "$smoke.new"
    mv "$smoke.new" "$smoke"
  fi
  coco=$smoke/toy voc=$smoke/toy imagenet=$smoke/objects
  backbone=resnet18
  weights=$smoke/imagenet.pt
  MOCO=$smoke/moco.pt PIXPRO=$smoke/pixpro.pt SWAV=$smoke/swav.pt SIMMIM=$smoke/simmim.pt SWIN_B=$smoke/swin_t.pt
  DENSECL=$smoke/densecl.pt DETCO=$smoke/detco.pt SLOTCON=$smoke/slotcon.pt
  SWIN_L=$smoke/swin_t.pt SOCO=$smoke/soco.pt SOCO_COCO=$smoke/soco_coco.pt
  UP_DETR=$smoke/up_detr.pt DETREG=$smoke/detreg.pt
fi
