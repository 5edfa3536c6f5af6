#!/usr/bin/env bash
# Table 2: five detectors, labelled fractions, short and long schedules, with and without AlignDet. ResNet-50.
#
#   examples/table02.sh            SMOKE=1 examples/table02.sh
#
# Needs COCO 2017; fractions below 100 % are the mean of five folds.
# Costs about 9,500 GPU-hours (estimate), 5,600 of which are the low-data runs of 90k iterations; the columns for 100 %
# alone cost 1,500. The four convolutional detectors are pre-trained once each (45 hours), DETR for 50 epochs (190).
source "$(dirname "$0")/common.sh"
needs COCO

for schedule in $(pick "12k 90k" 12k) $(pick "50e 100e" 50e); do
  case $schedule in
    *k) detectors='"fcos", "retinanet", "faster-rcnn", "mask-rcnn"' batch=16 ;;
    *) detectors='"detr"' batch=64 ;;
  esac
  study "$table-$schedule" <<EOF
data = "$coco"
detectors = [$detectors]
fractions = $(pick "[1, 5, 10, 20, 100]" "[50]")
folds = $(pick "[1, 2, 3, 4, 5]" "[1]")
$starts
[settings.pretrain-box]
"training.batch_size" = $(pick $batch 2)
[settings.finetune]
$(schedule "$schedule")
EOF
done
report --metric AP
