"""Finished runs, read from their folders and grouped into studies; means over their seeds."""

import csv
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import clip  # noqa: E402
from datasets import DATASETS  # noqa: E402
from results import Run, read_run  # noqa: E402

PUBLISHED = Path(__file__).with_name("published.yaml")
METHODS = {"so": "SO", "lora": "LoRA", "adam": "Adam"}  # others are ablations, by their own name
LABELS = {"zero_shot": "zero-shot", **METHODS}


class Stat(NamedTuple):
    """A mean over seeds."""

    mean: float
    std: float | None  # of the sample; None for a single seed
    seeds: int | None  # None for what does not depend on a seed


class Published(NamedTuple):
    """One published row of accuracies."""

    backbone: str
    method: str
    shots: int | None  # None: whatever the shots
    source: str
    accuracies: dict[str, float]  # by dataset; empty where the mean alone was published
    mean: float
    datasets: set[str]  # that the mean is over


class Study(NamedTuple):
    """All runs of one backbone."""

    backbone: str
    cells: dict[tuple[str, int, str], dict[int, Run]]  # (dataset, shots, method) to seed to run
    datasets: list[str]
    shots: list[int]
    methods: list[str]

    def cell(self, dataset: str, shots: int, method: str) -> dict[int, Run]:
        """Runs by seed; none where the cell is missing."""
        return self.cells.get((dataset, shots, method), {})

    def runs(self, dataset: str | None = None) -> list[Run]:
        """All runs, or those of one dataset."""
        cells = [cell for key, cell in self.cells.items() if dataset in (None, key[0])]
        return [run for cell in cells for run in cell.values()]


# Reading


def find_runs(folders: Sequence[Path], complain: Callable[[str], None]) -> list[Run]:
    """Read all finished runs below the folders; complain of what looks like a run and is none."""
    runs: dict[tuple, tuple[Run, Path]] = {}
    seen = set()

    def unreadable(error: OSError) -> None:
        complain(f"skipped {error.filename}: {error.strerror}")

    for root in folders:
        for path, names, files in os.walk(root, onerror=unreadable):
            names[:] = sorted(name for name in names if not name.startswith("."))
            folder = Path(path).resolve()
            if folder in seen or not {"result.json", "config.yaml", "curve.csv"} & set(files):
                continue
            seen.add(folder)
            try:
                if "result.json" not in files:
                    raise ValueError("unfinished: there is no result.json")
                run = read_run(folder)
                if run.settings.get("eval_split", "test") != "test":
                    raise ValueError("its accuracies are of validation images")
                _, first = runs.setdefault(run[:5], (run, folder))
                if first != folder:
                    raise ValueError(f"the same run as {first}, which is kept")
            except (ValueError, OSError, csv.Error, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                complain(f"skipped {path}: {reason}")
    return [run for run, _ in runs.values()]


def read_published(path: Path = PUBLISHED) -> tuple[list[Published], dict[str, str]]:
    """The published rows, and what each source's short name stands for."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = data["datasets"]
    rows = [
        Published(
            data["backbone"], row["method"], row.get("shots"), row["source"],
            dict(zip(names, row.get("accuracies", []), strict=False)), row["mean"], set(names),
        )
        for row in data["figures"]
    ]  # fmt: skip
    return rows, data["sources"]


# Numbers


def studies(runs: Iterable[Run]) -> list[Study]:
    """Group runs by backbone, in the order in which this repository lists names, then by name."""
    cells = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        cells[run.backbone][run.dataset, run.shots, run.method][run.seed] = run

    def ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
        places = {name: place for place, name in enumerate(known)}
        return sorted(set(names), key=lambda name: (places.get(name, len(places)), name))

    found = []
    for backbone in ordered(cells, clip.available_models()):
        datasets, shots, methods = zip(*cells[backbone], strict=True)
        names = ordered(datasets, DATASETS), sorted(set(shots)), ordered(methods, METHODS)
        found.append(Study(backbone, cells[backbone], *names))
    return found


def complete(study: Study, shots: int) -> tuple[list[str], list[int]]:
    """Datasets on which all methods ran with the same seeds, and these seeds.

    The seeds are those that most cells have. Ablations do not count: one of them, on one dataset,
    would leave the methods without a mean.
    """
    present = [m for m in study.methods if any(study.cell(d, shots, m) for d in study.datasets)]
    methods = [m for m in present if m in METHODS] or present
    cells = {d: [frozenset(study.cell(d, shots, m)) for m in methods] for d in study.datasets}
    counts = Counter(seeds for row in cells.values() for seeds in row if seeds)
    seeds = max(counts, key=lambda s: (counts[s], len(s), sorted(s)))
    return [d for d in study.datasets if all(seeds <= there for there in cells[d])], sorted(seeds)


def mean_over(
    study: Study, datasets: Sequence[str], seeds: Iterable[int] | None, shots: int, method: str,
    quantity: str = "accuracy",
) -> Stat | None:  # fmt: skip
    """Each seed's mean over datasets, over seeds (None: all that the first dataset has).

    Returns:
        The mean of that field of Run; None where the method lacks one of these runs.
    """
    cells = [study.cell(name, shots, method) for name in datasets]
    seeds = cells[0] if seeds is None else seeds
    if not cells or not seeds or not all(cell.keys() >= set(seeds) for cell in cells):
        return None
    values = [fmean(getattr(cell[seed], quantity) for cell in cells) for seed in seeds]
    std = round(stdev(values), 4) if len(values) > 1 else None
    return Stat(round(fmean(values), 4), std, len(values))


def zero_shot(study: Study, datasets: Iterable[str]) -> float | None:
    """Zero-shot accuracy, the mean over datasets; it depends on neither shots nor seed."""
    means = [fmean(run.zero_shot for run in study.runs(name)) for name in datasets]
    return round(fmean(means), 4) if means else None


def published_for(
    published: Sequence[Published], study: Study, method: str, datasets: Sequence[str]
) -> list[tuple[Published, float]]:
    """Published rows of a method, each with its figure for a dataset or its mean over several."""
    found = []
    for row in published:
        if (row.backbone, row.method) == (study.backbone, method):
            if set(datasets) == row.datasets:
                found.append((row, row.mean))
            elif datasets and set(datasets) <= row.accuracies.keys():
                found.append((row, round(fmean(row.accuracies[d] for d in datasets), 2)))
    return found


def inconsistencies(study: Study) -> Iterable[str]:
    """What makes runs of this backbone hard to compare."""
    for (dataset, shots, method), cell in study.cells.items():
        settings = [run.settings for run in cell.values()]
        keys = {key for one in settings for key in one} - {"seed"}
        differ = sorted(k for k in keys if len({repr(one.get(k)) for one in settings}) > 1)
        if differ:
            where = f"{study.backbone}, {dataset}, {shots} shots, {method}"
            yield f"{where}: seeds differ in {', '.join(differ)} too"
    for dataset in study.datasets:
        values = [run.zero_shot for run in study.runs(dataset)]
        if max(values) - min(values) > 0.1:
            yield (
                f"{study.backbone}, {dataset}: zero-shot accuracy goes from {min(values):.2f} to "
                f"{max(values):.2f}; weights, images or precision differ between runs"
            )


# Words


def title_of(dataset: str) -> str:
    """A dataset as people write it."""
    return DATASETS[dataset].title if dataset in DATASETS else dataset


def plural(count: int, what: str) -> str:
    """Such as "1 shot", "2 shots"."""
    return f"{count} {what}{'s' * (count != 1)}"
