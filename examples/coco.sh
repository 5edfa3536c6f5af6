#!/usr/bin/env bash
# AlignDet with RetinaNet on COCO: pre-train on train2017 without its labels, fine-tune with them, measure on val2017.
#
#   examples/coco.sh path/to/coco [torchvision weight name or file of a ResNet-50]
#
# Needs: COCO 2017 (train2017/, val2017/, annotations/), a GPU or several. At full size 12 epochs of pre-training and
# 12 of fine-tuning. SMOKE=1 runs the same commands in a few minutes on a CPU, with a ResNet-18 from scratch.
set -euo pipefail
data=$1
weights=${2:-IMAGENET1K_V1}

model=(--detector retinanet --backbone resnet50 --backbone-weights "$weights")
train=()
limit=()
if [[ -n "${SMOKE:-}" ]]; then
  model=(--detector retinanet --backbone resnet18 --backbone-weights none --set detector.neck_channels=64 --set detector.head_convs=1)
  train=(--short-side 96 --long-side 160 --steps 4 --batch-size 2)
  limit=(--limit 8)
fi

# On many machines that share the workspace, instead: --shard 1/16 ... --shard 16/16, e.g. as a Slurm array with
# --shard "$SLURM_ARRAY_TASK_ID/16"; the last of them to end puts all together.
aligndet proposals "$data" "${limit[@]}"
aligndet pretrain-box "${model[@]}" "${train[@]}"
aligndet finetune "${model[@]}" "${train[@]}" "${limit[@]}"
aligndet evaluate "${limit[@]}"
aligndet status
