#!/usr/bin/env bash
# Table 3: Mask R-CNN on other backbones, and HTC on CBNet v2, with and without AlignDet.
#
#   examples/table03.sh            SMOKE=1 examples/table03.sh
#
# Needs COCO 2017 with masks, torchvision's ImageNet weights (downloaded when asked for by name; offline they must be in
# its cache), the Swin-B and Swin-L that their authors trained on ImageNet-22k (SWIN_B=FILE, SWIN_L=FILE) and SimMIM's
# (SIMMIM=FILE).
# Costs about 1,700 GPU-hours (estimate): some 115 per ResNet or MobileNet, 230 per Swin; 3x takes 420 more.
# CBNet v2 is not in that: two Swin-L and images of 1600 pixels want several GPUs of 80 GB. `aligndet bench --detector htc
# --backbone cb-swin_l --short-side 1400 --long-side 1600` says what a step needs.
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
if weights=$(weights_of Swin-L "${SWIN_L:-swin_large_patch4_window7_224_22k.pth}"); then
  backbone=$(pick cb-swin_l cb-swin_t)
  study "$table-cbnet-1x" <<EOF
data = "$coco"
detectors = ["htc"]
$starts
finetune = { "training.batch_size" = $(pick 128 2) }
[settings.pretrain-box]
"training.batch_size" = $(pick 16 2)
$(pick '"views.short_side" = "400..1400"' "")
$(pick '"views.long_side" = 1600' "")
$(pick '"runtime.precision" = "16-mixed"' "")
[settings.finetune]
$(schedule 1x)
"training.batch_size" = $(pick 16 2)
$(pick '"resolution.long_side" = 1600' "")
$(pick '"runtime.precision" = "16-mixed"' "")
EOF
fi
report --metric AP,mask_AP
