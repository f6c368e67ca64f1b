"""What the digits study found: main table, what was forgotten, all parts on one page.

    python scripts/digits_study.py        # after its runs: scripts/digits_study.sh makes them

What was forgotten is measured on the 70 classes of printed signs that the tiny CLIP was pre-trained
on (scripts/pretrain_tiny.py), drawn anew.
"""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from experiment import Experiment, read_experiment
from pretrain_tiny import (
    CLASSNAMES,
    COLOURS,
    bend,
    coarsen,
    draw_signs,
    normalise,
    paint,
    place,
)
from report import interval, markdown, pairs_table
from reporting.figures import COLOURS as INKS
from reporting.figures import LINES, MARKS, can_draw, canvas, png, with_legend
from reporting.numbers import LABELS, METHODS, find_runs, plural, studies
from torch import Tensor

import clip
from optimizers.delta import apply_delta, read_delta
from results import read_run
from run_utils import Parser
from utils import atomic_write, explain, one_line

HERE = Path(__file__).resolve().parent
PARTS = {
    "rates": "Learning rates",
    "overfitting": "Overfitting",
    "grid": "Density and T",
    "ablation": "Supports",
}
PER_CLASS, SEED = 20, 0  # images of each printed sign, and the seed of their distortions


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


def forgetting(compared: Experiment) -> tuple[float, dict[tuple[int, str], list[float]]]:
    """Accuracy on the printed signs before adaptation, and after it by (shots, method)."""
    images, labels = printed_signs()
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    before = remembered(model, images, labels)
    after: dict[tuple[int, str], list[float]] = {}
    for run in compared.runs:
        model, _ = clip.load("ViT-Tiny/8", "cpu")
        apply_delta(model, read_delta(run.folder / "weights.safetensors"))
        key = run.config.shots, run.config.method
        after.setdefault(key, []).append(remembered(model, images, labels))
    return before, dict(sorted(after.items()))


def with_interval(values: Sequence[float]) -> str:
    """Mean ± half of its 95 % confidence interval."""
    mean, half = interval(values)
    return f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else "")


def table_of(cells: dict[tuple[int, str], list[float]]) -> str:
    """A table of values by shots and method."""
    shots = sorted({n for n, _ in cells})
    lines = [
        [str(n), *(with_interval(cells[n, m]) if (n, m) in cells else "-" for m in METHODS)]
        for n in shots
    ]
    return markdown(["shots", *METHODS.values()], lines)


def draw_forgetting(before: float, after: dict[tuple[int, str], list[float]]) -> Any:
    """Accuracy on the printed signs against shots."""
    figure, (axes,) = canvas("Printed signs after adaptation to handwriting", panels=1)
    shots = sorted({n for n, _ in after})
    for i, method in enumerate(METHODS):
        points = [(n * 2 ** (0.06 * (i - 1)), after[n, method]) for n in shots]
        axes.errorbar(
            [x for x, _ in points], [fmean(values) for _, values in points],
            yerr=[interval(values)[1] or 0 for _, values in points], label=LABELS[method],
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


def page(out: Path, root: Path, extra: Sequence[str]) -> str:
    """Measure what was forgotten, draw it, and write the study's page.

    Args:
        out: The page's folder, which has those of the parts.
        root: Folder that the experiments' folders are relative to.
        extra: Arguments of main.py that the runs were made with.

    Raises:
        ValueError: Runs are missing or damaged.
    """
    configs = HERE.parent / "configs" / "experiments"
    experiments = {
        part: read_experiment(configs / f"digits_{part}.yaml", extra, root)
        for part in ("compare", *PARTS)
    }
    complaints: list[str] = []
    found = find_runs([run.folder for run in experiments["compare"].runs], complaints.append)
    if complaints or not found:
        raise ValueError("; ".join(complaints) or "no run is finished: scripts/digits_study.sh")
    (study,) = studies(found)
    accuracies: dict[tuple[int, str], list[float]] = {}
    for run in found:
        accuracies.setdefault((run.shots, run.method), []).append(run.accuracy)
    before, after = forgetting(experiments["compare"])
    if can_draw():
        atomic_write(out / "forgetting.png", png(lambda: draw_forgetting(before, after)))

    seconds = {
        part: sum(read_run(run.folder).seconds for run in experiment.runs if run.is_done)
        for part, experiment in experiments.items()
    }
    version = found[0].made_by[1]
    commits = sorted({run.made_by[0] for run in found})
    rates = {run.config.method: run.config.lr for run in experiments["compare"].runs}
    chosen = ", ".join(f"{METHODS[m]} {rates[m]:g}" for m in METHODS)
    seeds = sorted({run.seed for run in found})
    parts = [
        "# The comparison in miniature",
        "Made by `bash scripts/digits_study.sh`: the embedded digits and the tiny CLIP, "
        f"{plural(len(seeds), 'seed')}. Commit {', '.join(commits)}, PyTorch {version}, "
        f"{processor()}.",
        "## Accuracy",
        f"Test accuracy in percent, mean ± half of its 95 % confidence interval over seeds "
        f"{', '.join(map(str, seeds))}; zero-shot {found[0].zero_shot:.1f}. Learning rates, "
        f"[chosen](rates/table.md) on validation images of other seeds: {chosen}.",
        table_of(accuracies),
        "Differences in points, ± half of their 95 % confidence interval, paired by seed; on how "
        "many seeds SO is better, equal, worse; p of the two-sided sign test. The last row takes "
        "all shots together, as if they were independent.",
        pairs_table(study) or "",
        "![accuracy](compare/ViT-Tiny-8/accuracy-digits.png)",
        "[All tables](compare/tables.md), memory and time included.",
        "## What was forgotten",
        f"Accuracy in percent on {len(CLASSNAMES)} classes of printed signs, those of the "
        f"pre-training, {PER_CLASS} new images of each; before adaptation {before:.1f}.",
        table_of(after),
        "![forgetting](forgetting.png)",
    ]
    for part, title in PARTS.items():
        table = out / part / "table.md"
        if table.is_file():
            text = table.read_text(encoding="utf-8").partition("\n\n")[2].strip()
            parts += [f"## {title}", text.replace("](figure.png)", f"]({part}/figure.png)")]
    curves = sorted((out / "overfitting").glob("*/curves-*.png"))
    parts += ["## Overfitting", "Four times as many iterations as usual, no early stop."]
    parts += [f"![curves]({path.relative_to(out)})" for path in curves]
    parts += [
        "## Time",
        "Seconds of all runs together, two of which go at a time; whatever else the machine did "
        "is in them, and in the times of the tables: "
        + ", ".join(f"{part} {count:,.0f}" for part, count in seconds.items())
        + ".",
    ]
    text = "\n\n".join(parts) + "\n"
    atomic_write(out / "README.md", text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(prog="digits_study.py", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="folder of all its folders (.)")
    args, extra = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    try:
        print(page(args.root / "docs" / "digits", args.root, extra))
        return 0
    except (ValueError, OSError) as error:
        print(one_line(f"digits_study.py: error: {explain(error)}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
