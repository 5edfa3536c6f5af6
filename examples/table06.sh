#!/usr/bin/env bash
# Table 6: DETR for 150 epochs, on a supervised backbone and on SwAV's.
#
#   SWAV=FILE examples/table06.sh            SMOKE=1 examples/table06.sh
#
# Needs COCO 2017 and SwAV's published ResNet-50; without the file its rows are skipped.
# Costs about 2,100 GPU-hours (estimate): 190 for each pre-training, 440 for each fine-tuning.
# Left out: UP-DETR and DETReg, which are other methods.
source "$(dirname "$0")/common.sh"
needs COCO

run() { # NAME
  study "$table-$1" <<EOF
data = "$coco"
detectors = ["detr"]
$starts
[settings.finetune]
$(schedule 150e)
[settings.pretrain-box]
"training.batch_size" = $(pick 64 2)
EOF
}

run supervised
if weights=$(weights_of SwAV "${SWAV:-swav_800ep_pretrain.pth.tar}"); then run swav; fi
report
