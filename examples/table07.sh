#!/usr/bin/env bash
# Table 7: longer fine-tuning does not replace pre-training. Mask R-CNN, ResNet-50.
#
#   examples/table07.sh            SMOKE=1 examples/table07.sh
#
# Needs COCO 2017 with masks. Costs about 500 GPU-hours (estimate); the rows of 1x are those of table02.sh.
source "$(dirname "$0")/common.sh"
needs COCO

for schedule in $(pick "90k 2x" 2x); do
  study "$table-$schedule" <<EOF
data = "$coco"
detectors = ["mask-rcnn"]
$starts
[settings.finetune]
$(schedule "$schedule")
EOF
done
for schedule in $(pick "3x 4x" 4x); do
  study "$table-$schedule" <<EOF
data = "$coco"
detectors = ["mask-rcnn"]
$plain
[settings.finetune]
$(schedule "$schedule")
EOF
done
report --metric AP,AP50,AP75,mask_AP,mask_AP50,mask_AP75
