#!/usr/bin/env bash
# All methods of `pretrain-box --method` side by side: the same images, backbone, schedules and seeds, and what each costs.
#
#   examples/methods.sh DATA [backbone weights]            SMOKE=1 examples/methods.sh DATA
#
# DATA: any labelled data set (COCO, VOC or YOLO root), whose training images are the images without labels, too. SoCo
# trains box heads, UP-DETR and DETReg are for DETR, so there are two studies: Faster R-CNN and DETR. SEEDS (0, 1, 2),
# PRETRAIN and FINETUNE (1x and 1x; 12 epochs) are what every row has. One table comes out: gains over the backbone alone,
# images seen and hours of each pre-training. Runs that are complete are skipped.
source "$(dirname "$0")/common.sh"
data=$(realpath "$1")
[[ -n "${SMOKE:-}" ]] || weights=${2:-$weights}
seeds=$(pick "${SEEDS:-0, 1, 2}" 0)

compare() { # DETECTOR METHODS...: a start for each
  study "$table-$1" <<EOF
data = "$data"
detectors = ["$1"]
seeds = [$seeds]
$plain
$(for method in "${@:2}"; do start_of "$method"; done)
[settings.finetune]
$(schedule "${FINETUNE:-1x}")
EOF
}

start_of() { # METHOD: its settings; square views have no long side
  local more=''
  [[ $1 != soco ]] || more=', "views.short_side" = ['$(pick 224 64)'], "views.long_side" = 1333'
  printf '[[starts]]\nlabel = "%s"\npretrain-box = { method = "%s", %s%s }\n' \
    "$1" "$1" "$(schedule "${PRETRAIN:-1x}")" "$more"
}

compare faster-rcnn aligndet classes soco
compare detr aligndet classes detreg up-detr
report --costs
