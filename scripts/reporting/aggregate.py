"""Group finished runs by settings; average and compare them over seeds.

Values stay as they were measured. They are rounded where they are printed.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml
from scipy.stats import binomtest, sem
from scipy.stats import t as student

import clip
from datasets import DATASETS
from optimizers.build import ABLATION_DEFAULTS
from run_utils import default_settings
from runs.identity import NON_HPARAMS
from runs.output_dir import PATH_KEYS, slugify_templates
from runs.records import Run, read_run
from utils import sha256_of_tree

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
METHODS = {"so": "SO", "lora": "LoRA", "adam": "Adam"}
LABELS = {"zero_shot": "zero-shot", **METHODS}
SO_HPARAMS = {"s", "t", *ABLATION_DEFAULTS, "dense_grad"}
IGNORED_HPARAMS = {  # settings that a method does not read: its runs do not differ by them
    "so": {"rank"},
    "lora": SO_HPARAMS,
    "adam": SO_HPARAMS | {"rank"},
}
FILE_SETTINGS = {  # settings that name files, and what `inputs` of a result call their contents
    "backbone": "backbone", "classnames": "classnames", "template": "template",
    "fewshot_split": "train_images",
}  # fmt: skip
ZERO_SHOT_TOLERANCE = 0.1  # percent: one model's zero-shot accuracies differ by rounding


class Variant(NamedTuple):
    """A method with one choice of settings: a column of tables, a line of figures."""

    method: str
    settings: str = ""  # what tells it from the method's other variants: "lr 0.01, t 10"

    @property
    def label(self) -> str:
        """Its name for readers."""
        name = LABELS.get(self.method, self.method)
        return f"{name}, {self.settings}" if self.settings else name


class MeanStd(NamedTuple):
    """A mean over seeds."""

    mean: float
    std: float | None  # of the sample; None for a single seed
    seeds: int | None  # None for a value that does not depend on a seed


class PairedTest(NamedTuple):
    """Differences on the same data, shots and seeds."""

    mean: float
    half_width: float | None  # of the 95 % confidence interval; None for a single seed
    wins: int
    ties: int
    losses: int
    p_value: float  # of the two-sided sign test; 1 where all are equal


class BackboneResults(NamedTuple):
    """All runs of one backbone on all classes, or on one half of them."""

    name: str  # the backbone; for a half of the classes: "ViT-B/16, base classes"
    cells: dict[tuple[str, int, Variant], dict[int, Run]]  # (dataset, shots, variant), seed to run
    datasets: list[str]
    shots: list[int]
    variants: list[Variant]  # by method, each one's default settings first

    def cell(self, dataset: str, shots: int, variant: Variant) -> dict[int, Run]:
        """Return runs by seed; {} where the cell is missing."""
        return self.cells.get((dataset, shots, variant), {})

    def runs(self, dataset: str | None = None) -> list[Run]:
        """Return all runs, or those of one dataset."""
        cells = [cell for key, cell in self.cells.items() if dataset in (None, key[0])]
        return [run for cell in cells for run in cell.values()]

    def default_variants(self) -> list[Variant]:
        """Return the first variant of each method. Published figures stand beside it."""
        first = {variant.method: variant for variant in reversed(self.variants)}
        return [variant for variant in self.variants if first[variant.method] == variant]


# Reading


def find_runs(folders: Sequence[Path], warn: Callable[[str], None]) -> list[Run]:
    """Read all finished runs below the folders; warn of broken, unfinished and repeated ones."""
    runs = []
    for root in folders:
        for path, names, files in os.walk(
            root, onerror=lambda e: warn(f"skipped {e.filename}: {e.strerror}")
        ):
            names[:] = sorted(name for name in names if not name.startswith("."))
            if not {"result.json", "config.yaml", "curve.csv"} & set(files):
                continue
            try:
                if "result.json" not in files:
                    raise ValueError("unfinished: there is no result.json")
                run = read_run(Path(path).resolve())
                if run.config.get("eval_split", "test") != "test":
                    raise ValueError("its accuracies are of validation images")
                runs.append(run)
            except (ValueError, OSError) as error:
                warn(f"skipped {path}: {getattr(error, 'strerror', None) or error}")
    different: dict[str, Run] = {}
    for run in unify_spellings(runs):
        first = different.setdefault(run_key(run), run)
        if first.folder != run.folder:
            warn(f"skipped {run.folder}: the same run as {first.folder}, which is used")
    return list(different.values())


def run_key(run: Run) -> str:
    """Return all that a run's numbers depend on: two runs with the same key are the same run."""
    where = [run.method, run.backbone, run.dataset, run.shots, run.seed]
    where.append(run.config.get("subsample", "all"))
    return repr([where, run.data["digest"], sorted(hparams(run).items())])


