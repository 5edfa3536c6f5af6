#!/usr/bin/env bash
# Table 12: trained parameters and time of each stage. FCOS, ResNet-50.
#
#   examples/table12.sh            SMOKE=1 examples/table12.sh
#
# Needs COCO 2017. Costs 80 GPU-hours on A100s (the paper's figure), nothing where table02.sh has run. What the stages
# would take on this machine can be had in a minute: aligndet bench --detector fcos
# Left out: the paper's 77.1 hours for MoCo v2, whose weights are published.
source "$(dirname "$0")/common.sh"

study "$table" <<EOF
data = "$coco"
detectors = ["fcos"]
[[starts]]
label = "AlignDet"
[settings.finetune]
$(schedule 90k)
EOF
python - "$workspace" <<'EOF'
import json, pathlib, sys
from datetime import datetime
print(f"{'run':<50}{'parameters':>12}{'images':>9}{'steps':>8}{'hours':>8}   paper (8 A100)")
paper = {"pretrain-box": "8.79 M, 12 epochs, 5.6 h", "finetune": "32.02 M, 12 epochs, 4.4 h"}
for stage, theirs in paper.items():
    for file in sorted(pathlib.Path(sys.argv[1]).glob(f"{stage}/*/manifest.json")):
        run = json.loads(file.read_text())
        if run["settings"]["detector.family"] == "fcos":
            result, times = run["result"], [datetime.fromisoformat(run[key]) for key in ("started", "finished")]
            hours = (times[1] - times[0]).total_seconds() / 3600
            millions = f"{result['trained_parameters'] / 1e6:.2f} M"
            name = f"{stage}/{file.parent.name}"
            print(f"{name:<50}{millions:>12}{result['images']:>9}{result['steps']:>8}{hours:>8.1f}   {theirs}")
EOF
report
