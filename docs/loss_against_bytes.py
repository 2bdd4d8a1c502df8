"""Draws loss_against_bytes.svg from lab/muon_runs.csv: held-out loss against bytes of weights and optimizer.

Run it from anywhere. The table's rows are those that `tools/compare_methods.py` wrote; each point is the mean of the
seeds of one method at its best rates, with its standard deviation where there are several. docs/results.md says how
the runs were made.
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
NAMES = {  # of the variants at their best rates, and where their labels stand beside the point, in points
    "adamw": ("AdamW, fp32", (-8, 8, "right")),
    "muon fp32": ("Muon, fp32", (-8, 8, "right")),
    "muon 8bit": ("muon 8bit on int8", (8, 2, "left")),
    "muon 4bit": ("muon 4bit on int8", (8, -10, "left")),
    "qgalore": ("Q-GaLore", (8, 4, "left")),
    "fira": ("Fira on int8", (8, -8, "left")),
    "sinkgd": ("SinkGD on int8, no state", (8, 4, "left")),
}

plt.rcParams.update({"font.size": 10, "svg.hashsalt": "qgalore", "svg.fonttype": "none", "font.family": "sans-serif"})
with (HERE / "lab" / "muon_runs.csv").open(encoding="utf-8", newline="") as sheet:
    rows = [row for row in csv.DictReader(sheet) if row["variant"] in NAMES]
lengths = sorted({int(row["steps"]) for row in rows})
figure, panels = plt.subplots(1, len(lengths), figsize=(4.6 * len(lengths), 3.4), sharex=True)
for axes, steps in zip([panels] if len(lengths) == 1 else panels, lengths, strict=True):
    losses, sizes = defaultdict(list), {}
    for row in rows:
        if int(row["steps"]) == steps:
            losses[row["variant"]].append(float(row["eval_loss"]))
            sizes[row["variant"]] = int(row["weights_and_optimizer_bytes"]) / MIB
    for variant, found in losses.items():
        label, (dx, dy, side) = NAMES[variant]
        colour = "#1f6f5c" if label.startswith("muon") else "0.35"
        spread = stdev(found) if len(found) > 1 else 0.0
        axes.errorbar(sizes[variant], mean(found), spread, fmt="o", color=colour, capsize=3)
        axes.annotate(label, (sizes[variant], mean(found)), (dx, dy), textcoords="offset points", ha=side, color=colour)
    axes.set_title(f"{steps:,} steps of 1,024 tokens", fontsize=10)
    axes.set_xlabel("MiB of weights and optimizer")
    axes.set_xlim(0, 12)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
figure.axes[0].set_ylabel("held-out loss, nats")
figure.tight_layout()
figure.savefig(HERE / "loss_against_bytes.svg", metadata={"Date": None})
