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
GRAD_COLOR, MOMENT_COLOR, MOVED_COLOR = "#56B4E9", "#000000", "#DDDDDD"
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
    dots = dict(color=MOMENT_COLOR, marker="o", markersize=4)
    handles = [
        Patch(color=GRAD_COLOR, label="$S_g$: gradient read, refreshed every $T = 5$ steps"),
        Line2D([], [], **dots, label="$S_m$: moments kept, where $|m|$ is largest"),
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
        row, column = divmod(entry, COLUMNS)
        color = GRAD_COLOR if entry in grad_support else MOVED_COLOR
        axes.add_patch(plt.Rectangle((column, row), 1, 1, color=color, linewidth=0))
    rows, columns = zip(*(divmod(entry, COLUMNS) for entry in moment_support), strict=True)
    x, y = [column + 0.5 for column in columns], [row + 0.5 for row in rows]
    axes.scatter(x, y, s=15, color=MOMENT_COLOR, zorder=3)
    axes.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), aspect="equal")
    axes.set_title(f"W after step {len(supports)}")
    axes.set_xticks(range(COLUMNS + 1), [])
    axes.set_yticks(range(ROWS + 1), [])
    axes.grid(color="#C8C8C8", linewidth=0.5)
    axes.tick_params(length=0)


def draw_steps(axes: plt.Axes, supports: Supports) -> None:
    """Draw every entry whose gradient was ever read as a row over the steps."""
    entries = list(dict.fromkeys(entry for read, _ in supports for entry in sorted(read)))
    for y, entry in enumerate(entries):
        in_grad_support, in_moment_support = (
            [(step + 0.5, 1) for step, pair in enumerate(supports) if entry in pair[which]]
            for which in (0, 1)
        )
        axes.broken_barh(in_grad_support, (y + 0.04, 0.92), color=GRAD_COLOR, linewidth=0)
        axes.broken_barh(in_moment_support, (y + 0.33, 0.34), color=MOMENT_COLOR, linewidth=0)
    for step in range(T, NUM_REFRESHES * T, T):
        axes.axvline(step + 0.5, color="#777777", linewidth=0.8)
    axes.set(xlim=(0.5, NUM_REFRESHES * T + 0.5), ylim=(len(entries) + 0.5, -0.5), yticks=[])
    axes.set(xlabel="step", ylabel="entries of W", xticks=range(1, NUM_REFRESHES * T + 1))


if __name__ == "__main__":
    main()