def unify_spellings(runs: Sequence[Run]) -> list[Run]:
    """Name files in settings without their folders, so that a moved file is the same setting.

    A digest follows where one name stands for several contents.
    """
    for key, content in FILE_SETTINGS.items():
        names, scopes, digests = [], [], []
        for run in runs:
            names.append(spelling(run, key))
            value = run.inputs[content] if run.inputs else run.config.get(key)
            digests.append(value if isinstance(value, str) else sha256_of_tree(value))
            data = run.dataset, run.data["digest"], run.config.get("subsample")
            draw = (run.shots, run.seed) if key == "fewshot_split" else ()
            scopes.append((names[-1], *(() if key == "backbone" else data), *draw))
        suffixes = digest_suffixes(scopes, digests)
        values = [(n or "default") + s if s else n for n, s in zip(names, suffixes, strict=True)]
        runs = [
            replace(run, config=run.config | {key: value})
            for run, value in zip(runs, values, strict=True)
        ]
    return runs


def spelling(run: Run, key: str) -> str | None:
    """Return the value of a setting that names a file, without its folders, seed and shots."""
    if key == "backbone":
        return run.backbone
    value = run.config.get(key)
    if key == "template":
        return value and slugify_templates(value)
    return value and re.sub(r"(seed|shots?)_?\d+", r"\1", Path(value).stem)


def digest_suffixes(names: Sequence[Hashable], digests: Sequence[str]) -> list[str]:
    """Return what tells equal names of different contents apart: ", 1a2b3c4", or ""."""
    contents: dict[Hashable, set[str]] = defaultdict(set)
    for name, digest in zip(names, digests, strict=True):
        contents[name].add(digest)
    return [
        f", {digest[:7]}" if len(contents[name]) > 1 else ""
        for name, digest in zip(names, digests, strict=True)
    ]


# Grouping


def group_by_backbone(runs: Iterable[Run]) -> list[BackboneResults]:
    """Group runs by backbone and classes, then by data, shots, method and settings."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.backbone, str(run.config.get("subsample", "all"))].append(run)
    results = []
    backbones = sort_by_known({backbone for backbone, _ in groups}, clip.available_models())
    for backbone, classes in sorted(groups, key=lambda key: (backbones.index(key[0]), key[1])):
        group = groups[backbone, classes]
        variants, all_variants = assign_variants(group)
        datasets, all_datasets = label_datasets([(run.dataset, run.data) for run in group])
        cells: dict[tuple, dict[int, Run]] = defaultdict(dict)
        for run, dataset, variant in zip(group, datasets, variants, strict=True):
            cells[dataset, run.shots, variant][run.seed] = run
        name = backbone if classes == "all" else f"{backbone}, {classes} classes"
        shots = sorted({run.shots for run in group})
        results.append(BackboneResults(name, dict(cells), all_datasets, shots, all_variants))
    return results


def assign_variants(runs: Sequence[Run]) -> tuple[list[Variant], list[Variant]]:
    """Tell the runs of each method apart by the settings in which they differ.

    A setting that differs is named, but not where it has its default and other runs do not.

    Returns:
        Each run's variant; and all variants by method, those with the fewest settings off their
        defaults first.
    """
    all_hparams = [hparams(run) for run in runs]
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)  # by method and setting
    for run, settings in zip(runs, all_hparams, strict=True):
        for key, value in settings.items():
            if value not in values[run.method, key]:
                values[run.method, key].append(value)
    variants, ranks = [], {}
    for run, settings in zip(runs, all_hparams, strict=True):
        varied = sorted(k for m, k in values if m == run.method and len(values[m, k]) > 1)
        changed = [k for k in varied if settings[k] != defaults().get(k)]
        at_default = [k for k in varied if defaults().get(k) in values[run.method, k]]
        named = [k for k in varied if k in changed or k not in at_default]
        text = ", ".join(format_setting(key, settings[key]) for key in named)
        variants.append(Variant(run.method, text))
        method_rank = list(METHODS).index(run.method)
        ranks[variants[-1]] = method_rank, len(changed), [sort_key(settings[k]) for k in named]
    return variants, sorted(ranks, key=ranks.get)


def hparams(run: Run) -> dict[str, Any]:
    """Return the settings that a run's numbers depend on, besides its path and its seed.

    A flag that is newer than the run has its default.
    """
    ignored = NON_HPARAMS | {*PATH_KEYS, "subsample"} | IGNORED_HPARAMS.get(run.method, set())
    settings = defaults() | run.config
    if settings["final_model"] == "last_step":
        ignored = ignored | {"eval_every"}  # the weights do not depend on when they are evaluated
    return {key: settings[key] for key in settings if key not in ignored - {"backbone"}}


defaults = cache(default_settings)


def format_setting(key: str, value: Any) -> str:
    """Return a setting as tables name it: "lr 0.01", "dense_grad", "no flip"; a file's stem."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def sort_key(value: Any) -> tuple[float, str]:
    """Return a key that sorts numbers by size, and all else behind them by its text."""
    return (value, "") if isinstance(value, int | float) else (float("inf"), str(value))


