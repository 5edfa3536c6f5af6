#!/usr/bin/env bash
# Table 4: pre-trained on COCO, fine-tuned on Pascal VOC.
#
#   examples/table04.sh            SMOKE=1 examples/table04.sh
#
# Needs COCO 2017 (images only) and VOC 2007 and 2012 (train on both trainval sets, test on 2007).
# Costs about 70 GPU-hours (estimate) where table02.sh has pre-trained the detectors already, 390 otherwise.
source "$(dirname "$0")/common.sh"
needs COCO VOC

for schedule in 12k 100e; do
  case $schedule in
    *k) detectors='"fcos", "retinanet", "faster-rcnn"' batch=16 ;;
    *) detectors='"detr"' batch=64 ;;
  esac
  study "$table-$schedule" <<EOF
data = "$voc"
detectors = [$(pick "$detectors" "${detectors%%,*}")]
$starts
[settings.proposals]
"data.root" = "$coco"
[settings.cluster]
"data.root" = "$coco"
[settings.pretrain-box]
"data.root" = "$coco"
"training.batch_size" = $(pick $batch 2)
[settings.finetune]
$(schedule "$schedule")
EOF
done
report
