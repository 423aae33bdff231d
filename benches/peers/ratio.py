"""Compares runs of `sdgen bench --json` and pytorch.py: the best seconds of each part, and PyTorch's over sdgen's.

    python ratio.py sdgen-1.jsonl,sdgen-2.jsonl pytorch-1.jsonl,pytorch-2.jsonl

Steps are alike, so the best of all steps counts. A ratio above 1 means that sdgen is faster.
"""
import json
import re
import sys


def best(names):
    parts, peak = {}, 0.0
    for name in names.split(","):
        for line in open(name):
            row = json.loads(line)
            peak = max(peak, row.get("peak_rss_gb", 0.0))
            if "part" in row:
                key = re.sub(r"^step \d+", "step", row["part"])
                if key not in parts or row["seconds"] < parts[key]["seconds"]:
                    parts[key] = row
    return parts, peak


(ours, our_peak), (theirs, their_peak) = best(sys.argv[1]), best(sys.argv[2])
print(f"{'part':<26} {'sdgen':>10} {'GFLOP/s':>9} {'PyTorch':>10} {'GFLOP/s':>9} {'ratio':>7}")
for part, a in ours.items():
    if part in theirs:
        b = theirs[part]
        row = f"{part:<26} {a['seconds']:>8.3f} s {a['gflop_per_s']:>9.1f} {b['seconds']:>8.3f} s {b['gflop_per_s']:>9.1f}"
        print(f"{row} {b['seconds'] / a['seconds']:>7.2f}")
        if abs(a["gflop"] - b["gflop"]) > 0.02 * b["gflop"]:
            print(f"  (counted differently: {a['gflop']:.1f} and {b['gflop']:.1f} GFLOP)")
print(f"{'peak memory':<26} {our_peak:>7.2f} GB {'':>9} {their_peak:>7.2f} GB")
