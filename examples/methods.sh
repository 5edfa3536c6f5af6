#!/usr/bin/env bash
# All methods of `pretrain-box --method` side by side: the same images, backbone, schedules and seeds, and what each costs.
#
#   examples/methods.sh DATA [backbone weights]            SMOKE=1 examples/methods.sh DATA
#   SMALL=1 BACKBONE=mobilenet_v2 examples/methods.sh DATA WEIGHTS
#
# DATA: any labelled data set (COCO, VOC or YOLO root), whose training images are the images without labels, too. SoCo
# trains box heads, UP-DETR and DETReg are for DETR, so there are two DETECTORS (faster-rcnn detr). SEEDS (0, 1, 2), FRACTIONS
# of the labels (100; SMALL: 10), PRETRAIN and FINETUNE (1x and 1x; 12 epochs) are what every row has. One table comes out:
# gains over the backbone alone, images seen and hours of each pre-training. Runs that are complete are skipped. SMALL=1 is
# for a CPU core and two hours: slim detectors on small images (methods-small.toml), few steps and labels, and rates for them;
# what came out is in methods.md.
source "$(dirname "$0")/common.sh"
data=$(realpath "$1")
[[ -n "${SMOKE:-}" ]] || weights=${2:-$weights}
[[ ! -e "$weights" ]] || weights=$(realpath "$weights")
seeds=$(pick "${SEEDS:-0, 1, 2}" 0)
fractions=${FRACTIONS:-${SMALL:+10}}
small=${SMALL:+"extends = \"$(realpath "$(dirname "$0")")/methods-small.toml\""}
# SMALL's rates: those of the recipes are for batches of 256 and more, and for days.
declare -A rates=([faster-rcnn]=0.03 [detr]=3e-4 [soco]=0.1)
declare -A methods=([faster-rcnn]="aligndet classes soco" [detr]="aligndet classes detreg up-detr")
detectors=${DETECTORS:-faster-rcnn detr}

start_of() { # DETECTOR METHOD: its settings
  local side settings
  settings=$([[ -n "$small" ]] && echo "\"training.lr\" = ${rates[$2]:-${rates[$1]}}" || schedule "${PRETRAIN:-1x}")
  side=$([[ -n "$small" ]] && echo 160 || pick 224 64)
  [[ $2 != soco ]] || settings+=", \"views.short_side\" = [$side]"
  printf '[[starts]]\nlabel = "%s"\ndetectors = ["%s"]\npretrain-box = { method = "%s", %s }\n' "$2" "$1" "$2" "$settings"
}

study "$table" <<EOF
$small
data = "$data"
detectors = ["${detectors// /\", \"}"]
fractions = [${fractions:-100}]
seeds = [$seeds]
$plain
$(for detector in $detectors; do for method in ${methods[$detector]}; do start_of "$detector" "$method"; done; done)
$([[ -n "$small" ]] || printf '[settings.finetune]\n%s' "$(schedule "${FINETUNE:-1x}")")
EOF
report --costs
