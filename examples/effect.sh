#!/usr/bin/env bash
# Does box-domain pre-training pay? The study whose results are in effect.md: drawn pictures, and real photographs.
#
#   examples/effect.sh WEIGHTS [FOLDER]
#
# WEIGHTS: a MobileNet v2, mobilenet_v2-b0353104.pth; effect-photos.toml says where to get it. FOLDER: holds the data sets
# of the photographs, those that are there of bccd, kangaroo and neudet, each with its JPEGImages, Annotations and
# ImageSets; without it only the drawn pictures. Every run that is complete is skipped, so it can be stopped and started
# again. Hours of CPU time for each; `--jobs 2` in the lines below uses two cores where there is memory for it, GPUs are
# used as they are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
weights=$1
photos=${2:-}

[[ -d toy-objects ]] || aligndet toy toy-objects --objects --train 6400 --val 500
[[ -d toy ]] || aligndet toy toy --train 640 --val 128
aligndet study "$here/effect-toy.toml" -w effect-toy
[[ -n "$photos" ]] || exit 0
[[ -e mobilenet_v2-b0353104.pth ]] || ln -s "$(realpath "$weights")" mobilenet_v2-b0353104.pth
for name in bccd kangaroo neudet; do
  [[ -d "$photos/$name" ]] || continue
  ln -sfn "$(realpath "$photos/$name")" "$name"
  aligndet study "$here/effect-photos-$name.toml" -w "photos-$name"
done
