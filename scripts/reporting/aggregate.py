"""Group finished runs by settings; average and compare them over seeds.

Values stay as they were measured. They are rounded where they are printed.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml
from scipy.stats import sem
from scipy.stats import t as student

from datasets import DATASETS
from optimizers.build import ABLATION_DEFAULTS
from run_utils import default_settings
from runs.identity import NON_HPARAMS
from runs.output_dir import PATH_KEYS, slugify_templates
from runs.records import Run, read_run

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
METHODS = {"so": "SO", "lora": "LoRA", "adam": "Adam"}
LABELS = {"zero_shot": "zero-shot", **METHODS}
SO_HPARAMS = {"s", "t", *ABLATION_DEFAULTS, "dense_grad"}
IGNORED_HPARAMS = {  # settings that a method does not read: its runs do not differ by them
    "so": {"rank"},
    "lora": SO_HPARAMS,
    "adam": SO_HPARAMS | {"rank"},
}
SEED_OR_SHOTS = re.compile(r"(?<=seed|shot)s?_?\d+")  # in paths of few-shot lists
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


ZERO_SHOT = Variant("zero_shot")


class MeanStd(NamedTuple):
    """A mean over seeds."""

    mean: float
    std: float | None  # of the sample; None for a single seed
    seeds: int | None  # None for a value that does not depend on a seed


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

    def common_datasets(self, shots: int) -> list[str]:
        """Return the datasets on which every method with runs of these shots has one."""
        cells = {(name, variant.method) for name, n, variant in self.cells if n == shots}
        methods = {method for _, method in cells}
        return [d for d in self.datasets if all((d, method) in cells for method in methods)]

    def table_lines(self, shots: int) -> list[tuple[str, list[str]]]:
        """Return label and datasets of each line of a table; the last is a mean over several."""
        lines = [(name, [name]) for name in self.datasets]
        common = self.common_datasets(shots)
        if len(lines) > 1 and common:
            lines.append((f"mean over {len(common)} of {len(lines)}", common))
        return lines

    def seed_means(
        self, datasets: Sequence[str], shots: int, variant: Variant, key: str = "final_accuracy"
    ) -> list[float]:
        """Return each seed's mean over datasets of a field of its runs.

        Seeds are those with a run on each of the datasets. [] where a run lacks the field, or
        where zero-shot accuracies, which have one value, differ.
        """
        if variant == ZERO_SHOT:
            key = f"zero_shot_{key.removeprefix('final_')}"
            means = [mean_if_equal([getattr(r, key, None) for r in self.runs(d)]) for d in datasets]
            return [] if not means or None in means else [fmean(means)]
        cells = [self.cell(name, shots, variant) for name in datasets]
        seeds = sorted(set.intersection(*map(set, cells))) if cells else []
        values = [[getattr(cell[seed], key) for cell in cells] for seed in seeds]
        return [] if any(None in row for row in values) else [fmean(row) for row in values]

    def mean(
        self, datasets: Sequence[str], shots: int, variant: Variant, key: str = "final_accuracy"
    ) -> MeanStd | None:
        """Return mean and standard deviation of `seed_means`; None where there are none."""
        values = self.seed_means(datasets, shots, variant, key)
        return summarize(values, variant) if values else None

    def paired_differences(
        self, first: Variant, second: Variant, shots: Sequence[int], key: str = "final_accuracy"
    ) -> list[list[float]]:
        """Return a field of `first`'s runs minus that of `second`'s: by seed, then by cell.

        Cells are the datasets and shots with which both ran. Seeds that lack one are left out.
        """
        where = list(product(self.datasets, shots))
        pairs = [(self.cell(*cell, first), self.cell(*cell, second)) for cell in where]
        pairs = [(a, b) for a, b in pairs if a.keys() & b.keys()]
        seeds = set.intersection(*(a.keys() & b.keys() for a, b in pairs)) if pairs else set()
        return [
            [getattr(a[seed], key) - getattr(b[seed], key) for a, b in pairs]
            for seed in sorted(seeds)
        ]

    def published(self, method: str, shots: int, datasets: Sequence[str]) -> dict[str, float]:
        """Return by source what was published for a method on these datasets."""
        figures = {}
        for row in PUBLISHED["figures"] if self.name == PUBLISHED["backbone"] else ():
            if row["method"] == method and row.get("shots", shots) == shots:
                accuracies = row.get("accuracies", {})
                if set(datasets) == set(PUBLISHED["datasets"]) and "mean" in row:
                    figures[row["source"]] = row["mean"]
                elif datasets and accuracies.keys() >= set(datasets):
                    figures[row["source"]] = fmean(accuracies[name] for name in datasets)
        return figures


# Reading


def find_runs(folders: Sequence[Path], warn: Callable[[str], None]) -> list[Run]:
    """Read all finished runs below the folders; warn of broken, unfinished and repeated ones."""
    found, runs = {}, []
    for root in folders:
        for path, subfolders, files in os.walk(root, onerror=lambda e: warn(f"skipped {e}")):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if {"result.json", "config.yaml"} & set(files):
                found[Path(path).resolve()] = None  # once, in order
    for folder in found:
        try:
            if not (folder / "result.json").is_file():
                raise ValueError("unfinished: there is no result.json")
            run = read_run(folder)
            if run.config.get("eval_split", "test") != "test":
                raise ValueError("its accuracies are of validation images")
            runs.append(run)
        except (ValueError, OSError) as error:
            warn(f"skipped {folder}: {error}")
    different: dict[str, Run] = {}
    for run in label_inputs(runs):
        where = run.backbone, run.dataset, run.data["digest"], run.config.get("subsample", "all")
        key = repr([run.method, where, run.shots, run.seed, sorted(hparams(run).items())])
        first = different.setdefault(key, run)
        if first is not run:
            warn(f"skipped {run.folder}: the same seed and settings as {first.folder}")
    return list(different.values())


def label_inputs(runs: Sequence[Run]) -> list[Run]:
    """Tell weights and few-shot lists of one name and different contents apart by their digest.

    Lists whose paths differ only by seed and shots are one, but for runs of one seed.
    """
    weights = [run.inputs["backbone"] if run.inputs else "unknown" for run in runs]
    backbones = label_by_content([run.backbone for run in runs], weights)
    names, images, by_path, by_seed = [], [], [], []
    for run in runs:
        path = run.config.get("fewshot_split") or ""
        names.append(SEED_OR_SHOTS.sub("", Path(path).stem))
        images.append(run.inputs["train_images"] if path and run.inputs else "unknown")
        draw = run.dataset, run.data["digest"], run.config.get("subsample"), run.shots
        by_path.append((draw, *SEED_OR_SHOTS.findall(path)))
        by_seed.append((draw, run.seed))
    lists = label_by_content(label_by_content(names, images, by_path), images, by_seed)
    return [
        replace(run, backbone=backbone, config=run.config | {"fewshot_split": name or None})
        for run, backbone, name in zip(runs, backbones, lists, strict=True)
    ]


def label_by_content(
    names: Sequence[str], digests: Sequence[str], scopes: Sequence[Hashable] = ()
) -> list[str]:
    """Return the names, with their digest where one has several in its scope: "my, 1a2b3c4"."""
    keys = list(zip(names, scopes or names, strict=True))
    contents = defaultdict(set)
    for key, digest in zip(keys, digests, strict=True):
        contents[key].add(digest)
    return [
        f"{name}, {digest[:7]}" if len(contents[name, scope]) > 1 else name
        for (name, scope), digest in zip(keys, digests, strict=True)
    ]


# Grouping


def group_by_backbone(runs: Iterable[Run]) -> list[BackboneResults]:
    """Group runs by backbone and classes, then as `group_runs` does."""
    groups = defaultdict(list)
    for run in runs:
        classes = run.config.get("subsample", "all")
        name = run.backbone if classes == "all" else f"{run.backbone}, {classes} classes"
        groups[name].append(run)
    return [group_runs(name, group) for name, group in sorted(groups.items())]


def group_runs(name: str, runs: Sequence[Run]) -> BackboneResults:
    """Group runs of one backbone by data, shots, method and settings."""
    variants = name_variants(runs)
    datasets = label_datasets([(run.dataset, run.data) for run in runs])
    cells: dict[tuple, dict[int, Run]] = defaultdict(dict)
    for run, dataset, variant in zip(runs, datasets, variants, strict=True):
        cells[dataset, run.shots, variant][run.seed] = run
    shots = sorted({run.shots for run in runs})
    columns = sorted(set(variants), key=variant_rank)
    return BackboneResults(name, cells, sort_datasets(datasets), shots, columns)


def name_variants(runs: Sequence[Run]) -> list[Variant]:
    """Tell the runs of each method apart by the settings in which they differ.

    A setting is named where the method's runs differ in it and this one's is not the default.
    """
    all_hparams = [hparams(run) for run in runs]
    first, varied = {}, defaultdict(set)  # by method
    for run, settings in zip(runs, all_hparams, strict=True):
        reference = first.setdefault(run.method, settings)
        varied[run.method] |= {k for k in settings if settings[k] != reference.get(k)}
    variants = []
    for run, settings in zip(runs, all_hparams, strict=True):
        named = sorted(k for k in varied[run.method] if settings.get(k) != defaults().get(k))
        text = ", ".join(format_setting(key, settings[key]) for key in named)
        variants.append(Variant(run.method, text))
    return variants


def variant_rank(variant: Variant) -> tuple[int, int, list[str]]:
    """Return a key that sorts by method, number of settings that are named, and their values."""
    values = [setting.split(" ")[-1] for setting in variant.settings.split(", ")]
    return list(METHODS).index(variant.method), len(values), values


def hparams(run: Run) -> dict[str, Any]:
    """Return the settings that a run's numbers depend on, besides its path and its seed.

    A flag that is newer than the run has its default. Files are named without their folders, and
    few-shot lists as `label_inputs` does; the data's digest has the content of class names.
    """
    ignored = NON_HPARAMS | {*PATH_KEYS, "subsample"} | IGNORED_HPARAMS.get(run.method, set())
    settings = defaults() | run.config
    if settings["final_model"] == "last_step":
        ignored.add("eval_every")  # the weights do not depend on when they are evaluated
    if settings["classnames"]:
        settings["classnames"] = Path(settings["classnames"]).stem
    if settings["template"]:
        settings["template"] = slugify_templates(settings["template"])
    return {key: value for key, value in settings.items() if key not in ignored}


defaults = cache(default_settings)


def format_setting(key: str, value: Any) -> str:
    """Return a setting as tables name it: "lr 0.01", "dense_grad", "no flip"."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def label_datasets(data: Sequence[tuple[str, dict]]) -> list[str]:
    """Return, of names and `data`, names that differ where images do: "dtd (made split)"."""
    names = [name + " (made split)" * (info["split"] == "made") for name, info in data]
    return label_by_content(names, [info["digest"] for _, info in data])


