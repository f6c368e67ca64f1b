"""The digits study: its main table, forgetting, and all parts on one page."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from signs import CLASSNAMES

from reporting import ROOT, moments, wise
from reporting.experiments import Cells, read_experiment
from reporting.figures import COLOURS as INKS
from reporting.figures import LINES, MARKS, can_draw, canvas, png, with_legend
from reporting.forgetting import PER_CLASS, forgetting
from reporting.kinds import write
from reporting.numbers import METHODS, Study, find_runs, interval, studies
from reporting.tables import pairs_table
from runs.records import read_run
from utils import atomic_write, plural

PARTS = {
    "rates": "Learning rates",
    "overfitting": "Overfitting",
    "grid": "Density and T",
    "ablation": "Supports",
    "moments_rates": "Learning rates of other moments",
    "moments": "Moments",
    "wise": "Interpolation",  # made here, of the comparison's weights
}


# Tables and figures


def draw_forgetting(before: float, after: Cells) -> Any:
    """Accuracy on the printed signs against shots."""
    figure, (axes,) = canvas("Printed signs after adaptation to handwriting", panels=1)
    shots = sorted({n for n, _ in after})
    for i, (method, label) in enumerate(METHODS.items()):
        points = [(n * 2 ** (0.06 * (i - 1)), list(after[n, method].values())) for n in shots]
        axes.errorbar(
            [x for x, _ in points], [fmean(values) for _, values in points],
            yerr=[interval(values)[1] or 0 for _, values in points], label=label,
            color=INKS[i], marker=MARKS[i], linestyle=LINES[i], capsize=3, markersize=5,
        )  # fmt: skip
    axes.axhline(
        before, color="0.45", linestyle=(0, (1, 1)), label=f"zero-shot, before ({before:.1f})"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, labels=map(str, shots))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="shots (training images per class)", ylabel="accuracy on 70 signs (%)")
    return with_legend(figure, "mean, 95 % interval\nover seeds")


# The page


class Found(NamedTuple):
    """All measurements on the page."""

    study: Study  # the main comparison
    rates: dict[str, float]  # by method
    before: float  # accuracy on the printed signs
    after: Cells
    after_moments: Cells  # the same of SO with other moments
    seconds: dict[str, float]  # of all runs together, by part


def gather(root: Path, extra: Sequence[str]) -> Found:
    """Read the runs of all parts, and measure forgetting.

    Args:
        root: Folder that the experiments' folders are relative to.
        extra: Arguments of main.py that the runs were made with.

    Raises:
        ValueError: Runs are missing or damaged.
    """
    experiments = {
        part: read_experiment(ROOT / f"configs/experiments/digits_{part}.yaml", extra, root)
        for part in ("compare", *PARTS)
        if part != "wise"
    }
    compared = experiments["compare"]
    complaints: list[str] = []
    found = find_runs([run.folder for run in compared.runs], complaints.append)
    if complaints or not found:
        raise ValueError("; ".join(complaints) or "no run is finished: scripts/digits_study.sh")
    (study,) = studies(found)
    seconds, counted = {}, set()
    for part, experiment in experiments.items():
        folders = {run.folder for run in experiment.runs if run.is_done} - counted
        seconds[part] = sum(read_run(folder).seconds for folder in folders)
        counted |= folders  # parts share runs
    rates = {run.config.method: run.config.lr for run in compared.runs}
    before, after = forgetting(compared.runs)
    _, after_moments = forgetting(experiments["moments"].runs)
    paths = wise.measure(compared.runs)
    write(root / "docs/digits/wise", PARTS["wise"], wise.table(paths), lambda: wise.draw(paths))
    return Found(study, rates, before, after, after_moments, seconds)


def page(found: Found, out: Path) -> str:
    """The study's page in Markdown; `out` is its folder, which has the tables of its parts."""
    parts = [*introduction(found), *comparison(found)]
    for part, title in PARTS.items():
        parts += part_of(out, part, title)
        if part == "moments":
            parts += moments_forgotten(found.after_moments)
    curves = sorted((out / "overfitting").glob("*/curves-*.png"))
    parts += ["## Overfitting", "Four times as many iterations as usual, no early stop."]
    parts += [f"![curves]({path.relative_to(out)})" for path in curves]
    times = ", ".join(f"{part} {count:,.0f}" for part, count in found.seconds.items())
    parts += [
        "## Time",
        "Seconds that the runs of each part took, added up; two ran at a time, on a machine with "
        f"other work, which is in these times and in those of the tables: {times}.",
    ]
    return "\n\n".join(parts) + "\n"


