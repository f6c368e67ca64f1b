"""Write the page of the digits study, docs/digits/README.md, from its runs.

    python scripts/digits/study.py        # after its runs, which scripts/digits/study.sh makes

The page's prose is kept. Tables, which stand between <!-- NAME --> and <!-- /NAME -->, and figures
are made again. They come from a list of StudyRun, wherever that was read.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from digits.glyphs import CLASSNAMES, draw_glyphs, render_glyphs, zero_shot_accuracy
from digits.pretrain import digits_images
from reporting import ROOT, figures, tables
from reporting.aggregate import (
    METHODS,
    BackboneResults,
    confidence_interval,
    group_by_backbone,
)
from reporting.experiment_reports import sweep
from reporting.experiments import load_finished, read_experiment
from reporting.markdown import markdown

import clip
from datasets.digits import CLASSNAMES as DIGITS
from optimizers.delta import apply_delta, interpolated_weights, read_delta
from run_utils import OneLineErrorParser
from runs.cli import run_cli
from runs.records import Run
from utils import atomic_write, plural

PAGE = ROOT / "docs/digits/README.md"
CONFIGS = ROOT / "configs/experiments"
EXPERIMENTS = ("lr", "compare", "overfitting", "grid", "ablation", "moments")
ALPHAS = [step / 10 for step in range(11)]  # of the interpolation
SHOTS = (4, 16)  # of the runs of the comparison that are interpolated
COMPARED_ALPHAS = (0.5, 0.7, 0.9)
PER_CLASS, SEED = 20, 0  # glyphs of each class in the test set, and the seed of their distortions


@dataclass(frozen=True, eq=False)
class StudyRun(Run):
    """A run of the study, and what its weights do."""

    experiment: str  # the first that lists it
    # By alpha, of the weights base + alpha (trained - base): accuracy in percent on the task, and
    # on the glyphs of the pre-training. {} where the run saved no weights.
    interpolation: Mapping[float, tuple[float, float]]

    @property
    def pretraining_accuracy(self) -> float:
        """Accuracy on the glyphs after the run."""
        return self.interpolation[1.0][1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="study.py", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="folder of all its folders (.)")
    args, extra = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    return run_cli(
        lambda: write_page(read_study(args.root, extra), args.root / "docs/digits"), parser.prog
    )


# Runs and what they remember


def read_study(root: Path, extra: Sequence[str] = ()) -> list[StudyRun]:
    """Read the finished runs of all experiments, and evaluate the weights that they saved.

    Args:
        root: Folder that the experiments' folders are relative to.
        extra: Arguments of main.py that the runs were made with.

    Raises:
        ValueError: An experiment has no finished run, or a result is damaged.
    """
    runs: dict[Path, StudyRun] = {}
    evaluate = WeightsEvaluator()
    for name in EXPERIMENTS:
        experiment = read_experiment(CONFIGS / f"digits_{name}.yaml", extra, root)
        for run in load_finished(experiment.runs):
            weights, alphas = run.folder / "weights.safetensors", []
            if run.folder not in runs and weights.is_file():
                alphas = ALPHAS if name == "compare" and run.shots in SHOTS else [1.0]
            points = {alpha: evaluate(weights, alpha) for alpha in alphas}
            study_run = StudyRun(**vars(run), experiment=name, interpolation=points)
            runs.setdefault(run.folder, study_run)
    return list(runs.values())


class WeightsEvaluator:
    """Evaluates weights on the digits and on the glyphs of the pre-training."""

    def __init__(self) -> None:
        self.model, _ = clip.load("ViT-Tiny/8", "cpu")
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.tasks = [(*digits_images("test"), DIGITS), (*glyph_test_set(), CLASSNAMES)]

    def __call__(self, path: Path, alpha: float) -> tuple[float, float]:
        """Return both accuracies in percent of the weights base + alpha (trained - base)."""
        self.model.load_state_dict(self.base)
        delta = read_delta(path)
        apply_delta(self.model, delta)
        weights = {name: self.model.get_parameter(name) for name in delta.tensors}
        with interpolated_weights(weights, self.base, alpha):
            return tuple(zero_shot_accuracy(self.model, *task) for task in self.tasks)


def glyph_test_set() -> tuple[Tensor, Tensor]:
    """Draw a test set of the pre-training's classes: normalized images (1400, 3, 32, 32), labels.

    They are distorted as in pre-training, from a seed that it did not use.
    """
    generator = Generator().manual_seed(SEED)
    distances, labels = draw_glyphs()
    chosen = []
    for label in range(len(CLASSNAMES)):
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randint(len(rows), (PER_CLASS,), generator=generator)])
    rows = torch.cat(chosen)
    images, _ = render_glyphs(distances[rows], 1.0, generator)
    return images, labels[rows]


# The page


def write_page(study: Sequence[StudyRun], out: Path) -> None:
    """Write the page with its tables, and its figures beside it."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in make_tables(study).items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{PAGE} has no place for {name}: {begin.strip()} and {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}{table}\n{end}{after}"
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "README.md", text)
    for name, draw in plan_figures(study).items():
        atomic_write(out / f"{name}.png", figures.render_png(draw))


def runs_of(study: Sequence[StudyRun], experiment: str) -> list[StudyRun]:
    """Return the runs of an experiment. SO's of the comparison are moments' runs as well."""
    shared = [r for r in study if r.experiment == "compare" and r.method == "so"]
    runs = [r for r in study if r.experiment == experiment]
    return shared + runs if experiment == "moments" else runs


def results_of(study: Sequence[StudyRun], experiment: str) -> BackboneResults:
    """Return the runs of an experiment by variant and shots."""
    return group_by_backbone(runs_of(study, experiment))[0]