def sort_datasets(labels: Iterable[str]) -> list[str]:
    """Return different labels in the order of the catalog; others follow by the alphabet."""
    ranks = {name: rank for rank, name in enumerate(DATASETS)}
    return sorted(set(labels), key=lambda x: (ranks.get(dataset_name(x), len(ranks)), x))


def display_name(label: str) -> str:
    """Return a dataset's title, followed by what `label_datasets` put behind its name."""
    name = dataset_name(label)
    return (DATASETS[name].title if name in DATASETS else name) + label[len(name) :]


def dataset_name(label: str) -> str:
    """Return the label without what follows the first blank or comma."""
    return re.split("[ ,]", label)[0]


# Means


def summarize(values: Sequence[float], variant: Variant | None = None) -> MeanStd:
    """Return mean and standard deviation over seeds; zero-shot accuracies have none."""
    seeds = None if variant == ZERO_SHOT else len(values)
    return MeanStd(fmean(values), stdev(values) if len(values) > 1 else None, seeds)


def mean_if_equal(values: Sequence[float | None]) -> float | None:
    """Return the mean of values that differ only by rounding; None where they differ by more."""
    if None in values or max(values) - min(values) > ZERO_SHOT_TOLERANCE:
        return None
    return fmean(values)


def confidence_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return a mean and half the width of its 95 % confidence interval (Student's)."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), float(student.ppf(0.975, len(values) - 1)) * sem(values)
