"""What is made of an experiment's runs: a table and a figure for each kind of experiment."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from report import interval, markdown, report

from reporting.figures import COLOURS, LINES, MARKS, can_draw, canvas, png, with_legend
from reporting.numbers import METHODS, plural
from results import Run, read_run
from utils import atomic_write


class Done(NamedTuple):
    """A finished run and the flags that it was planned with."""

    run: Run
    config: Any  # argparse.Namespace


def read_done(planned: Sequence[Any]) -> list[Done]:
    """Read the runs that are finished.

    Raises:
        ValueError: None is, or one is damaged; the sentence names it.
    """
    done = []
    for plan in planned:
        if plan.is_done:
            try:
                done.append(Done(read_run(plan.folder), plan.config))
            except ValueError as error:
                raise ValueError(f"{plan.folder}: {error}; remove it, and run it again") from error
    if not done:
        raise ValueError("no run of this experiment is finished")
    return done


def write(out: Path, title: str, text: str, draw: Callable[[], Any]) -> None:
    """Write and print a table, draw its figure: table.md and figure.png."""
    out.mkdir(parents=True, exist_ok=True)
    link = ""
    if can_draw():
        atomic_write(out / "figure.png", png(draw))
        link = "\n![figure](figure.png)\n"
    atomic_write(out / "table.md", f"# {title}\n\n{text}\n{link}")
    print(f"\n{title}\n\n{text}\n\nTable and figure: {out}", flush=True)


# Methods beside each other


def compare(planned: Sequence[Any], out: Path) -> None:
    """The whole report of scripts/report.py, on these runs alone."""
    folders = sorted({plan.folder for plan in planned if plan.is_done})
    if not folders:
        raise ValueError("no run of this experiment is finished")
    report(folders, out, lambda sentence: print(f"experiment.py: {sentence}", flush=True))


# Learning rates


def rates_table(planned: Sequence[Any]) -> dict[str, dict[float, list[float]]]:
    """Accuracies by method and learning rate, in the order of rates."""
    table: dict[str, dict[float, list[float]]] = {}
    for run, config in sorted(read_done(planned), key=lambda done: done.config.lr):
        table.setdefault(config.method, {}).setdefault(config.lr, []).append(run.accuracy)
    return {method: table[method] for method in METHODS if method in table}


def best_rates(planned: Sequence[Any]) -> dict[str, float]:
    """Each method's learning rate of the best mean accuracy, the lowest of equals.

    Raises:
        ValueError: Not all runs are finished.
    """
    if missing := [plan for plan in planned if not plan.is_done]:
        raise ValueError(
            f"{plural(len(missing), 'run')} of the learning rates' choice are not finished, "
            f"such as {missing[0].folder}: run that experiment first"
        )
    return {
        method: max(of_rate, key=lambda lr: (round(fmean(of_rate[lr]), 6), -lr))
        for method, of_rate in rates_table(planned).items()
    }


def rates(planned: Sequence[Any], out: Path) -> None:
    """Validation accuracy by learning rate, and the rate that is chosen for each method."""
    table = rates_table(planned)
    try:
        best = best_rates(planned)
    except ValueError:
        best = {}
    ranks = range(max(map(len, table.values())))
    lines = []
    for method, of_rate in table.items():
        cells = [
            f"{lr:g}: {fmean(values):.1f}" + (" (chosen)" if lr == best.get(method) else "")
            for lr, values in of_rate.items()
        ]
        lines.append([METHODS[method], *cells, *["-"] * (len(ranks) - len(cells))])
    config = planned[0].config
    seeds = sorted({plan.config.seed for plan in planned})
    shots = sorted({plan.config.shots for plan in planned})
    text = (
        "Learning rate: mean accuracy in percent on the few validation images of seeds "
        f"{listed(seeds)}, each with {listed(shots)} shots.\n\n"
        + markdown(["method", *(str(rank + 1) for rank in ranks)], lines)
    )

    def draw() -> Any:
        figure, (axes,) = canvas(f"Choice of learning rates, {config.dataset}", panels=1)
        for i, (method, of_rate) in enumerate(table.items()):
            means = [fmean(values) for values in of_rate.values()]
            axes.plot(
                list(of_rate), means, color=COLOURS[i], marker=MARKS[i], linestyle=LINES[i],
                label=METHODS[method],
            )  # fmt: skip
            if method in best:
                axes.plot(
                    best[method], fmean(of_rate[best[method]]), marker="o", markersize=13,
                    color=COLOURS[i], markerfacecolor="none", linestyle="",
                )  # fmt: skip
        axes.set(xscale="log", xlabel="learning rate at the start")
        axes.set_ylabel("validation accuracy (%)")
        return with_legend(figure, "mean over seeds\nand shots; ring:\nchosen")

    write(out, "Choice of learning rates", text, draw)


def listed(values: Sequence[Any]) -> str:
    """Such as "1, 2, 3"."""
    return ", ".join(map(str, values))


def with_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, if there are several."""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


# Density and T


