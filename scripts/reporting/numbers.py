"""Finished runs, read from their folders and grouped by settings; means and pairs over seeds.

Values are kept as they were measured: rounding is left to what prints them.
"""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml
from scipy.stats import binomtest, sem
from scipy.stats import t as student

import clip
from datasets import DATASETS
from run_utils import default_settings
from runs.output_dir import NON_HPARAMS, PATH_KEYS
from runs.records import Run, read_run

PUBLISHED = Path(__file__).with_name("published.yaml")
METHODS = {"so": "SO", "lora": "LoRA", "adam": "Adam"}
LABELS = {"zero_shot": "zero-shot", **METHODS}
OF_SO = {"s", "t", "grad_support", "moment_support", "moments", "dense_grad"}
UNREAD = {  # settings that a method never looks at, and by which its runs do not differ
    "so": {"rank"},
    "lora": OF_SO,
    "adam": OF_SO | {"rank"},
}
CLOSE = 0.1  # percent: zero-shot accuracies of one model, in other orders of summation


class Variant(NamedTuple):
    """A method with one choice of settings: a column of tables, a line of figures."""

    method: str
    settings: str = ""  # those that tell it from the method's other variants: "lr 0.01, t 10"

    @property
    def label(self) -> str:
        """Its name for readers."""
        name = LABELS.get(self.method, self.method)
        return f"{name}, {self.settings}" if self.settings else name


class Stat(NamedTuple):
    """A mean over seeds."""

    mean: float
    std: float | None  # of the sample; None for a single seed
    seeds: int | None  # None for a value that does not depend on a seed


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
    """All runs of one backbone on all classes, or on one half of them."""

    backbone: str  # for a half of the classes its name goes on: "ViT-B/16, base classes"
    cells: dict[tuple[str, int, Variant], dict[int, Run]]  # (dataset, shots, variant), seed to run
    datasets: list[str]
    shots: list[int]
    variants: list[Variant]  # by method, each one's usual settings first

    def cell(self, dataset: str, shots: int, variant: Variant) -> dict[int, Run]:
        """Runs by seed; none where the cell is missing."""
        return self.cells.get((dataset, shots, variant), {})

    def runs(self, dataset: str | None = None) -> list[Run]:
        """All runs, or those of one dataset."""
        cells = [cell for key, cell in self.cells.items() if dataset in (None, key[0])]
        return [run for cell in cells for run in cell.values()]

    def firsts(self) -> list[Variant]:
        """The first variant of each method, beside which published figures stand."""
        first = {variant.method: variant for variant in reversed(self.variants)}
        return [variant for variant in self.variants if first[variant.method] == variant]


# Reading


