#!/usr/bin/env bash
# Table 5: on self-supervised ResNet-50s. Their recipes (rates, norms in the heads, several scales) follow from the files.
#
#   MOCO=FILE PIXPRO=FILE SWAV=FILE DENSECL=FILE DETCO=FILE SLOTCON=FILE SOCO=FILE SOCO_COCO=FILE \
#     examples/table05.sh
#   SMOKE=1 examples/table05.sh
#
# Needs COCO 2017 with masks and the weights as the methods publish them; what is missing is skipped. SoCo's Mask R-CNN
# starts with SoCo's neck and head, too, and beside it with SoCo's backbone alone; of SoCo trained on COCO
# (`ckpt_epoch_530.pth`, not published) there is no other row.
# Costs about 700 GPU-hours (estimate) with AlignDet, six pre-trainings and twelve fine-tunings, and 350 for the others.
# The report has the paper's numbers of SoCo's Mask R-CNN, for its files tell how long they were trained. It lacks those
# of these, whose files tell neither that nor on which images. AP of Mask R-CNN and RetinaNet there: DenseCL 40.3, 37.5
# (ImageNet) and 39.6 (COCO), DetCo 40.7, 38.0, SlotCon 41.0 (COCO); SoCo's RetinaNet has 38.3 (ImageNet).
# Left out: InsLoc, ReSim and Self-EMD, whose layouts are not known, and the supervised backbone with this recipe.
source "$(dirname "$0")/common.sh"
needs COCO

both=$(pick '["mask-rcnn", "retinanet"]' '["retinanet"]')
run() { # METHOD FILE [STARTS [DETECTORS]]
  weights=$(weights_of "$1" "$2") || return 0
  study "$table-$1" <<EOF
data = "$coco"
detectors = ${4:-$both}
${3:-$starts}
[settings.finetune]
$(schedule 90k)
$([[ $1 != detco ]] || echo '"backbone.method" = "self-supervised"') # its layout is MoCo's
EOF
}

run moco "${MOCO:-moco_v2_800ep_pretrain.pth.tar}"
run pixpro "${PIXPRO:-pixpro_base_r50_400ep_md5_919c6612.pth}"
run swav "${SWAV:-swav_800ep_pretrain.pth.tar}"
run densecl "${DENSECL:-densecl_r50_imagenet_200ep.pth}" "$plain"
run detco "${DETCO:-detco_200ep.pth}" "$plain"
run slotcon "${SLOTCON:-slotcon_coco_r50_800ep.pth}" "$plain"
own() { # of SoCo's own neck and head: LABEL
  printf '[[starts]]\nlabel = "%s"\ninit = "%s"\ndetectors = ["mask-rcnn"]' "$1" "$init"
}
soco=${SOCO:-soco_imagenet_400ep.pth}
if import_weights soco "$soco"; then
  run soco "$soco" "$plain"$'\n'"$(own 'SoCo, ImageNet')" "$(pick "$both" '["mask-rcnn"]')"
fi
soco=${SOCO_COCO:-soco_coco_530ep.pth}
if import_weights soco-coco "$soco"; then run soco-coco "$soco" "$(own 'SoCo, COCO')" '["mask-rcnn"]'; fi
report
