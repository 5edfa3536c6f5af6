#!/usr/bin/env bash
# Do the boxes of a pre-trained detector make a better second pre-training? What is measured so far is in second-round.md.
#
#   examples/second-round.sh DATA WEIGHTS
#
# DATA: a labelled data set, of which pre-training sees the images of the training split. WEIGHTS: a MobileNet v2, e.g.
# mobilenet_v2-b0353104.pth. Complete runs are skipped, so it can be stopped and started again. About an hour of CPU time.
# SMOKE=1 runs the same commands with a few steps and one seed: a minute.
set -euo pipefail
data=$1
weights=$2
workspace=${ALIGNDET_WORKSPACE:-workspace}

model=(--detector faster-rcnn --backbone mobilenet_v2 --backbone-weights "$weights" --batch-size 8
  --set detector.neck_channels=64 --set detector.neck_norm=group --set detector.head_norm=group
  --set detector.head_convs=2 --set detector.head_features=256)
precision=(--precision bf16-mixed)
length=(--steps 400)
tuning=(--fraction 10 --steps 100)
seeds=(0 1 2)
limit=()
if [[ -n "${SMOKE:-}" ]]; then
  precision=() length=(--steps 2) tuning=(--steps 2) seeds=(0) limit=(--limit 3)
fi

pretrain() { # name, proposals
  aligndet pretrain-box "${model[@]}" "${precision[@]}" "${length[@]}" --name "$1" --set "proposals=$2" --topk 15 \
    --momentum 0.98 --lr 0.03 --short-side 160,176,192 --long-side 256 --set detector.pretext_roi_samples=256
}

aligndet proposals "$data" --name search "${limit[@]}"
pretrain one search
aligndet proposals "$data" --from-run one --name second "${limit[@]}"
pretrain two second
for seed in "${seeds[@]}"; do
  for round in one two; do
    aligndet finetune "${model[@]}" "${precision[@]}" "${tuning[@]}" "${limit[@]}" --init "$workspace/pretrain-box/$round/weights.pt" \
      --label "round $round" --name "$round-s$seed" --seed "$seed" --lr 0.03 --short-side 192 --long-side 256 \
      --set backbone.frozen_stages=1 --set backbone.norm_eval=true
    aligndet evaluate --run "$round-s$seed" --name "$round-s$seed" --batch-size 8 --metric coco "${limit[@]}"
  done
done
aligndet report --baseline "round one" --metric AP,AP50,AP75