def part_of(out: Path, part: str, title: str) -> list[str]:
    """A part's heading, what it says in words where someone wrote that down, table and figure."""
    table, reading = out / part / "table.md", out / part / "reading.md"
    if not table.is_file():
        return []
    text = table.read_text(encoding="utf-8").partition("\n\n")[2].strip()
    words = [reading.read_text(encoding="utf-8").strip()] if reading.is_file() else []
    return [f"## {title}", *words, text.replace("](figure.png)", f"]({part}/figure.png)")]


def moments_forgotten(after: Cells) -> list[str]:
    """What SO with other moments forgets: means, differences to SO, and their figure."""
    return [
        "Accuracy on the printed signs after these runs, as under Forgetting, and differences to "
        "SO:",
        moments.means_table(after),
        moments.differences_table(after),
        "![forgetting](moments/forgetting.png)",
    ]


def introduction(found: Found) -> list[str]:
    """The page's heading, and how it was made."""
    runs = found.study.runs()
    commits = sorted({run.made_by[0] for run in runs})
    seeds = plural(len({run.seed for run in runs}), "seed")
    return [
        "# The comparison in miniature",
        f"Made by `bash scripts/digits_study.sh`: the embedded digits and the tiny CLIP, {seeds}. "
        f"Commit {', '.join(commits)}, PyTorch {runs[0].made_by[1]}, {processor()}.",
    ]


def comparison(found: Found) -> list[str]:
    """The main table with its pairs, and the table of forgetting."""
    runs = found.study.runs()
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    chosen = ", ".join(f"{METHODS[m]} {found.rates[m]:g}" for m in METHODS)
    return [
        "## Accuracy",
        "Test accuracy in percent, mean ± half of its 95 % confidence interval over seeds "
        f"{seeds}; zero-shot {runs[0].zero_shot:.1f}. Learning rates, [chosen](rates/table.md) on "
        f"validation images of other seeds: {chosen}.",
        moments.means_table(moments.cells_of(runs)),
        "Differences in points, paired by seed, ± half of their 95 % confidence interval; the "
        "number of seeds on which SO is better, equal and worse; p of the two-sided sign test. The "
        "last row takes all shots together, as if they were independent.",
        pairs_table(found.study) or "",
        "![accuracy](compare/ViT-Tiny-8/accuracy-digits.png)",
        "[All tables](compare/tables.md), memory and time included.",
        "## Forgetting",
        f"Accuracy in percent on the {len(CLASSNAMES)} classes of printed signs that pre-training "
        f"used, {PER_CLASS} new images of each; {found.before:.1f} before adaptation.",
        moments.means_table(found.after),
        "![forgetting](forgetting.png)",
    ]


def processor() -> str:
    """The processor's name, and how many cores there are."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {plural(os.cpu_count() or 1, 'core')}"


def write_page(root: Path, extra: Sequence[str]) -> str:
    """Gather, draw the forgetting, write docs/digits/README.md below `root`, and return it."""
    out = root / "docs" / "digits"
    found = gather(root, extra)
    if can_draw():
        figure = png(lambda: draw_forgetting(found.before, found.after))
        atomic_write(out / "forgetting.png", figure)
        panels = [("Accuracy on 70 printed signs", found.after_moments)]
        figure = png(lambda: moments.draw_differences(panels))
        atomic_write(out / "moments" / "forgetting.png", figure)
    text = page(found, out)
    atomic_write(out / "README.md", text)
    return text
