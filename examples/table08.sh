#!/usr/bin/env bash
# Table 8: does the source of the boxes matter? Faster R-CNN pre-trained on as many proposals of ImageNet as of COCO.
#
#   examples/table08.sh            SMOKE=1 examples/table08.sh
#
# Needs COCO 2017 and ImageNet's training images. Costs about 200 GPU-hours (estimate), 80 of them for the ImageNet row, and
# a day on 64 cores for ImageNet's proposals; the other rows are those of table02.sh.
source "$(dirname "$0")/common.sh"

study "$table" <<EOF
data = "$coco"
detectors = ["faster-rcnn"]
$starts
[settings.finetune]
$(schedule 90k)
EOF
# The number of proposals that COCO's pre-training saw.
boxes=$(python - "$workspace" <<'EOF'
import json, pathlib, sys
runs = [json.loads(file.read_text()) for file in pathlib.Path(sys.argv[1]).glob("pretrain-box/*/manifest.json")]
runs = [run for run in runs if run["settings"]["detector.family"] == "faster-rcnn" and not run["settings"]["limit_boxes"]]
print(max(run["result"]["boxes"] for run in runs))
EOF
)
study "$table-imagenet" <<EOF
data = "$coco"
detectors = ["faster-rcnn"]
[[starts]]
label = "ImageNet subset"
[settings.proposals]
"data.root" = "$imagenet"
[settings.pretrain-box]
"data.root" = "$imagenet"
limit_boxes = $boxes
[settings.finetune]
$(schedule 90k)
EOF
report --metric AP,AP50,AP75,APs,APm,APl
