#!/usr/bin/env bash
# Table 10: contrast, regression, or both? Faster R-CNN, ResNet-50.
#
#   examples/table10.sh            SMOKE=1 examples/table10.sh
#
# Needs COCO 2017. Costs about 275 GPU-hours (estimate), 160 of them for its own two rows; the others are those of
# table02.sh.
source "$(dirname "$0")/common.sh"
needs COCO

study "$table" <<EOF
data = "$coco"
detectors = ["faster-rcnn"]
$starts
[[starts]]
label = "contrast only"
pretrain-box = { tasks = "contrastive" }
[[starts]]
label = "regression only"
pretrain-box = { tasks = "regression" }
[settings.finetune]
$(schedule 90k)
EOF
report --metric AP,AP50,AP75,APs,APm,APl
