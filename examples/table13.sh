#!/usr/bin/env bash
# Table 13: does longer pre-training help? RetinaNet, ResNet-50.
#
#   examples/table13.sh            SMOKE=1 examples/table13.sh
#
# Needs COCO 2017. Costs about 410 GPU-hours (estimate), 295 of them for 2x and 3x; the other rows are those of
# table02.sh.
source "$(dirname "$0")/common.sh"
needs COCO

study "$table" <<EOF
data = "$coco"
detectors = ["retinanet"]
$starts
[[starts]]
label = "AlignDet 2x"
pretrain-box = { $(schedule 2x) }
[[starts]]
label = "AlignDet 3x"
pretrain-box = { $(schedule $(pick 3x 4x)) }
[settings.finetune]
$(schedule 90k)
EOF
report --metric AP,AP50,AP75,APs,APm,APl
