#!/usr/bin/env bash
# Does box-domain pre-training pay? The study whose results are in effect.md: drawn pictures, and real photographs.
#
#   examples/effect.sh [BCCD]
#
# BCCD: root of the blood-cell photographs (https://github.com/Shenggan/BCCD_Dataset, VOC format); without it only the
# drawn pictures. Every run that is complete is skipped, so it can be stopped and started again.
# About two hours of CPU time for the drawn pictures and one for the photographs; `--jobs 2` in the lines below uses two
# cores where there is memory for it, GPUs are used as they are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bccd=${1:-}

[[ -d toy-objects ]] || aligndet toy toy-objects --objects --train 6400 --val 500
[[ -d toy ]] || aligndet toy toy --train 640 --val 128
aligndet study "$here/effect-toy.toml" -w effect-toy
if [[ -n "$bccd" ]]; then
  ln -sfn "$(cd "$bccd" && pwd)" bccd
  aligndet study "$here/effect-bccd.toml" -w effect-bccd
fi
