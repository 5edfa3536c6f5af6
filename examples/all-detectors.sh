#!/usr/bin/env bash
# All detectors through all five stages, on one set of proposals and clusters.
#
#   examples/all-detectors.sh path/to/coco [backbone weights]
#
# At full size (ResNet-50, the paper's schedules) this is several days on one GPU. SMOKE=1 runs the same commands with a
# ResNet-18, slim heads and tiny images: five minutes of a CPU.
set -euo pipefail
data=$1
weights=${2:-IMAGENET1K_V1}

backbone=(--backbone resnet50 --backbone-weights "$weights")
two=cb-resnet50
train=()
limit=()
clusters=()
evaluation=()
if [[ -n "${SMOKE:-}" ]]; then
  backbone=(--backbone resnet18 --backbone-weights "$weights")
  two=cb-resnet18
  train=(--short-side 96 --long-side 160 --steps 2 --batch-size 2)
  limit=(--limit 6)
  clusters=(--k 8 --pca-dim 8 --short-side 96 --long-side 160)
  evaluation=(--limit 3)
fi

aligndet proposals "$data" "${limit[@]}"
aligndet cluster "${backbone[@]}" "${clusters[@]}"
for detector in fcos retinanet faster-rcnn mask-rcnn cascade-rcnn cascade-mask-rcnn htc detr htc+cb; do
  model=(--detector "${detector%+cb}" "${backbone[@]}")
  if [[ $detector == *+cb ]]; then
    model+=(--backbone "$two") # two linked ones
  fi
  if [[ -n "${SMOKE:-}" && $detector != detr ]]; then
    model+=(--set detector.neck_channels=64 --set detector.head_convs=1)
    if [[ $detector == *rcnn || $detector == htc* ]]; then model+=(--set detector.head_features=128); fi
  fi
  aligndet pretrain-box "${model[@]}" "${train[@]}"
  aligndet finetune "${model[@]}" "${train[@]}" "${limit[@]}"
  aligndet evaluate "${evaluation[@]}"
done
aligndet status