def sort_by_known(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Sort names in the order of the known ones; others follow by the alphabet."""
    ranks = {name: rank for rank, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (ranks.get(name, len(ranks)), name))


def label_datasets(data: Sequence[tuple[str, dict]]) -> tuple[list[str], list[str]]:
    """Name datasets so that other images have another name.

    Args:
        data: For each run the dataset's name and the `data` of its result.

    Returns:
        For each run "dtd" or "dtd (made split)", followed by the beginning of the digest where
        one name would stand for several sets of images; and all these names in order.
    """
    names = [name + " (made split)" * (info["split"] == "made") for name, info in data]
    suffixes = digest_suffixes(names, [info["digest"] for _, info in data])
    labels = [name + suffix for name, suffix in zip(names, suffixes, strict=True)]
    ranks = sort_by_known([name for name, _ in data], DATASETS)
    datasets = {label: name for label, (name, _) in zip(labels, data, strict=True)}
    return labels, sorted(datasets, key=lambda label: (ranks.index(datasets[label]), label))


def display_name(dataset: str) -> str:
    """Return a dataset's title, followed by what `label_datasets` put behind its name."""
    name = dataset.split(" ")[0].removesuffix(",")
    return (DATASETS[name].title if name in DATASETS else name) + dataset[len(name) :]


# Means


def summarize(values: Sequence[float]) -> MeanStd:
    """Return mean and standard deviation over seeds."""
    return MeanStd(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def confidence_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return a mean and half the width of its 95 % confidence interval (Student's)."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), float(student.ppf(0.975, len(values) - 1)) * sem(values)


def table_lines(
    results: BackboneResults, shots: int
) -> list[tuple[str, list[str], list[int] | None]]:
    """Return the lines of a table: each dataset, then the mean over those that all methods have.

    Returns:
        For each line its label, its datasets, and the seeds that it is over (None: all).
    """
    lines = [(name, [name], None) for name in results.datasets]
    if len(lines) > 1:
        common, seeds = common_datasets_and_seeds(results, shots)
        lines.append((f"mean over {len(common)} of {len(lines)}", common, seeds))
    return lines


def common_datasets_and_seeds(results: BackboneResults, shots: int) -> tuple[list[str], list[int]]:
    """Return the datasets on which all methods ran with the same seeds, and these seeds.

    The seeds are those that most cells have. Of each method only the variant of most runs counts:
    another one, tried on one dataset, would leave the methods without a mean.
    """
    datasets, largest = results.datasets, {}
    sizes = {v: sum(len(results.cell(d, shots, v)) for d in datasets) for v in results.variants}
    for variant, size in sizes.items():
        if size > sizes.get(largest.get(variant.method), 0):
            largest[variant.method] = variant
    seeds_of = {
        name: [frozenset(results.cell(name, shots, v)) for v in largest.values()]
        for name in datasets
    }
    counts = Counter(seeds for cells in seeds_of.values() for seeds in cells if seeds)
    common = max(counts, key=lambda seeds: (counts[seeds], len(seeds), sorted(seeds)))
    complete = [name for name in datasets if all(common <= seeds for seeds in seeds_of[name])]
    return complete, sorted(common)


def seed_means(
    results: BackboneResults,
    datasets: Sequence[str],
    seeds: Iterable[int] | None,
    shots: int,
    variant: Variant,
    key: str = "final_accuracy",
) -> list[float]:
    """Return each seed's mean over datasets of a field of its runs.

    `seeds` None stands for all seeds of the first dataset. [] where the variant lacks a run, or a
    run the field.
    """
    cells = [results.cell(name, shots, variant) for name in datasets]
    seeds = set(cells[0] if cells and seeds is None else seeds)
    if not cells or not all(cell.keys() >= seeds for cell in cells):
        return []
    values = [[getattr(cell[seed], key) for cell in cells] for seed in sorted(seeds)]
    return [] if any(None in row for row in values) else [fmean(row) for row in values]


def mean_over_seeds(*args: Any) -> MeanStd | None:
    """Return mean and standard deviation of `seed_means`; None where the variant lacks a run."""
    values = seed_means(*args)
    return summarize(values) if values else None


def zero_shot_mean(
    results: BackboneResults, datasets: Iterable[str], key: str = "zero_shot_accuracy"
) -> float | None:
    """Return the mean zero-shot accuracy over datasets. It depends on neither shots nor seed.

    None where the runs of a dataset disagree: no mean is over different settings.
    """
    means = [mean_if_equal(getattr(run, key) for run in results.runs(name)) for name in datasets]
    return None if not means or None in means else fmean(means)


def mean_if_equal(values: Iterable[float]) -> float | None:
    """Return the mean of values that differ only by rounding; None where they differ by more."""
    values = list(values)
    return fmean(values) if max(values) - min(values) <= ZERO_SHOT_TOLERANCE else None


# Comparisons


def published_figures(
    results: BackboneResults, method: str, shots: int, datasets: Sequence[str]
) -> list[tuple[str, float]]:
    """Return the source and the figure of each published row for a method on these datasets."""
    names, figures = PUBLISHED["datasets"], []
    for row in PUBLISHED["figures"] if results.name == PUBLISHED["backbone"] else ():
        if row["method"] == method and row.get("shots", shots) == shots:
            accuracies = dict(zip(names, row.get("accuracies", []), strict=False))
            accuracies |= row.get("by_dataset", {})
            if set(datasets) == set(names) and "mean" in row:
                figures.append((row["source"], row["mean"]))
            elif datasets and set(datasets) <= accuracies.keys():
                figures.append((row["source"], fmean(accuracies[name] for name in datasets)))
    return figures


def paired_test(
    results: BackboneResults,
    first: Variant,
    second: Variant,
    shots: Sequence[int],
    key: str = "final_accuracy",
) -> PairedTest | None:
    """Compare two variants where both ran, first minus second; None where they never did.

    Wins, ties and losses are counted over datasets, shots and seeds. The interval is over each
    seed's mean over datasets and shots; seeds that lack one of these do not count.
    """
    cells = [
        (results.cell(name, n, first), results.cell(name, n, second))
        for name in results.datasets
        for n in shots
    ]
    cells = [(a, b) for a, b in cells if a.keys() & b.keys()]
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in cells)) if cells else set()
    if not seeds:
        return None
    by_seed = [
        [getattr(a[seed], key) - getattr(b[seed], key) for a, b in cells] for seed in sorted(seeds)
    ]
    differences = [difference for row in by_seed for difference in row]
    wins, losses = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    decided = wins + losses
    p_value = binomtest(wins, decided).pvalue if decided else 1.0
    interval = confidence_interval([fmean(row) for row in by_seed])
    return PairedTest(*interval, wins, len(differences) - decided, losses, p_value)
