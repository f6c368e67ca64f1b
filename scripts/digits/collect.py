"""Collect the finished runs of the digits study in docs/digits/runs.csv and curves.csv.gz.

    python scripts/digits/collect.py        # after the runs, which scripts/digits/study.sh makes

Weights that runs saved are evaluated on the task and on the glyphs of the pre-training, and
interpolated (WiSE-FT) for some. What that gives is kept beside the weights, in interpolation.json.
"""

import json
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from digits.glyphs import CLASSNAMES, draw_glyphs, render_glyphs, zero_shot_accuracy
from digits.study_runs import KEY, SETTINGS, StudyRun, write_runs
from reporting import ROOT
from reporting.experiments import load_finished, read_experiment

import clip
from clip.preprocess import normalize
from datasets import build_dataset
from datasets.transforms import read_image
from optimizers.delta import apply_delta, interpolated_weights, read_delta
from run_utils import OneLineErrorParser
from runs.cli import run_cli
from runs.records import Run
from utils import atomic_write

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
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="collect.py", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="folder with results (.)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/digits", help="folder to write")
    args = parser.parse_args()
    return run_cli(lambda: collect(args.root, args.out), parser.prog)


def collect(root: Path, out: Path) -> None:
    """Write the files of all finished runs below a folder.

    Raises:
        ValueError: A result is damaged, or runs are of several commits.
    """
    torch.set_num_threads(1)
    runs: dict[Path, StudyRun] = {}
    evaluate = WeightsEvaluator()
    for name in EXPERIMENTS:
        planned = read_experiment(CONFIGS / f"digits_{name}.yaml", (), root).runs
        planned.sort(key=lambda run: (run.config.shots, run.config.seed))
        for run in load_finished(planned):
            if run.folder not in runs:
                alphas = ALPHAS if name in INTERPOLATED and run.shots in SHOTS else (1.0,)
                runs[run.folder] = make_study_run(run, name, evaluate(run, alphas))
    if len(commits := {run.git_commit for run in runs.values()}) > 1:
        raise ValueError(f"runs of {len(commits)} commits ({', '.join(commits)}): keep one's")
    write_runs(list(runs.values()), out)
    print(f"{len(runs)} runs: {out}")


def make_study_run(
    run: Run, experiment: str, interpolation: dict[float, tuple[float, float]]
) -> StudyRun:
    """Return what the study has of a run: losses only of runs with --eval_every, all rounded."""
    result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    losses = run.loss_curve if run.config["eval_every"] else []
    return StudyRun(
        **{key: getattr(run, key) for key in (*KEY, "iterations") if key != "experiment"},
        experiment=experiment,
        config={key: run.config[key] for key in SETTINGS},
        zero_shot_accuracy=round(run.zero_shot_accuracy, 4),
        final_accuracy=round(run.final_accuracy, 4),
        per_class=[round(accuracy, 1) for accuracy in result["per_class"].values()],
        interpolation={a: tuple(round(v, 4) for v in pair) for a, pair in interpolation.items()},
        wall_seconds=round(run.wall_seconds, 1),
        data_digest=run.data["digest"][:12],
        processor=processor_name(),
        torch=run.versions["torch"],
        git_commit=run.git_commit[:12],
        loss_curve=np.array([float(f"{loss:.4g}") for loss in losses]),
        eval_curve=run.eval_curve.round(4),
    )


def processor_name() -> str:
    """Return the name of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.machine()


class WeightsEvaluator:
    """Evaluates the saved weights of runs on their task and on the glyphs of the pre-training."""

    def __init__(self) -> None:
        self.model, _ = clip.load("ViT-Tiny/8", "cpu")
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.glyphs = (*glyph_test_set(), CLASSNAMES)
        self.tasks, self.zero_shot = {}, {}  # by dataset

    def __call__(self, run: Run, alphas: tuple[float, ...]) -> dict[float, tuple[float, float]]:
        """Return both accuracies by alpha, of the weights base + alpha (trained - base)."""
        weights, cache = run.folder / "weights.safetensors", run.folder / "interpolation.json"
        if not weights.is_file():
            return {}
        is_current = cache.is_file() and cache.stat().st_mtime >= weights.stat().st_mtime
        points = json.loads(cache.read_text()) if is_current else {}
        if missing := [alpha for alpha in alphas if str(alpha) not in points]:
            if run.dataset not in self.tasks:
                self.tasks[run.dataset] = load_test_set(run.config["dataset"])
                self.zero_shot[run.dataset] = self.evaluate(weights, 0.0, run.dataset)
            for alpha in missing:
                evaluated = alpha and self.evaluate(weights, alpha, run.dataset)
                points[str(alpha)] = evaluated or self.zero_shot[run.dataset]
            atomic_write(cache, json.dumps(points))
        return {alpha: tuple(points[str(alpha)]) for alpha in alphas}

    def evaluate(self, path: Path, alpha: float, dataset: str) -> tuple[float, float]:
        """Return both accuracies in percent."""
        self.model.load_state_dict(self.base)
        delta = read_delta(path)
        apply_delta(self.model, delta)
        weights = {name: self.model.get_parameter(name) for name in delta.tensors}
        with interpolated_weights(weights, self.base, alpha):
            tasks = self.tasks[dataset], self.glyphs
            return tuple(zero_shot_accuracy(self.model, *task) for task in tasks)


def load_test_set(name: str) -> tuple[Tensor, Tensor, list[str]]:
    """Return a dataset's normalized test images (N, 3, 32, 32), labels (N,) and class names."""
    dataset = build_dataset(name, None, shots=1)
    images = [np.asarray(read_image(item.impath)) for item in dataset.test]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    labels = torch.tensor([item.label for item in dataset.test])
    return normalize(pixels), labels, dataset.classnames


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


if __name__ == "__main__":
    sys.exit(main())