def grid(planned: Sequence[Any], out: Path) -> None:
    """Mean test accuracy by density and T."""
    cells: dict[tuple[float, int], list[float]] = {}
    done = read_done(planned)
    for run, config in done:
        cells.setdefault((config.s, config.t), []).append(run.accuracy)
    kappas = sorted({config.s for _, config in done})  # the densest first
    windows = sorted({config.t for _, config in done})

    def text_of(kappa: float, window: int) -> str:
        values = cells.get((kappa, window))
        if values is None:
            return "-"
        return with_spread(values)

    config = done[0].config
    seeds = sorted({config.seed for _, config in done})
    labels = ["never" if t >= config.n_iters * config.shots else str(t) for t in windows]
    lines = [[density(kappa), *(text_of(kappa, t) for t in windows)] for kappa in kappas]
    zero_shot = fmean(run.zero_shot for run, _ in done)
    text = (
        f"Test accuracy in percent, mean ± standard deviation over {plural(len(seeds), 'seed')}: "
        f"{config.dataset}, {plural(config.shots, 'shot')}, learning rate {config.lr:g}; "
        f"zero-shot {zero_shot:.1f}.\n\n"
        + markdown(["density", *(f"T = {label}" for label in labels)], lines)
    )

    def draw() -> Any:
        figure, (axes,) = canvas(
            f"Density and T: {config.dataset}, {plural(config.shots, 'shot')}", panels=1
        )
        means = [[fmean(cells.get((k, t), [math.nan])) for t in windows] for k in kappas]
        image = axes.imshow(means, cmap="cividis", aspect="auto")
        middle = sum(image.get_clim()) / 2
        for row, kappa in enumerate(kappas):
            for column, t in enumerate(windows):
                ink = "white" if means[row][column] < middle else "black"
                axes.text(
                    column, row, text_of(kappa, t), ha="center", va="center", color=ink, fontsize=9
                )
        axes.set_xticks(range(len(windows)), labels=labels)
        axes.set_yticks(range(len(kappas)), labels=map(density, kappas))
        axes.set(xlabel="T (iterations between two draws)", ylabel="density (share of entries)")
        axes.grid(False)
        figure.colorbar(image, label="test accuracy (%)")
        return figure

    write(out, "Density and T", text, draw)


def density(kappa: float) -> str:
    """1 - kappa, without the noise of its last digits."""
    return f"{1 - kappa:.6g}"


# Ablation of the supports


def ablation(planned: Sequence[Any], out: Path) -> None:
    """Test accuracy by how both supports are chosen, with paired differences to SO."""
    rows: dict[tuple[str, str, bool], dict[int, float]] = {}
    done = read_done(planned)
    for run, config in done:
        redrawn = config.t < config.n_iters * config.shots
        key = config.grad_support, config.moment_support, redrawn
        rows.setdefault(key, {})[config.seed] = run.accuracy
    usual = ("random", "magnitude", True)

    def order(key: tuple[str, str, bool]) -> tuple:
        return key != usual, not key[2], key[0] != "random", key[1]

    rows = {key: rows[key] for key in sorted(rows, key=order)}

    def name(key: tuple[str, str, bool]) -> tuple[str, str, str]:
        gradient = {"random": "random", "magnitude": "largest g"}[key[0]]
        moment = {"magnitude": "largest m", "random": "random", "fixed": "first S_g"}[key[1]]
        return (gradient, moment, "yes") if key[2] else (gradient, "the same entries", "no")

    lines = []
    for key, by_seed in rows.items():
        values = list(by_seed.values())
        accuracy = with_spread(values)
        both = by_seed.keys() & rows.get(usual, {}).keys()
        difference = "-"
        if key != usual and both:
            mean, half = interval([by_seed[seed] - rows[usual][seed] for seed in sorted(both)])
            difference = f"{mean:+.1f}" + (f" ± {half:.1f}" if half is not None else "")
        lines.append([*name(key), accuracy, difference, str(len(values))])
    config = done[0].config
    zero_shot = fmean(run.zero_shot for run, _ in done)
    text = (
        f"Test accuracy in percent, mean ± standard deviation over seeds: {config.dataset}, "
        f"{plural(config.shots, 'shot')}, density {density(config.s)}, learning rate "
        f"{config.lr:g}; zero-shot {zero_shot:.1f}. The first row is SO; differences to it are "
        "paired by seed, ± half of their 95 % confidence interval.\n\n"
        + markdown(
            ["gradient support S_g", "moment support S_m", "redrawn", "accuracy", "to SO", "seeds"],
            lines,
        )
    )

    def draw() -> Any:
        figure, (axes,) = canvas(
            f"Supports: {config.dataset}, {plural(config.shots, 'shot')}", panels=1
        )
        labels = []
        for row, (key, by_seed) in enumerate(rows.items()):
            colour = COLOURS[0] if key == usual else "0.35"
            values = list(by_seed.values())
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.4, markersize=5)
            axes.plot(fmean(values), row, "|", color=colour, markersize=16, markeredgewidth=2.5)
            gradient, moment, redrawn = name(key)
            suffix = "" if redrawn == "yes" else ", never redrawn"
            labels.append(f"{gradient}; {moment}{suffix}")
        axes.axvline(zero_shot, color="0.45", linestyle=(0, (1, 1)))
        axes.text(zero_shot, -0.55, " zero-shot", color="0.35", fontsize=8, va="bottom")
        axes.set_yticks(range(len(rows)), labels=labels)
        axes.set_ylabel("gradient support; moment support")
        axes.set_ylim(len(rows) - 0.4, -0.7)
        axes.set_xlabel("test accuracy (%); dots: seeds, bars: means")
        axes.set_title(axes.get_title(loc="left"), loc="right")
        axes.set_title("", loc="left")
        figure.set_size_inches(8, 1.2 + 0.36 * len(rows))
        return figure

    write(out, "Supports", text, draw)


KINDS = {"compare": compare, "rates": rates, "grid": grid, "ablation": ablation}
