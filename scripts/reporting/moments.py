"""Do the moments matter? SO beside variants with other moments or none: tables and figures."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from reporting.experiments import Cells, variant
from reporting.figures import COLOURS, LINES, MARKS, canvas, with_legend
from reporting.markdown import markdown
from reporting.numbers import METHODS, interval
from reporting.tables import with_spread
from runs.records import Run
from utils import plural

NAMES = {
    **METHODS,
    "so, moments none": "no moments",
    "so, moments per_entry": "corrections by age",
    "so, moment_support reset": "moments reset",
}


def label(name: str) -> str:
    """A variant's name for readers."""
    return NAMES.get(name, name)


def cells_of(runs: Sequence[Run]) -> Cells:
    """Accuracies of runs."""
    cells: Cells = {}
    for run in sorted(runs, key=lambda run: (run.shots, run.seed)):
        key = run.shots, variant(run.method, run.settings)
        cells.setdefault(key, {})[run.seed] = run.accuracy
    return cells


def axes_of(cells: Cells) -> tuple[list[int], list[str]]:
    """Shots and variants, in order: SO first."""
    order = [*NAMES, *sorted({name for _, name in cells} - NAMES.keys())]
    return sorted({n for n, _ in cells}), [v for v in order if any(v == name for _, name in cells)]


def differences(cells: Cells, name: str, shots: Sequence[int]) -> list[float]:
    """A variant's differences to SO, one for each seed: the mean over shots, where both ran."""
    pairs = [(cells.get((n, name), {}), cells.get((n, "so"), {})) for n in shots]
    seeds = [seed for seed in pairs[0][0] if all(seed in a and seed in b for a, b in pairs)]
    return [fmean(a[seed] - b[seed] for a, b in pairs) for seed in sorted(seeds)]


def means_table(cells: Cells) -> str:
    """Means by shots and variant, ± half of their 95 % confidence intervals."""
    shots, names = axes_of(cells)

    def text(n: int, name: str) -> str:
        values = list(cells.get((n, name), {}).values())
        return with_spread(*interval(values), ".1f") if values else "-"

    lines = [[str(n), *(text(n, name) for name in names)] for n in shots]
    return markdown(["shots", *map(label, names)], lines)


def differences_table(cells: Cells) -> str:
    """Differences to SO, ± half of their 95 % confidence intervals, and seeds won and lost."""
    shots, names = axes_of(cells)
    header, lines = ["shots"], []
    for name in names[1:]:
        header += [f"{label(name)} - SO", "better / equal / worse"]
    for title, which in [*((str(n), [n]) for n in shots), ("all", shots)]:
        line = [title]
        for name in names[1:]:
            found = differences(cells, name, which)
            counts = [sum(d > 0 for d in found), found.count(0), sum(d < 0 for d in found)]
            line += [
                with_spread(*interval(found), "+.2f") if found else "-",
                " / ".join(map(str, counts)) if found else "-",
            ]
        lines.append(line)
    return markdown(header, lines)


def moments_text(runs: Sequence[Run]) -> str:
    """Accuracy by shots and variant, and differences to SO."""
    cells = cells_of(runs)
    rates = {variant(run.method, run.settings): run.settings["lr"] for run in runs}
    chosen = ", ".join(f"{label(name)} {rates[name]:g}" for name in axes_of(cells)[1])
    zero_shot = fmean(run.zero_shot for run in runs)
    introduction = (
        "Test accuracy in percent, mean ± half of its 95 % confidence interval over "
        f"{plural(len({run.seed for run in runs}), 'seed')}: {runs[0].dataset}, zero-shot "
        f"{zero_shot:.1f}. Learning rates: {chosen}."
    )
    paired = (
        "Differences to SO in points, paired by seed, ± half of their 95 % confidence interval, "
        "and the number of seeds on which the variant is better, equal and worse. The last row has "
        "the mean over all shots of each seed."
    )
    return "\n\n".join([introduction, means_table(cells), paired, differences_table(cells)])


def draw_differences(panels: Sequence[tuple[str, Cells]]) -> Any:
    """Differences to SO against shots: a panel for each quantity, a line for each variant."""
    figure, all_axes = canvas("", panels=len(panels))
    for axes, (title, cells) in zip(all_axes, panels, strict=True):
        shots, names = axes_of(cells)
        axes.axhline(0, color="0.45", label="SO")
        for i, name in enumerate(names[1:], start=1):
            found = [interval(differences(cells, name, [n])) for n in shots]
            axes.errorbar(
                [n * 2 ** (0.08 * (i - 2)) for n in shots], [mean for mean, _ in found],
                yerr=[spread or 0 for _, spread in found], label=label(name), color=COLOURS[i],
                marker=MARKS[i], linestyle=LINES[i], capsize=3, markersize=5,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, labels=map(str, shots))
        axes.set_xticks([], minor=True)
        axes.set_title(title, loc="left")
        axes.set(xlabel="shots (training images per class)", ylabel="difference to SO (points)")
    return with_legend(figure, "mean, 95 % interval\nover seeds")
