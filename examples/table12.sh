#!/usr/bin/env bash
# Table 12: trained parameters and time of each stage. FCOS, ResNet-50.
#
#   examples/table12.sh            SMOKE=1 examples/table12.sh
#
# Needs COCO 2017. Costs 80 GPU-hours on A100s (the paper's figure), nothing where table02.sh has run. What the stages
# would take on this machine can be had in a minute: aligndet bench --detector fcos
# Left out: the paper's 77.1 hours for MoCo v2, whose weights are published.
source "$(dirname "$0")/common.sh"
needs COCO

study "$table" <<EOF
data = "$coco"
detectors = ["fcos"]
[[starts]]
label = "AlignDet"
[settings.finetune]
$(schedule 90k)
EOF
pretrained=$(runs_of pretrain-box) tuned=$(runs_of finetune) costs=$(aligndet report "${studies[@]}" --costs --json)
python3 - "$costs" "$workspace/pretrain-box/$pretrained" "$workspace/finetune/$tuned" <<'EOF'
import json, pathlib, sys
[row] = json.loads(sys.argv[1])["rows"]
print(f"{'stage':<13}{'parameters':>11}{'images':>9}{'steps':>8}{'hours':>8}   paper (8 A100)")
paper = ("8.79 M, 12 epochs, 5.6 h", "32.02 M, 12 epochs, 4.4 h")
for folder, cost, theirs in zip(sys.argv[2:], (row["cost"], row["tuning_cost"]), paper):
    run = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
    result, hours = run["result"], "unknown" if cost["hours"] is None else f"{cost['hours']:.1f}"
    millions = f"{result['trained_parameters'] / 1e6:.2f} M"
    print(f"{run['stage']:<13}{millions:>11}{result['images']:>9}{result['steps']:>8}{hours:>8}   {theirs}")
EOF
report
