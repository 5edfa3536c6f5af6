#!/usr/bin/env bash
# Table 8: does the source of the boxes matter? Faster R-CNN pre-trained on as many proposals of ImageNet as of COCO.
#
#   examples/table08.sh            SMOKE=1 examples/table08.sh
#
# Needs COCO 2017 and ImageNet's training images. Costs about 200 GPU-hours (estimate), 80 of them for the ImageNet row, and
# a day on 64 cores for ImageNet's proposals; the other rows are those of table02.sh.
# No run tells that its boxes were ImageNet's, so the report lacks the paper's numbers of that row: AP 38.7, AP50 58.6,
# AP75 42.1, APs 21.7, APm 42.0, APl 50.1.
source "$(dirname "$0")/common.sh"
needs COCO IMAGENET

study "$table" <<EOF
data = "$coco"
detectors = ["faster-rcnn"]
$starts
[settings.finetune]
$(schedule 90k)
EOF
# The number of proposals that COCO's pre-training saw.
manifest=$workspace/pretrain-box/$(runs_of pretrain-box)/manifest.json
boxes=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["result"]["boxes"])' "$manifest")
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
