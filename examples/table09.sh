#!/usr/bin/env bash
# Table 9: which of the pre-trained modules help? Faster R-CNN, ResNet-50.
#
#   examples/table09.sh            SMOKE=1 examples/table09.sh
#
# Needs COCO 2017. Costs about 220 GPU-hours (estimate), 105 of them for its own three rows; the first and the last are
# those of table02.sh, and all of them share one pre-training.
source "$(dirname "$0")/common.sh"
needs COCO

study "$table" <<EOF
data = "$coco"
detectors = ["faster-rcnn"]
$starts
[[starts]]
label = "neck"
finetune = { load_modules = ["backbone", "neck"] }
[[starts]]
label = "neck and RPN"
finetune = { load_modules = ["backbone", "neck", "rpn"] }
[[starts]]
label = "neck and head"
finetune = { load_modules = ["backbone", "neck", "head"] }
[settings.finetune]
$(schedule 90k)
EOF
report --metric AP,AP50,AP75,APs,APm,APl
