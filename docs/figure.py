"""Draw docs/figure.png: both supports of SO in a real run over one small matrix.

python docs/figure.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from optimizers import SO

ROWS, COLUMNS, K, T, NUM_REFRESHES = 10, 16, 10, 5, 4
# Sky blue and black of Okabe and Ito, and gray.
SUPPORT_COLORS = GRAD_COLOR, MOMENT_COLOR = "#56B4E9", "#000000"
MOVED_COLOR = "#DDDDDD"
DOTS = dict(color=MOMENT_COLOR, marker="o", markersize=4)
Supports = list[tuple[set[int], set[int]]]  # S_g and S_m after each step, as flat indices of W


def main() -> None:
    """Train, draw W after each T steps, and below it all entries over time."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9})
    figure = plt.figure(figsize=(8, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, NUM_REFRESHES, height_ratios=(1, 1.3))
    supports = train()
    for column in range(NUM_REFRESHES):
        draw_matrix(figure.add_subplot(grid[0, column]), supports[: (column + 1) * T])
    draw_steps(figure.add_subplot(grid[1, :]), supports)
    handles = [
        Patch(color=GRAD_COLOR, label="$S_g$: gradient read, refreshed every $T = 5$ steps"),
        Line2D([], [], **DOTS, label="$S_m$: moments kept, where $|m|$ is largest"),
        Patch(color=MOVED_COLOR, label="moved earlier"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(Path(__file__).with_name("figure.png"), dpi=200)


def train() -> Supports:
    """Fit a linear map with SO, and return its supports after each step."""
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    target = layer.weight.detach() + torch.randn(ROWS, COLUMNS) ** 3  # a few entries are far off
    optimizer = SO(layer.parameters(), lr=0.05, density_ratio=K / (ROWS * COLUMNS), T=T, seed=1)
    supports = []
    for _ in range(NUM_REFRESHES * T):
        inputs = torch.randn(64, COLUMNS)
        optimizer.zero_grad()
        (layer(inputs) - inputs @ target.T).square().mean().backward()
        optimizer.step()
        state = optimizer.state[layer.weight]
        supports.append(tuple(set(state[name].tolist()) for name in ("grad_indices", "indices")))
    return supports


def draw_matrix(axes: plt.Axes, supports: Supports) -> None:
    """Draw W after the last of the steps, a cell for each entry."""
    grad_support, moment_support = supports[-1]
    for entry in set().union(*(earlier for earlier, _ in supports)):
        color = GRAD_COLOR if entry in grad_support else MOVED_COLOR
        corner = entry % COLUMNS, entry // COLUMNS
        axes.add_patch(plt.Rectangle(corner, 1, 1, color=color, linewidth=0))
    for entry in moment_support:
        axes.plot(entry % COLUMNS + 0.5, entry // COLUMNS + 0.5, **DOTS)
    axes.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), aspect="equal")
    axes.set(title=f"W after step {len(supports)}", xticks=range(COLUMNS), yticks=range(ROWS))
    axes.grid(color="#C8C8C8", linewidth=0.5)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)


def draw_steps(axes: plt.Axes, supports: Supports) -> None:
    """Draw every entry whose gradient was ever read as a row over the steps."""
    entries = list(dict.fromkeys(entry for read, _ in supports for entry in sorted(read)))
    for step, pair in enumerate(supports):
        for support, height, color in zip(pair, (0.92, 0.34), SUPPORT_COLORS, strict=True):
            axes.barh([entries.index(e) + 0.5 for e in support], 1, height, step + 0.5, color=color)
        if step and step % T == 0:
            axes.axvline(step + 0.5, color="#777777", linewidth=0.8)
    axes.set(xlim=(0.5, NUM_REFRESHES * T + 0.5), ylim=(len(entries) + 0.5, -0.5), yticks=[])
    axes.set(xlabel="step", ylabel="entries of W", xticks=range(1, NUM_REFRESHES * T + 1))


if __name__ == "__main__":
    main()
