"""What is made of an experiment's runs: for each kind its cells, its table and its figure."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from reporting.experiments import KINDS as NAMES
from reporting.experiments import OF_RATES, Planned, accuracies_by_rate, best_rates, read_done
from reporting.figures import COLOURS, LINES, MARKS, can_draw, canvas, png, with_legend
from reporting.markdown import markdown
from reporting.moments import cells_of, draw_differences, label, moments_text
from reporting.numbers import interval
from reporting.report import write_report
from reporting.tables import mean_text, with_spread
from runs.records import Run
from utils import atomic_write, plural


def write(out: Path, title: str, text: str, draw: Callable[[], Any]) -> None:
    """Write and print a table, draw its figure: table.md and figure.png."""
    out.mkdir(parents=True, exist_ok=True)
    link = ""
    if can_draw():
        atomic_write(out / "figure.png", png(draw))
        link = "\n![figure](figure.png)\n"
    atomic_write(out / "table.md", f"# {title}\n\n{text}\n{link}")
    print(f"\n{title}\n\n{text}\n\nTable and figure: {out}", flush=True)


def task_of(run: Run) -> str:
    """Such as "digits, 4 shots"."""
    return f"{run.dataset}, {plural(run.shots, 'shot')}"


def density(run: Run) -> str:
    """The share of entries that SO moves, without the noise of its last digits."""
    return f"{1 - run.settings['s']:.6g}"


def is_redrawn(run: Run) -> bool:
    """Whether the gradient support is drawn more than once in this run."""
    return run.settings["t"] < run.settings["n_iters"] * run.shots


# Methods beside each other


def compare(planned: Sequence[Planned], out: Path) -> None:
    """Write the whole report of scripts/report.py, on these runs alone."""
    folders = sorted({plan.folder for plan in planned if plan.is_done})
    if not folders:
        raise ValueError("no run of this experiment is finished")
    write_report(folders, out, lambda sentence: print(f"experiment.py: {sentence}", flush=True))


# Learning rates

Rates = dict[str, dict[float, list[float]]]  # accuracies by variant and learning rate


def rates(planned: Sequence[Planned], out: Path) -> None:
    """Write validation accuracy by learning rate, and the rate that is chosen for each method."""
    runs = read_done(planned, *OF_RATES)
    cells = accuracies_by_rate(runs)
    best = best_rates(planned) if all(plan.is_done for plan in planned) else {}
    text = rates_text(runs, cells, best)
    title = "Choice of learning rates"
    write(out, title, text, lambda: draw_rates(f"{title}, {runs[0].dataset}", cells, best))


def rates_text(runs: Sequence[Run], cells: Rates, best: dict[str, float]) -> str:
    """The table: methods down, their learning rates in order across."""
    most = max(map(len, cells.values()))
    lines = []
    for name, of_rate in cells.items():
        line = [
            f"{lr:g}: {fmean(values):.1f}" + (" (chosen)" if lr == best.get(name) else "")
            for lr, values in of_rate.items()
        ]
        lines.append([label(name), *line, *["-"] * (most - len(line))])
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    shots = " and ".join(map(str, sorted({run.shots for run in runs})))
    return (
        "Learning rate: mean accuracy in percent on the few validation images of seeds "
        f"{seeds}, with {shots} shots each.\n\n"
        + markdown(["method", *(str(rank + 1) for rank in range(most))], lines)
    )


def draw_rates(title: str, cells: Rates, best: dict[str, float]) -> Any:
    """Accuracy against learning rate, the chosen rates ringed."""
    figure, (axes,) = canvas(title, panels=1)
    for i, (name, of_rate) in enumerate(cells.items()):
        means = {lr: fmean(values) for lr, values in of_rate.items()}
        axes.plot(
            list(means), list(means.values()), color=COLOURS[i], marker=MARKS[i],
            linestyle=LINES[i], label=label(name),
        )  # fmt: skip
        if name in best:
            axes.plot(
                best[name], means[best[name]], marker="o", markersize=13, color=COLOURS[i],
                markerfacecolor="none", linestyle="",
            )  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate at the start", ylabel="validation accuracy (%)")
    return with_legend(figure, "mean over seeds\nand shots; ring:\nchosen")


# Density and T

Grid = dict[tuple[str, str], list[float]]  # accuracies by density and T, in both orders


def grid(planned: Sequence[Planned], out: Path) -> None:
    """Write mean test accuracy by density and T."""
    runs = read_done(planned, "s", "t")
    cells = grid_cells(runs)
    title = f"Density and T: {task_of(runs[0])}"
    write(out, "Density and T", grid_text(runs, cells), lambda: draw_grid(title, cells))


def grid_cells(runs: Sequence[Run]) -> Grid:
    """Accuracies by density, the highest first, and T, the shortest first."""
    cells: Grid = {}
    densities = {density(run): None for run in sorted(runs, key=lambda run: run.settings["s"])}
    windows = {
        str(run.settings["t"]) if is_redrawn(run) else "never": None
        for run in sorted(runs, key=lambda run: run.settings["t"])
    }
    for one in densities:
        for window in windows:
            cells[one, window] = []
    for run in runs:
        window = str(run.settings["t"]) if is_redrawn(run) else "never"
        cells[density(run), window].append(run.accuracy)
    return cells


def axes_of(cells: Grid) -> tuple[list[str], list[str]]:
    """The densities and the windows of a grid, in order."""
    rows, columns = zip(*cells, strict=True)
    return list(dict.fromkeys(rows)), list(dict.fromkeys(columns))


def cell_text(values: Sequence[float]) -> str:
    """Mean ± standard deviation, or that nobody ran it."""
    return mean_text(values) if values else "-"


def grid_text(runs: Sequence[Run], cells: Grid) -> str:
    """The table: densities down, T across."""
    densities, windows = axes_of(cells)
    zero_shot = fmean(run.zero_shot for run in runs)
    lines = [[one, *(cell_text(cells[one, window]) for window in windows)] for one in densities]
    return (
        "Test accuracy in percent, mean ± standard deviation over "
        f"{plural(len({run.seed for run in runs}), 'seed')}: {task_of(runs[0])}, learning rate "
        f"{runs[0].settings['lr']:g}; zero-shot {zero_shot:.1f}.\n\n"
        + markdown(["density", *(f"T = {window}" for window in windows)], lines)
    )


def draw_grid(title: str, cells: Grid) -> Any:
    """Mean accuracy as colours of a grid, with the table's text on it."""
    densities, windows = axes_of(cells)
    figure, (axes,) = canvas(title, panels=1)
    means = [[fmean(cells[one, w] or [math.nan]) for w in windows] for one in densities]
    image = axes.imshow(means, cmap="cividis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for row, one in enumerate(densities):
        for column, window in enumerate(windows):
            ink = "white" if means[row][column] < middle else "black"
            text = cell_text(cells[one, window])
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(range(len(windows)), labels=windows)
    axes.set_yticks(range(len(densities)), labels=densities)
    axes.set(xlabel="T (iterations between two draws)", ylabel="density (share of entries)")
    axes.grid(False)
    figure.colorbar(image, label="test accuracy (%)")
    return figure


# Ablation of the supports

Supports = dict[tuple[str, str, bool], dict[int, float]]  # (S_g, S_m, redrawn), seed to accuracy
USUAL = ("random", "magnitude", True)


def ablation(planned: Sequence[Planned], out: Path) -> None:
    """Write test accuracy by how both supports are chosen, with paired differences to SO."""
    runs = read_done(planned, "grad_support", "moment_support", "t")
    cells = ablation_cells(runs)
    text = ablation_text(runs, cells)
    write(
        out, "Supports", text, lambda: draw_ablation(f"Supports: {task_of(runs[0])}", runs, cells)
    )


def ablation_cells(runs: Sequence[Run]) -> Supports:
    """Accuracies by seed for each choice of supports: SO first, those never redrawn last."""
    cells: Supports = {}
    for run in runs:
        key = run.settings["grad_support"], run.settings["moment_support"], is_redrawn(run)
        cells.setdefault(key, {})[run.seed] = run.accuracy
    order = sorted(cells, key=lambda k: (k != USUAL, not k[2], k[0] != "random", k[1]))
    return {key: cells[key] for key in order}


def names_of(key: tuple[str, str, bool]) -> tuple[str, str, str]:
    """A choice of supports in words: S_g, S_m, whether they are redrawn."""
    gradient = {"random": "random", "magnitude": "largest g"}[key[0]]
    moment = {"magnitude": "largest m", "random": "random", "fixed": "first S_g"}[key[1]]
    return (gradient, moment, "yes") if key[2] else (gradient, "the same entries", "no")


def to_so(cells: Supports, key: tuple[str, str, bool]) -> str:
    """A choice's difference to SO over the seeds that both have."""
    usual = cells.get(USUAL, {})
    both = sorted(cells[key].keys() & usual.keys())
    if key == USUAL or not both:
        return "-"
    return with_spread(*interval([cells[key][seed] - usual[seed] for seed in both]), "+.1f")


def ablation_text(runs: Sequence[Run], cells: Supports) -> str:
    """The table: a choice of supports in each line."""
    lines = [
        [*names_of(key), mean_text(list(of_seed.values())), to_so(cells, key), str(len(of_seed))]
        for key, of_seed in cells.items()
    ]
    zero_shot = fmean(run.zero_shot for run in runs)
    header = ["gradient support S_g", "moment support S_m", "redrawn", "accuracy", "to SO", "seeds"]
    return (
        f"Test accuracy in percent, mean ± standard deviation over seeds: {task_of(runs[0])}, "
        f"density {density(runs[0])}, learning rate {runs[0].settings['lr']:g}; zero-shot "
        f"{zero_shot:.1f}. The first row is SO; differences to it are paired by seed, ± half of "
        "their 95 % confidence interval.\n\n" + markdown(header, lines)
    )


def draw_ablation(title: str, runs: Sequence[Run], cells: Supports) -> Any:
    """Accuracies in a line for each choice of supports: a dot for each seed, a bar at the mean."""
    figure, (axes,) = canvas("", panels=1)
    labels = []
    for row, (key, of_seed) in enumerate(cells.items()):
        colour, values = COLOURS[0] if key == USUAL else "0.35", list(of_seed.values())
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.4, markersize=5)
        axes.plot(fmean(values), row, "|", color=colour, markersize=16, markeredgewidth=2.5)
        gradient, moment, redrawn = names_of(key)
        labels.append(f"{gradient}; {moment}" + (", never redrawn" if redrawn == "no" else ""))
    zero_shot = fmean(run.zero_shot for run in runs)
    axes.axvline(zero_shot, color="0.45", linestyle=(0, (1, 1)))
    axes.text(zero_shot, -0.55, " zero-shot", color="0.35", fontsize=8, va="bottom")
    axes.set_yticks(range(len(cells)), labels=labels)
    axes.set_ylabel("gradient support; moment support")
    axes.set_ylim(len(cells) - 0.4, -0.7)
    axes.set_xlabel("test accuracy (%); dots: seeds, bars: means")
    axes.set_title(title, loc="right")
    figure.set_size_inches(8, 1.2 + 0.36 * len(cells))
    return figure


# Ablation of the moments


def moments(planned: Sequence[Planned], out: Path) -> None:
    """Write test accuracy of SO beside other moments or none, with paired differences to SO."""
    runs = read_done(planned, *OF_RATES)
    panels = [("Accuracy on the task", cells_of(runs))]
    write(out, "Moments", moments_text(runs), lambda: draw_differences(panels))


KINDS = dict(zip(NAMES, (compare, rates, grid, ablation, moments), strict=True))
