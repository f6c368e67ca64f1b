"""Interpolation: accuracy on the task against what is kept of pre-training, weights scaled.

The saved weights of the digits study's main comparison are scaled to base + alpha (trained - base),
as --wise does, and evaluated; nothing is trained anew.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import clip
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import build_dataset
from datasets.loader import ImageLoader
from optimizers.delta import apply_delta, interpolated_weights, read_delta
from reporting.experiments import Planned
from reporting.figures import COLOURS, LINES, MARKS, canvas, with_legend
from reporting.forgetting import printed_signs, remembered
from reporting.markdown import markdown
from reporting.numbers import METHODS, interval
from reporting.tables import with_spread
from train import evaluate
from utils import plural

ALPHAS = [step / 10 for step in range(11)]
SHOTS = (4, 16)
COMPARED = (0.5, 0.7, 0.9)  # alphas whose differences to 1 are told

Point = tuple[float, float]  # accuracy on the task, and on the printed signs, in percent
Paths = dict[tuple[int, str], list[list[Point]]]  # by (shots, method), for each seed, each alpha


def measure(planned: Sequence[Planned]) -> Paths:
    """Evaluate the saved weights of finished runs at each alpha."""
    signs = printed_signs()
    dataset = build_dataset("digits", None, 1)
    model, _ = clip.load("ViT-Tiny/8", "cpu")
    loader = ImageLoader(model.visual.input_resolution, cache_mb=100)
    text_tokens = tokenize_class_prompts(model, dataset.classnames, dataset.template)
    classifier = ZeroShotClassifier(model, text_tokens)

    def point() -> Point:
        found = evaluate(classifier, loader, dataset.test)
        return found.accuracy, remembered(model, *signs)

    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero, paths = point(), {}
    for run in planned:
        if run.config.shots not in SHOTS or not run.is_done:
            continue
        model.load_state_dict(base)
        delta = read_delta(run.folder / "weights.safetensors")
        apply_delta(model, delta)
        matrices = {name: model.get_parameter(name) for name in delta.tensors}
        path = [zero]
        for alpha in ALPHAS[1:]:
            with interpolated_weights(matrices, base, alpha):
                path.append(point())
        paths.setdefault((run.config.shots, run.config.method), []).append(path)
    return dict(sorted(paths.items()))


def means(of_seeds: list[list[Point]]) -> list[Point]:
    """The mean over seeds at each alpha."""
    columns = zip(*of_seeds, strict=True)
    return [tuple(map(fmean, zip(*points, strict=True))) for points in columns]


def table(paths: Paths) -> str:
    """For each number of shots a table: alpha down, methods across."""
    parts = [
        "Accuracy in percent on the task's test images / on the 70 classes of printed signs that "
        "pre-training used, weights = base + alpha (trained - base); means over "
        f"{plural(min(map(len, paths.values())), 'seed')} of the main comparison."
    ]
    for shots in sorted({n for n, _ in paths}):
        columns = [means(paths[shots, method]) for method in METHODS]
        lines = [
            [f"{alpha:g}", *(f"{column[row][0]:.1f} / {column[row][1]:.1f}" for column in columns)]
            for row, alpha in enumerate(ALPHAS)
        ]
        header = [f"alpha, {plural(shots, 'shot')}", *METHODS.values()]
        parts.append(markdown(header, lines))
    parts.append(
        "Differences to the trained weights (alpha 1) in points, on the task / on the printed "
        "signs, paired by seed, ± half of their 95 % confidence interval:"
    )
    return "\n\n".join([*parts, differences_table(paths)])


def differences_table(paths: Paths) -> str:
    """What some alphas change of both accuracies."""
    lines = []
    for shots in sorted({n for n, _ in paths}):
        for row, alpha in enumerate(ALPHAS):
            if alpha not in COMPARED:
                continue
            texts = []
            for method in METHODS:
                ends = [(path[row], path[-1]) for path in paths[shots, method]]
                found = ([a[i] - b[i] for a, b in ends] for i in (0, 1))
                texts.append(" / ".join(with_spread(*interval(d), "+.1f") for d in found))
            lines.append([str(shots), f"{alpha:g}", *texts])
    return markdown(["shots", "alpha", *METHODS.values()], lines, left=2)


def draw(paths: Paths) -> Any:
    """Task against printed signs: a line for each method, a mark for each alpha."""
    all_shots = sorted({n for n, _ in paths})
    figure, panels = canvas("", panels=len(all_shots))
    for axes, shots in zip(panels, all_shots, strict=True):
        for i, (method, label) in enumerate(METHODS.items()):
            line = means(paths[shots, method])
            axes.plot(
                [kept for _, kept in line], [task for task, _ in line], label=label,
                color=COLOURS[i], marker=MARKS[i], linestyle=LINES[i], markersize=4,
            )  # fmt: skip
            task, kept = line[-1]
            axes.plot(
                kept, task, marker="o", markersize=12, color=COLOURS[i],
                markerfacecolor="none", linestyle="",
            )  # fmt: skip
        axes.set_title(plural(shots, "shot"), loc="left")
        axes.set(xlabel="accuracy on 70 printed signs (%)", ylabel="accuracy on the task (%)")
    return with_legend(figure, "marks: alpha from 0\n(where lines meet)\nto 1 (ringed), by 0.1")
