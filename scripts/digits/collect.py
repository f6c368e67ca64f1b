"""Collect the finished runs of the digits study in docs/digits/runs.csv and curves.csv.gz.

    python scripts/digits/collect.py        # after the runs, which scripts/digits/study.sh makes

Weights that runs saved are evaluated on the task and on the glyphs of the pre-training, and
interpolated (WiSE-FT) for some.
"""

import gzip
import json
import platform
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits import glyphs
from digits.study import CURVES_FILE, KEY, RUNS_FILE, SETTINGS
from reporting import ROOT
from reporting.experiments import load_finished, read_experiment

import clip
from datasets import build_dataset
from datasets.loader import ImageLoader
from run_utils import OneLineErrorParser, path_arg
from runs.cli import run_cli
from runs.records import Run
from runs.weights import load_weights
from utils import atomic_write, to_csv

CONFIGS = ROOT / "configs/experiments"
EXPERIMENTS = (
    "lr", "compare", "moments", "overfitting", "grid", "ablation", "greek_lr", "greek",
    "greek_rates",
)  # fmt: skip
INTERPOLATED = ("compare", "greek")  # experiments, at SHOTS
SHOTS = (4, 16)
ALPHAS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
PER_CLASS, SEED = 20, 0  # glyphs of each class in the test set, and the seed of their distortions


def main() -> int:
    parser = OneLineErrorParser(prog="collect.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--root", type=path_arg, default=Path(), help="folder with results (.)")
    add("--out", type=path_arg, default=ROOT / "docs/digits", help="folder to write")
    args = parser.parse_args()
    return run_cli(lambda: collect(args.root, args.out), parser.prog)


def collect(root: Path, out: Path) -> None:
    """Write the files of all finished runs below a folder, which must be of one commit."""
    torch.set_num_threads(1)
    rows, curves = {}, []
    for name in EXPERIMENTS:
        planned = read_experiment(CONFIGS / f"digits_{name}.yaml", (), root).runs
        planned.sort(key=lambda run: (run.config.shots, run.config.seed))
        for run in load_finished(planned):
            if run.folder not in rows:
                rows[run.folder] = row = make_row(run, name)
                curves += make_curve(run, [row[column] for column in KEY])
    if len(commits := {row["git_commit"] for row in rows.values()}) != 1:
        raise ValueError(f"runs of {len(commits)} commits ({', '.join(commits)}): keep one's")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / RUNS_FILE, to_csv(list(row), [row.values() for row in rows.values()]))
    header = (*KEY, "iteration", "loss", "test_accuracy")
    atomic_write(out / CURVES_FILE, gzip.compress(to_csv(header, curves).encode(), mtime=0))
    print(f"{len(rows)} runs: {out}")


def make_row(run: Run, experiment: str) -> dict[str, Any]:
    """Return a run's line of runs.csv by column, rounded."""
    result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    interpolated = experiment in INTERPOLATED and run.shots in SHOTS
    points = evaluate_weights(run, ALPHAS if interpolated else (1.0,))
    return {
        "experiment": experiment,
        **{key: getattr(run, key) for key in KEY if key != "experiment"},
        **{key: run.config[key] for key in SETTINGS},
        "zero_shot_accuracy": round(run.zero_shot_accuracy, 4),
        "final_accuracy": round(run.final_accuracy, 4),
        "iterations": run.iterations,
        "wall_seconds": round(run.wall_seconds, 1),
        "data_digest": run.data["digest"][:12],
        "processor": processor_name(),
        "torch": run.versions["torch"],
        "git_commit": run.git_commit[:12],
        "glyphs_accuracy": points[1.0][1] if points else "",
        "per_class": " ".join(f"{accuracy:.1f}" for accuracy in result["per_class"].values()),
        "interpolation": "; ".join(f"{alpha:g} {a} {b}" for alpha, (a, b) in points.items()),
    }


def processor_name() -> str:
    """Return the name of this machine's processor, as Linux has it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.machine()


def make_curve(run: Run, key: list) -> list[list]:
    """Return a run's lines of curves.csv.gz; none without --eval_every."""
    accuracies = dict(run.eval_curve.round(4).tolist())
    return [
        [*key, iteration, float(f"{loss:.4g}"), accuracies.get(iteration, "")]
        for iteration, loss in enumerate(run.loss_curve, start=1)
        if run.config["eval_every"]
    ]


def evaluate_weights(run: Run, alphas: Sequence[float]) -> dict[float, tuple[float, float]]:
    """Return accuracies on task and glyphs by alpha; {} if the run saved no weights."""
    weights, points = run.folder / "weights.safetensors", {}
    for alpha in alphas if weights.is_file() else ():
        model, _ = clip.load("ViT-Tiny/8", "cpu")
        load_weights(model, weights, alpha)
        tasks = load_test_sets(run.config["dataset"])
        points[alpha] = tuple(round(glyphs.zero_shot_accuracy(model, *task), 4) for task in tasks)
    return points


@cache
def load_test_sets(name: str) -> list[tuple[Tensor, Tensor, Sequence[str]]]:
    """Return images, labels and class names to test on: of a dataset, and of the glyphs."""
    dataset = build_dataset(name, None, shots=1)
    ((pixels, labels),) = ImageLoader(32).test_batches(dataset.test, len(dataset.test))
    task = glyphs.normalize(pixels / 255), labels, dataset.classnames
    return [task, (*glyph_test_set(), glyphs.CLASSNAMES)]


def glyph_test_set() -> tuple[Tensor, Tensor]:
    """Draw images (1400, 3, 32, 32) of the pre-training's classes from another seed; and labels."""
    generator = Generator().manual_seed(SEED)
    distances, labels = glyphs.draw_glyphs()
    chosen = []
    for label in range(len(glyphs.CLASSNAMES)):
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randint(len(rows), (PER_CLASS,), generator=generator)])
    rows = torch.cat(chosen)
    images, _ = glyphs.render_glyphs(distances[rows], 1.0, generator)
    return glyphs.normalize(images), labels[rows]


if __name__ == "__main__":
    sys.exit(main())