def find_runs(folders: Sequence[Path], complain: Callable[[str], None]) -> list[Run]:
    """Read all finished runs below the folders; complain of broken, unfinished and second ones."""
    runs: dict[str, tuple[Run, Path]] = {}
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
                _, first = runs.setdefault(identity(run), (run, folder))
                if first != folder:
                    raise ValueError(f"the same run as {first}, which is kept")
            except (ValueError, OSError, csv.Error, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                complain(f"skipped {path}: {reason}")
    return [run for run, _ in runs.values()]


def identity(run: Run) -> str:
    """All that a run's numbers depend on: equal for two runs of which one is enough."""
    place = [run.method, run.backbone, run.dataset, run.shots, run.seed]
    place.append(run.settings.get("subsample", "all"))
    return repr([place, run.data.get("digest"), sorted(settings_of(run).items())])


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


# Grouping


defaults = cache(default_settings)


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that a run's numbers depend on, seed and place in the report left out.

    A flag that is younger than the run has its default.
    """
    left_out = NON_HPARAMS | set(PATH_KEYS) | UNREAD.get(run.method, set()) | {"subsample"}
    if run.backbone not in clip.available_models():
        left_out = left_out - {"backbone"}  # many checkpoints are called model.safetensors
    settings = defaults() | run.settings
    return {key: value for key, value in settings.items() if key not in left_out}


def find_variants(runs: Sequence[Run]) -> tuple[list[Variant], list[Variant]]:
    """Tell runs of one method apart by the settings in which they differ.

    Only differences are named; where one of the runs has a flag's default, that one goes without
    saying.

    Returns:
        Each run's variant; and all of them in order: methods as this repository lists them, those
        with the fewest settings off their defaults first, then those of most runs.
    """
    settings = [settings_of(run) for run in runs]
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)  # by method and key, all different
    for run, own in zip(runs, settings, strict=True):
        for key, value in own.items():
            if value not in values[run.method, key]:
                values[run.method, key].append(value)
    names, order = [], {}
    for run, own in zip(runs, settings, strict=True):
        varied = sorted(k for m, k in values if m == run.method and len(values[m, k]) > 1)
        odd = [key for key in varied if own[key] != defaults().get(key)]
        told = [k for k in varied if k in odd or defaults().get(k) not in values[run.method, k]]
        names.append(Variant(run.method, ", ".join(in_words(key, own[key]) for key in told)))
        order[names[-1]] = len(odd), [sortable(own[key]) for key in told]
    counts, methods = Counter(names), ordered({run.method for run in runs}, METHODS)

    def place(variant: Variant) -> tuple:
        odd, told = order[variant]
        return methods.index(variant.method), odd, -counts[variant], told

    return names, sorted(counts, key=place)


def in_words(key: str, value: Any) -> str:
    """A setting as tables name it: "lr 0.01", "dense_grad", "no flip"; a file by its stem."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    if key in ("classnames", "fewshot_split"):
        value = Path(str(value)).stem
    return f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def sortable(value: Any) -> tuple[float, str]:
    """A key that sorts numbers by size, and all else by its text."""
    return (value, "") if isinstance(value, int | float) else (float("inf"), str(value))


def ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names in the order in which this repository lists them, others behind these."""
    places = {name: place for place, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (places.get(name, len(places)), name))


def find_datasets(data: Sequence[tuple[str, dict]]) -> tuple[list[str], list[str]]:
    """Name data: other images than the published split's stand apart.

    Args:
        data: A dataset's name and a result's `data`, for each run.

    Returns:
        The data's names, such as "dtd" or "dtd (made split)", with the beginning of the digest
        where one name would stand for several; and all names in order.
    """
    names = [x + (" (made split)" if own.get("split") == "made" else "") for x, own in data]
    digests: dict[str, set] = defaultdict(set)
    for name, (_, own) in zip(names, data, strict=True):
        digests[name] |= {own.get("digest")} - {None}
    full = [
        f"{name}, {own.get('digest', 'unknown')[:7]}" if len(digests[name]) > 1 else name
        for name, (_, own) in zip(names, data, strict=True)
    ]
    known = [
        name
        for dataset in ordered([dataset for dataset, _ in data], DATASETS)
        for name in sorted({n for n, (x, _) in zip(full, data, strict=True) if x == dataset})
    ]
    return full, known


def studies(runs: Iterable[Run]) -> list[Study]:
    """Group runs by backbone and classes, and within these by data, shots, method and settings."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.backbone, str(run.settings.get("subsample", "all"))].append(run)
    found, models = [], ordered({backbone for backbone, _ in groups}, clip.available_models())
    for backbone, classes in sorted(groups, key=lambda key: (models.index(key[0]), key[1])):
        group = groups[backbone, classes]
        name = backbone if classes == "all" else f"{backbone}, {classes} classes"
        variants, all_variants = find_variants(group)
        datasets, all_datasets = find_datasets([(run.dataset, run.data) for run in group])
        cells: dict[tuple, dict[int, Run]] = defaultdict(dict)
        for run, dataset, variant in zip(group, datasets, variants, strict=True):
            cells[dataset, run.shots, variant][run.seed] = run
        shots = sorted({run.shots for run in group})
        found.append(Study(name, dict(cells), all_datasets, shots, all_variants))
    return found


# Means


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of a sample; None for the latter of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """A mean and half the width of its 95 % confidence interval, by Student's distribution."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), float(student.ppf(0.975, len(values) - 1)) * sem(values)


def complete(study: Study, shots: int) -> tuple[list[str], list[int]]:
    """Datasets on which all methods ran with the same seeds, and these seeds.

    The seeds are those that most cells have. Of each method the variant of most runs counts:
    another one, tried on one dataset, would leave the methods without a mean.
    """
    sizes = {v: sum(len(study.cell(d, shots, v)) for d in study.datasets) for v in study.variants}
    chosen: dict[str, Variant] = {}
    for variant in study.variants:
        if sizes[variant] > sizes.get(chosen.get(variant.method), 0):
            chosen[variant.method] = variant
    methods = [v for m, v in chosen.items() if m in METHODS] or list(chosen.values())
    cells = {d: [frozenset(study.cell(d, shots, v)) for v in methods] for d in study.datasets}
    counts = Counter(seeds for row in cells.values() for seeds in row if seeds)
    seeds = max(counts, key=lambda s: (counts[s], len(s), sorted(s)))
    return [d for d in study.datasets if all(seeds <= there for there in cells[d])], sorted(seeds)


def mean_over(
    study: Study, datasets: Sequence[str], seeds: Iterable[int] | None, shots: int,
    variant: Variant, quantity: str = "accuracy",
) -> Stat | None:  # fmt: skip
    """Each seed's mean over datasets, over seeds (None: all that the first dataset has).

    Returns:
        The mean of that field of Run; None where the variant lacks one of these runs.
    """
    cells = [study.cell(name, shots, variant) for name in datasets]
    seeds = cells[0] if seeds is None else seeds
    if not cells or not seeds or not all(cell.keys() >= set(seeds) for cell in cells):
        return None
    values = [fmean(getattr(cell[seed], quantity) for cell in cells) for seed in seeds]
    return Stat(*mean_and_std(values), len(values))


def zero_shot(study: Study, datasets: Iterable[str]) -> float | None:
    """Zero-shot accuracy, the mean over datasets; it depends on neither shots nor seed.

    None where a dataset's runs disagree about it: no mean is over different settings.
    """
    found = [[run.zero_shot for run in study.runs(name)] for name in datasets]
    if not found or any(max(values) - min(values) > CLOSE for values in found):
        return None
    return fmean(map(fmean, found))


def inconsistencies(study: Study) -> Iterable[str]:
    """Sentences on runs of this backbone that are hard to compare."""
    for dataset in study.datasets:
        values = [run.zero_shot for run in study.runs(dataset)]
        if max(values) - min(values) > CLOSE:
            yield (
                f"{study.backbone}, {dataset}: zero-shot accuracy goes from {min(values):.2f} to "
                f"{max(values):.2f}, and is left out; weights, images or precision differ between "
                "runs"
            )


# Comparisons


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
                found.append((row, fmean(row.accuracies[d] for d in datasets)))
    return found


class Pairs(NamedTuple):
    """Differences between two variants on the same data, shots and seeds, first minus second."""

    mean: float
    half: float | None  # of the 95 % confidence interval; None for a single seed
    better: int
    equal: int
    worse: int
    p: float  # of the two-sided sign test; 1 where all are equal


def pairs(study: Study, first: Variant, second: Variant, shots: Iterable[int]) -> Pairs | None:
    """Compare two variants where both ran: None where they never did.

    Differences are counted by dataset, shots and seed. The interval is Student's, over each seed's
    mean; seeds with which not all datasets and shots ran do not count.
    """
    cells = [
        (study.cell(name, n, first), study.cell(name, n, second))
        for name in study.datasets
        for n in shots
    ]
    cells = [(a, b) for a, b in cells if a.keys() & b.keys()]
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in cells)) if cells else set()
    if not seeds:
        return None
    table = [[a[seed].accuracy - b[seed].accuracy for a, b in cells] for seed in sorted(seeds)]
    differences = [value for row in table for value in row]
    better, worse = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    decided = better + worse
    p = binomtest(better, decided).pvalue if decided else 1.0
    mean, half = interval([fmean(row) for row in table])
    return Pairs(mean, half, better, len(differences) - decided, worse, p)


# Words


def title_of(dataset: str) -> str:
    """A dataset as people write it, with what `find_datasets` put behind its name."""
    name, space, rest = dataset.partition(" ")
    known = DATASETS.get(name.removesuffix(","))
    if known is None:
        return dataset
    return known.title + ("," if name.endswith(",") else "") + space + rest
