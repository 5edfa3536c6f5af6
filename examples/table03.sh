#!/usr/bin/env bash
# Table 3: Mask R-CNN on other backbones, with and without AlignDet.
#
#   examples/table03.sh            SMOKE=1 examples/table03.sh
#
# Needs COCO 2017 with masks, torchvision's ImageNet weights (downloaded when asked for by name; offline they must be in
# its cache), the Swin-B that its authors trained on ImageNet-22k (SWIN_B=FILE) and SimMIM's (SIMMIM=FILE).
# Costs about 1,700 GPU-hours (estimate): some 115 per ResNet or MobileNet, 230 per Swin; 3x takes 420 more.
# Left out: HTC on CBNet v2, a backbone of two Swin-L that is not here.
source "$(dirname "$0")/common.sh"
needs COCO

run() { # NAME SCHEDULE [BATCH]
  study "$table-$1-$2" <<EOF
data = "$coco"
detectors = ["mask-rcnn"]
$starts
[settings.pretrain-box]
"training.batch_size" = $(pick "${3:-16}" 2)
[settings.finetune]
$(schedule "$2")
"training.batch_size" = $(pick "${3:-16}" 2)
EOF
}

for backbone in $(pick "mobilenet_v2 resnet18 resnet50 swin_s" "mobilenet_v2"); do
  if [[ -n "${SMOKE:-}" ]]; then weights=$smoke/$backbone.pt; fi
  run "$backbone" "$(pick 90k 1x)"
  if [[ $backbone == swin_s ]]; then run "$backbone" 3x; fi
done
if weights=$(weights_of Swin-B "${SWIN_B:-swin_base_patch4_window7_224_22k.pth}"); then
  backbone=$(pick swin_b swin_t)
  run "$backbone" "$(pick 90k 1x)"
fi
if weights=$(weights_of SimMIM "${SIMMIM:-simmim_pretrain__swin_base__img192_window6__800ep.pth}"); then
  backbone=$(pick swin_b swin_t)
  run simmim 3x 32
fi
report --metric AP,mask_AP
