#!/usr/bin/env bash
# Does pre-training pay on my data? The same fine-tuning twice, with and without it, and the difference in AP.
#
#   examples/does-it-pay.sh DATA [backbone weights]
#
# DATA: any labelled data set (COCO, VOC or YOLO root). Proposals come from its own training images; for more of your
# unlabelled images, run `aligndet proposals FOLDER` first and pass DATA to finetune and evaluate only.
# SMOKE=1 runs it in a few minutes on a CPU, from scratch.
set -euo pipefail
data=$1
weights=${2:-IMAGENET1K_V1}

model=(--backbone resnet50 --backbone-weights "$weights")
train=()
control=backbone
limit=()
if [[ -n "${SMOKE:-}" ]]; then
  model=(--backbone resnet18 --backbone-weights none --set detector.neck_channels=64 --set detector.head_convs=1)
  train=(--short-side 96 --long-side 160 --steps 4 --batch-size 2)
  control=scratch
  limit=(--limit 8)
fi

aligndet proposals "$data" "${limit[@]}"
aligndet pretrain-box "${model[@]}" "${train[@]}"
aligndet finetune "${model[@]}" "${train[@]}" "${limit[@]}" --init "$control" --name without
aligndet finetune "${model[@]}" "${train[@]}" "${limit[@]}" --init pretrain --name with
aligndet evaluate --run without "${limit[@]}"
aligndet evaluate --run with "${limit[@]}" --compare without
