#!/usr/bin/env bash
# Table 5: on self-supervised ResNet-50s. Their recipes (rates, norms in the heads, several scales) follow from the files.
#
#   MOCO=FILE PIXPRO=FILE SWAV=FILE DENSECL=FILE DETCO=FILE SLOTCON=FILE SOCO=FILE examples/table05.sh
#   SMOKE=1 examples/table05.sh
#
# Needs COCO 2017 with masks and the weights as the methods publish them; what is missing is skipped.
# Costs about 700 GPU-hours (estimate) with AlignDet, six pre-trainings and twelve fine-tunings, and 280 for the others.
# The report lacks the paper's numbers of these, for no file tells on which images it was trained, or how long. AP of Mask
# R-CNN and RetinaNet there: DenseCL 40.3, 37.5 (ImageNet) and 39.6 (COCO), DetCo 40.7, 38.0, SlotCon 41.0 (COCO),
# SoCo 43.0, 38.3; that starts with its own neck and head, too, and here all start with the backbone alone.
# Left out: InsLoc, ReSim and Self-EMD, whose layouts are not known, and the supervised backbone with this recipe.
source "$(dirname "$0")/common.sh"
needs COCO

run() { # METHOD FILE [STARTS]
  weights=$(weights_of "$1" "$2") || return 0
  study "$table-$1" <<EOF
data = "$coco"
detectors = $(pick '["mask-rcnn", "retinanet"]' '["retinanet"]')
${3:-$starts}
[settings.finetune]
$(schedule 90k)
$([[ $1 != detco ]] || echo '"backbone.method" = "self-supervised"') # its layout is MoCo's
EOF
}

plain='[[starts]]
label = "backbone only"
init = "backbone"'
run moco "${MOCO:-moco_v2_800ep_pretrain.pth.tar}"
run pixpro "${PIXPRO:-pixpro_base_r50_400ep_md5_919c6612.pth}"
run swav "${SWAV:-swav_800ep_pretrain.pth.tar}"
run densecl "${DENSECL:-densecl_r50_imagenet_200ep.pth}" "$plain"
run detco "${DETCO:-detco_200ep.pth}" "$plain"
run slotcon "${SLOTCON:-slotcon_coco_r50_800ep.pth}" "$plain"
run soco "${SOCO:-soco_imagenet_400ep.pth}" "$plain"
report
