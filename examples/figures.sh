#!/usr/bin/env bash
# The paper's figures of what pre-training changes, drawn of one's own runs, into WORKSPACE/figures.
#
#   examples/figures.sh            SMOKE=1 examples/figures.sh
#
#   DETECTOR/figure_4.png     embeddings of labelled objects, before and after pre-training
#   DETECTOR/figure_5.png     centres of the best boxes; those of R-CNNs before any fine-tuning, as in figure 9
#   DETECTOR/figure_7.png     losses of fine-tuning, with and without
#   DETECTOR/figure_10.png    detections, with and without
#   figure_8.jpg              proposals
#   views.jpg                 the two views of pre-training and their proposals (of figure 3)
#   report.html               the runs, their numbers and their own pictures on one page
#
# Needs COCO 2017. Costs about 1,100 GPU-hours (estimate; 770 of them for DETR), minutes where table02.sh has run.
# Left out: figures 1, 2 and 6, which are no drawings of runs.
source "$(dirname "$0")/common.sh"
needs COCO

figures=$workspace/figures
for detector in $(pick "faster-rcnn retinanet fcos detr" "faster-rcnn retinanet"); do
  schedule=90k batch=16
  if [[ $detector == detr ]]; then schedule=100e batch=64; fi
  study "$table-$detector" <<EOF
data = "$coco"
detectors = ["$detector"]
$starts
[settings.pretrain-box]
"training.batch_size" = $(pick $batch 2)
[settings.finetune]
$(schedule $schedule)
EOF
  both=$(runs_of finetune) # two lines: without and with
  aligndet figures --run "${both#*$'\n'}" --compare "${both%$'\n'*}" --output "$figures/$detector"
done
proposals=$(runs_of proposals)
cp "$workspace/proposals/$proposals/sheet.jpg" "$figures/figure_8.jpg"
aligndet views "$coco" --set proposals="$proposals" --output "$figures/views.jpg"
report --html --output "$figures/report.html"
