"""Draws memory_7b.svg: what full-parameter training of a 7B model needs on one GPU. Run it from this folder.

Published figures are of LLaMA-7B on one GPU without offload; their sources stand beside them. Ours is the planned
peak in GB, which `python train.py --config llama7b_16gb.yaml --plan` prints in GiB, for one sequence of 2,048 tokens.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FIGURES = [
    ("AdamW, bf16 (GaLore 2, introduction)", 58.0, "0.75"),
    ("8-bit GaLore, per-layer updates (its README)", 21.3, "0.6"),
    ("Q-GaLore's own code (its scripts)", 15.1, "0.45"),
    ("qgalore, rank 1024 (plan, 12.5 GiB)", 13.5, "#1f6f5c"),
    ("qgalore, rank 512 (plan, 10.6 GiB)", 11.3, "#2f9c82"),
]

plt.rcParams.update({"font.size": 10, "svg.hashsalt": "qgalore", "svg.fonttype": "none", "font.family": "sans-serif"})
figure, axes = plt.subplots(figsize=(7.6, 2.5))
names, values, colours = zip(*reversed(FIGURES), strict=True)
bars = axes.barh(names, values, color=colours, height=0.62)
axes.bar_label(bars, [f"{value:g}" for value in values], padding=4)
axes.axvline(16, color="#b3402a", linewidth=1, linestyle="--")
axes.text(16.5, len(names) - 0.55, "a 16 GB card", color="#b3402a", va="center")
axes.set_xlabel("GB to train all weights of LLaMA-7B")
axes.set_xlim(0, 64)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