def make_tables(study: Sequence[StudyRun]) -> dict[str, str]:
    """Return the tables of the page by name."""
    compared, moments = results_of(study, "compare"), results_of(study, "moments")
    seconds = Counter({r.experiment: 0 for r in study})
    for r in study:
        seconds[r.experiment] += r.wall_seconds
    return {
        "about": tables.provenance_line(compared),
        "accuracy": means_and_differences(compared, "final_accuracy"),
        "forgetting": tables.shots_table(compared, "pretraining_accuracy"),
        "lr": sweep(runs_of(study, "lr"), "lr_sweep")[0],
        "grid": sweep(runs_of(study, "grid"), "grid")[0],
        "ablation": means_and_differences(results_of(study, "ablation"), "final_accuracy"),
        "moments": means_and_differences(moments, "final_accuracy"),
        "moments_forgetting": means_and_differences(moments, "pretraining_accuracy"),
        "interpolation": interpolation_tables(study),
        "cost": tables.cost_table(compared),
        "time": ", ".join(f"{name} {count:,.0f}" for name, count in seconds.items()),
    }


def plan_figures(study: Sequence[StudyRun]) -> dict[str, Callable[[], Figure]]:
    """Return functions that draw the figures of the page, by name."""
    compared, moments = results_of(study, "compare"), results_of(study, "moments")
    ablation, overfitting = results_of(study, "ablation"), results_of(study, "overfitting")
    on_task = {"On the task": "final_accuracy"}
    on_both = on_task | {"On the glyphs": "pretraining_accuracy"}
    return {
        "accuracy": partial(figures.draw_accuracy, compared, compared.datasets),
        "forgetting": partial(draw_forgetting, study),
        "lr": sweep(runs_of(study, "lr"), "lr_sweep")[1],
        "grid": sweep(runs_of(study, "grid"), "grid")[1],
        "ablation": partial(figures.draw_differences, ablation, on_task),
        "moments": partial(figures.draw_differences, moments, on_both),
        "interpolation": partial(draw_interpolation, study),
        "overfitting": partial(figures.draw_curves, overfitting, *overfitting.datasets, 4),
    }


def means_and_differences(results: BackboneResults, key: str) -> str:
    """Return the table of means of a field of runs, and that of paired differences."""
    differences = tables.paired_differences_table(results, key)
    return f"{tables.shots_table(results, key)}\n\n{differences}"


def draw_forgetting(study: Sequence[StudyRun]) -> Figure:
    """Draw the accuracy on the glyphs against shots."""
    results = results_of(study, "compare")
    figure, (axes,) = figures.make_figure("Glyphs, after adaptation to handwriting")
    label = "accuracy on 70 classes of glyphs (%)"
    figures.plot_by_shots(axes, results, results.datasets, "pretraining_accuracy", label)
    before = next(r.interpolation[0.0][1] for r in study if 0.0 in r.interpolation)
    figures.plot_zero_shot(axes, before)
    return figures.add_legend(figure, figures.MEAN_STD)


def interpolation_paths(study: Sequence[StudyRun]) -> dict[tuple[int, str], list[Mapping]]:
    """Return the accuracies by alpha of each seed, by shots and method."""
    runs = [r for r in study if len(r.interpolation) > 1]
    return {
        (shots, name): [r.interpolation for r in runs if (r.shots, r.method) == (shots, method)]
        for shots in sorted({r.shots for r in runs})
        for method, name in METHODS.items()
    }


def interpolation_tables(study: Sequence[StudyRun]) -> str:
    """Return the table of both accuracies by alpha, and that of differences to alpha 1."""
    paths = interpolation_paths(study)

    def mean(path: Sequence[Mapping], alpha: float, which: int) -> str:
        return f"{fmean(points[alpha][which] for points in path):.1f}"

    def change(path: Sequence[Mapping], alpha: float, which: int) -> str:
        values = [points[alpha][which] - points[1.0][which] for points in path]
        return tables.format_spread(*confidence_interval(values), "+.1f")

    def table(cell: Callable, alphas: Sequence[float]) -> str:
        header = ["alpha", *(f"{name}, {plural(shots, 'shot')}" for shots, name in paths)]
        lines = []
        for alpha in alphas:
            texts = [f"{cell(path, alpha, 0)} / {cell(path, alpha, 1)}" for path in paths.values()]
            lines.append([f"{alpha:g}", *texts])
        return markdown(header, lines)

    return (
        f"Means over seeds on the task / on the glyphs:\n\n{table(mean, ALPHAS)}\n\nDifferences "
        "to alpha 1, paired by seed, ± half of their 95 % confidence intervals:\n\n"
        + table(change, COMPARED_ALPHAS)
    )


def draw_interpolation(study: Sequence[StudyRun]) -> Figure:
    """Draw the task against the glyphs: a line for each method, a marker for each alpha."""
    paths = interpolation_paths(study)
    all_shots = sorted({shots for shots, _ in paths})
    figure, panels = figures.make_figure("", panels=len(all_shots))
    for (shots, name), path in paths.items():
        axes = panels[all_shots.index(shots)]
        color, marker, line = figures.style(list(METHODS.values()).index(name))
        y, x = ([fmean(points[alpha][i] for points in path) for alpha in ALPHAS] for i in (0, 1))
        axes.plot(x, y, label=name, color=color, marker=marker, linestyle=line, markersize=4)
        axes.plot(x[-1], y[-1], "o", markersize=12, color=color, markerfacecolor="none")
        axes.set_title(plural(shots, "shot"), loc="left")
        axes.set(xlabel="accuracy on 70 classes of glyphs (%)", ylabel="accuracy on the task (%)")
    return figures.add_legend(figure, "markers: alpha from 0\n(where lines meet)\nto 1 (ringed)")


if __name__ == "__main__":
    sys.exit(main())
