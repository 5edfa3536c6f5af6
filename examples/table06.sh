#!/usr/bin/env bash
# Table 6: DETR for 150 epochs, on a supervised backbone and on SwAV's, and after other methods' pre-training.
#
#   SWAV=FILE UP_DETR=FILE DETREG=FILE examples/table06.sh            SMOKE=1 examples/table06.sh
#
# Needs COCO 2017, SwAV's published ResNet-50, and the pre-training that UP-DETR and DETReg publish; without a file its
# rows are skipped. The paper's row of DETReg is one that its authors trained for 50 epochs on COCO, with norms last; here
# `pretrain-box --method detreg` does. Beside the published one (norms first, 60 epochs of ImageNet) there is no number.
# Costs about 3,600 GPU-hours (estimate): 190 for each pre-training, 440 for each fine-tuning.
source "$(dirname "$0")/common.sh"
needs COCO

run() { # NAME [STARTS]
  study "$table-$1" <<EOF
data = "$coco"
detectors = ["detr"]
${2:-$starts}
[settings.finetune]
$(schedule 150e)
[settings.pretrain-box]
"training.batch_size" = $(pick 64 2)
EOF
}

pretrained() { # NAME FILE LABEL
  import_weights "$1" "$2" || return 0
  run "$1" "$(printf '[[starts]]\nlabel = "%s"\ninit = "%s"' "$3" "$init")"
}

run supervised
pretrained up-detr "${UP_DETR:-up_detr_imagenet_60ep.pth}" "UP-DETR"
pretrained detreg "${DETREG:-checkpoint_imagenet_detr.pth}" "DETReg, ImageNet"
detreg='[[starts]]
label = "DETReg, COCO"
pretrain-box = { method = "detreg", "training.batch_size" = '$(pick 192 2)' }'
if weights=$(weights_of SwAV "${SWAV:-swav_800ep_pretrain.pth.tar}"); then run swav "$starts"$'\n'"$detreg"; fi
report
