"""The digits study: its main table, forgetting, and all parts on one page.

Forgetting is measured on the printed signs of the tiny CLIP's pre-training (signs.py), distorted
anew from a seed that pre-training did not use.
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from signs import CLASSNAMES, COLOURS, bend, coarsen, draw_signs, normalise, paint, place
from torch import Tensor

import clip
from optimizers.delta import apply_delta, read_delta
from reporting import ROOT
from reporting.experiments import Experiment, read_experiment
from reporting.figures import COLOURS as INKS
from reporting.figures import LINES, MARKS, can_draw, canvas, png, with_legend
from reporting.markdown import markdown
from reporting.numbers import METHODS, Study, find_runs, interval, studies
from reporting.tables import pairs_table, with_spread
from runs import read_run
from utils import atomic_write, plural

PARTS = {
    "rates": "Learning rates",
    "overfitting": "Overfitting",
    "grid": "Density and T",
    "ablation": "Supports",
}
PER_CLASS, SEED = 20, 0  # images of each printed sign, and the seed of their distortions

Cells = dict[tuple[int, str], list[float]]  # values by (shots, method), one for each seed


# Forgetting


def printed_signs() -> tuple[Tensor, Tensor]:
    """Draw a test set of the pre-training classes: images (N, 3, 32, 32) normalised, labels (N,).

    Distorted as in pre-training, from a seed that it did not use.
    """
    generator = torch.Generator().manual_seed(SEED)
    distances, labels = draw_signs()
    chosen = []
    for label in range(len(CLASSNAMES)):
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randint(len(rows), (PER_CLASS,), generator=generator)])
    rows = torch.cat(chosen)
    ink = place(coarsen(bend(distances[rows], 1.0, generator), 1.0, generator), 1.0, generator)
    colours = torch.randint(len(COLOURS), (len(rows),), generator=generator)
    return normalise(paint(ink, colours, 1.0, generator)), labels[rows]


@torch.no_grad()
def remembered(model: clip.CLIP, images: Tensor, labels: Tensor) -> float:
    """Percent of images of printed signs that are nearest to their own prompt."""
    tokens = model.tokenize([f"a photo of a {name}." for name in CLASSNAMES])
    texts = F.normalize(model.encode_text(tokens), dim=-1)  # (70, D)
    features = torch.cat([model.encode_image(part) for part in images.split(256)])
    return 100 * ((features @ texts.T).argmax(dim=1) == labels).double().mean().item()


def forgetting(compared: Experiment) -> tuple[float, Cells]:
    """Accuracy on the printed signs before adaptation, and after it by (shots, method)."""
    images, labels = printed_signs()
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    before = remembered(model, images, labels)
    after: Cells = {}
    for run in compared.runs:
        model, _ = clip.load("ViT-Tiny/8", "cpu")
        apply_delta(model, read_delta(run.folder / "weights.safetensors"))
        key = run.config.shots, run.config.method
        after.setdefault(key, []).append(remembered(model, images, labels))
    return before, dict(sorted(after.items()))


# Tables and figures


def table_of(cells: Cells) -> str:
    """A table of values by shots and method: mean ± half of its 95 % confidence interval."""
    lines = [
        [
            str(n),
            *(
                with_spread(*interval(cells[n, m]), ".1f") if (n, m) in cells else "-"
                for m in METHODS
            ),
        ]
        for n in sorted({n for n, _ in cells})
    ]
    return markdown(["shots", *METHODS.values()], lines)


def draw_forgetting(before: float, after: Cells) -> Any:
    """Accuracy on the printed signs against shots."""
    figure, (axes,) = canvas("Printed signs after adaptation to handwriting", panels=1)
    shots = sorted({n for n, _ in after})
    for i, (method, label) in enumerate(METHODS.items()):
        points = [(n * 2 ** (0.06 * (i - 1)), after[n, method]) for n in shots]
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
    }
    compared = experiments["compare"]
    complaints: list[str] = []
    found = find_runs([run.folder for run in compared.runs], complaints.append)
    if complaints or not found:
        raise ValueError("; ".join(complaints) or "no run is finished: scripts/digits_study.sh")
    (study,) = studies(found)
    seconds = {
        part: sum(read_run(run.folder).seconds for run in experiment.runs if run.is_done)
        for part, experiment in experiments.items()
    }
    rates = {run.config.method: run.config.lr for run in compared.runs}
    return Found(study, rates, *forgetting(compared), seconds)


def page(found: Found, out: Path) -> str:
    """The study's page in Markdown; `out` is its folder, which has the tables of its parts."""
    parts = [*introduction(found), *comparison(found)]
    for part, title in PARTS.items():
        table = out / part / "table.md"
        if table.is_file():
            text = table.read_text(encoding="utf-8").partition("\n\n")[2].strip()
            parts += [f"## {title}", text.replace("](figure.png)", f"]({part}/figure.png)")]
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
    cells: Cells = {}
    for run in runs:
        cells.setdefault((run.shots, run.method), []).append(run.accuracy)
    return [
        "## Accuracy",
        "Test accuracy in percent, mean ± half of its 95 % confidence interval over seeds "
        f"{seeds}; zero-shot {runs[0].zero_shot:.1f}. Learning rates, [chosen](rates/table.md) on "
        f"validation images of other seeds: {chosen}.",
        table_of(cells),
        "Differences in points, paired by seed, ± half of their 95 % confidence interval; the "
        "number of seeds on which SO is better, equal and worse; p of the two-sided sign test. The "
        "last row takes all shots together, as if they were independent.",
        pairs_table(found.study) or "",
        "![accuracy](compare/ViT-Tiny-8/accuracy-digits.png)",
        "[All tables](compare/tables.md), memory and time included.",
        "## Forgetting",
        f"Accuracy in percent on the {len(CLASSNAMES)} classes of printed signs that pre-training "
        f"used, {PER_CLASS} new images of each; {found.before:.1f} before adaptation.",
        table_of(found.after),
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
    text = page(found, out)
    atomic_write(out / "README.md", text)
    return text
