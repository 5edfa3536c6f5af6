#!/usr/bin/env bash
# Table 5: on self-supervised ResNet-50s. Their recipes (rates, norms in the heads, several scales) follow from the files.
#
#   MOCO=FILE PIXPRO=FILE SWAV=FILE examples/table05.sh            SMOKE=1 examples/table05.sh
#
# Needs COCO 2017 with masks and the weights as MoCo v2, PixPro and SwAV publish them; what is missing is skipped.
# Costs about 700 GPU-hours (estimate): six pre-trainings and twelve fine-tunings.
# Left out: the rows of other methods without AlignDet. Add their files below; most layouts are known.
source "$(dirname "$0")/common.sh"
needs COCO

run() { # METHOD FILE
  weights=$(weights_of "$1" "$2") || return 0
  study "$table-$1" <<EOF
data = "$coco"
detectors = $(pick '["mask-rcnn", "retinanet"]' '["retinanet"]')
$starts
[settings.finetune]
$(schedule 90k)
EOF
}

run moco "${MOCO:-moco_v2_800ep_pretrain.pth.tar}"
run pixpro "${PIXPRO:-pixpro_base_r50_400ep_md5_919c6612.pth}"
run swav "${SWAV:-swav_800ep_pretrain.pth.tar}"
report
