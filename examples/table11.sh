#!/usr/bin/env bash
# Table 11: should the backbone be frozen while the boxes are learnt? RetinaNet, ResNet-50.
#
#   examples/table11.sh            SMOKE=1 examples/table11.sh
#
# Needs COCO 2017. Costs about 240 GPU-hours (estimate), 125 of them for its own row, which trains the backbone, too.
source "$(dirname "$0")/common.sh"
needs COCO

study "$table" <<EOF
data = "$coco"
detectors = ["retinanet"]
$starts
[[starts]]
label = "backbone not frozen"
pretrain-box = { freeze_backbone = false }
[settings.finetune]
$(schedule 90k)
EOF
report --metric AP,AP50,AP75,APs,APm,APl
