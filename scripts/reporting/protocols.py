"""The field's other protocols: from base to new classes, and from one dataset to others.

Both are computed for each seed, and averaged over seeds then.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from datasets import DATASETS
from reporting.markdown import markdown
from reporting.numbers import (
    CLOSE,
    Stat,
    Study,
    Variant,
    complete,
    find_datasets,
    mean_and_std,
    title_of,
    zero_shot,
)
from reporting.tables import ZERO_SHOT, with_spread
from utils import plural

BASE_TO_NEW = (
    "Trained on base classes, the first half; accuracy on test images of these, and on those of "
    "the other half, each among its own classes: mean ± standard deviation over seeds (number of "
    "seeds). H is each seed's harmonic mean of the two, 2 b n / (b + n); in the last lines that of "
    "their means over datasets."
)
TRANSFER = (
    "Trained on the first dataset alone and tested on the others, each with its own classes: mean "
    "± standard deviation over seeds (number of seeds). The average is that of the targets."
)


class ToNew(NamedTuple):
    """A line of base_to_new.csv; None is an empty field."""

    backbone: str
    dataset: str
    shots: int
    method: str
    settings: str
    base: float | None
    base_std: float | None
    new: float | None
    new_std: float | None
    harmonic: float | None
    harmonic_std: float | None
    seeds: int | None

    @property
    def cells(self) -> list[str]:
        """Base, new and harmonic mean for a table."""
        return [text(Stat(*self[i : i + 2], self.seeds)) for i in (5, 7, 9)]  # mean and std


class Transferred(NamedTuple):
    """A line of transfer.csv; None is an empty field."""

    backbone: str
    source: str
    kind: str  # of targets
    shots: int | None
    method: str
    settings: str
    target: str  # or the source itself, or "average" of this kind's targets
    mean: float | None
    std: float | None
    seeds: int | None


def harmonic(base: float, new: float) -> float:
    """The harmonic mean of two accuracies."""
    return 2 * base * new / (base + new) if base + new else 0.0


def text(stat: Stat) -> str:
    """A cell: mean ± standard deviation (number of seeds)."""
    if stat.mean is None:
        return "-"
    return with_spread(stat.mean, stat.std) + ("" if stat.seeds is None else f" ({stat.seeds})")


# From base to new classes


def base_to_new(study: Study) -> list[ToNew]:
    """Base, new and harmonic mean by shots, dataset (the mean last) and variant."""
    rows = []
    for shots in study.shots:
        whole, seeds = complete(study, shots)
        lines = [(name, [name], None) for name in study.datasets]
        if len(lines) > 1:
            lines.append((f"mean over {len(whole)} of {len(lines)}", whole, seeds))
        for (name, datasets, chosen), variant in product(lines, [ZERO_SHOT, *study.variants]):
            if variant == ZERO_SHOT:
                pairs, count = [(zero_shot(study, datasets), zero_shot_new(study, datasets))], None
            else:
                pairs = pairs_of(study, datasets, chosen, shots, variant)
                count = len(pairs)
            if pairs and None not in pairs[0]:
                columns = zip(*((*pair, harmonic(*pair)) for pair in pairs), strict=True)
                stats = [value for column in columns for value in mean_and_std(column)]
                rows.append(ToNew(study.backbone, name, shots, *variant, *stats, count))
    return rows


def pairs_of(
    study: Study, datasets: Sequence[str], seeds: Iterable[int] | None, shots: int, variant: Variant
) -> list[tuple[float, float]]:
    """Each seed's accuracies on base and on new classes, means over datasets.

    [] where the variant lacks one of these runs.
    """
    cells = [study.cell(name, shots, variant) for name in datasets]
    seeds = sorted(cells[0]) if seeds is None else seeds
    runs = [[cell[seed] for cell in cells if seed in cell] for seed in seeds]
    if any(len(some) < len(cells) or any(run.new is None for run in some) for some in runs):
        return []
    return [(fmean(r.accuracy for r in some), fmean(r.new for r in some)) for some in runs if some]


def zero_shot_new(study: Study, datasets: Iterable[str]) -> float | None:
    """Zero-shot accuracy on new classes, the mean over datasets; None where runs disagree."""
    values = [agreed(run.zero_shot_new for run in study.runs(name)) for name in datasets]
    return fmean(values) if values and None not in values else None


def agreed(values: Iterable[float | None]) -> float | None:
    """The mean of values that differ by rounding alone; None where they differ by more."""
    values = list(values)
    if not values or None in values or max(values) - min(values) > CLOSE:
        return None
    return fmean(values)


def base_to_new_text(rows: Sequence[ToNew]) -> str:
    """The Markdown section on base and new classes; "" where there is nothing to tell."""
    parts = []
    for shots in dict.fromkeys(row.shots for row in rows):
        lines = [
            [title_of(row.dataset), Variant(row.method, row.settings).label, *row.cells]
            for row in rows
            if row.shots == shots
        ]
        table = markdown(["dataset", "method", "base", "new", "H"], lines, left=2)
        parts += [f"### From base to new classes, {plural(shots, 'shot')}", BASE_TO_NEW, table]
    return "\n\n".join(parts) + "\n" if parts else ""


# From one dataset to others


def transfer(study: Study) -> list[Transferred]:
    """Accuracies on a source and its targets, by source, kind of targets, shots and variant."""
    rows = []
    for source in study.datasets:
        runs = [run for run in study.runs(source) if run.transfer]
        found = [(run, name) for run in runs for name in run.transfer]
        names, order = find_datasets([(name, run.transfer[name]["data"]) for run, name in found])
        reached: dict[Path, dict[str, dict]] = defaultdict(dict)
        kinds = {}  # of targets
        for (run, dataset), name in zip(found, names, strict=True):
            reached[run.folder][name] = run.transfer[dataset]
            kinds[name] = kind_of(dataset)
        for kind in sorted({*kinds.values()}, reverse=True):
            targets = [name for name in order if kinds[name] == kind]
            for shots, variant in [(None, ZERO_SHOT), *product(study.shots, study.variants)]:
                zero = variant == ZERO_SHOT
                some = runs if zero else list(study.cell(source, shots, variant).values())
                key = "zero_shot_accuracy" if zero else "final_accuracy"
                own = [
                    (run.zero_shot if zero else run.accuracy, reached[run.folder])
                    for run in some
                    if reached.get(run.folder, {}).keys() & set(targets)
                ]
                columns = {source: [accuracy for accuracy, _ in own]}
                columns |= {t: [on[t][key] for _, on in own if t in on] for t in targets}
                whole = [on for _, on in own if set(targets) <= on.keys()]
                columns["average"] = [fmean(on[t][key] for t in targets) for on in whole]
                where = study.backbone, source, kind, shots, *variant
                rows += [Transferred(*where, t, *stat_of(v, zero)) for t, v in columns.items() if v]
    return rows


def kind_of(dataset: str) -> str:
    """What a table with this target is called."""
    variant = dataset in DATASETS and DATASETS[dataset].test_only
    return "Domain generalisation" if variant else "Cross-dataset transfer"


def stat_of(values: Sequence[float], zero_shot: bool) -> Stat:
    """Mean and standard deviation over seeds; zero-shot accuracies have none, and must agree."""
    if zero_shot:
        return Stat(agreed(values), None, None)
    return Stat(*mean_and_std(values), len(values))


def transfer_text(rows: Sequence[Transferred]) -> str:
    """The Markdown section on other datasets; "" where there is nothing to tell."""
    parts = []
    for source, kind in dict.fromkeys((row.source, row.kind) for row in rows):
        here = [row for row in rows if (row.source, row.kind) == (source, kind)]
        columns = list(dict.fromkeys(row.target for row in here))  # zero-shot has all of them
        cells: dict[tuple, dict[str, str]] = {}
        for row in here:
            line = cells.setdefault((row.shots, Variant(row.method, row.settings)), {})
            line[row.target] = text(Stat(row.mean, row.std, row.seeds))
        lines = [
            [str(shots or "-"), variant.label, *(line.get(name, "-") for name in columns)]
            for (shots, variant), line in cells.items()
        ]
        titles = [title_of(name) for name in columns]
        table = markdown(["shots", "method", *titles], lines, left=2)
        parts += [f"### {kind} from {title_of(source)}", TRANSFER, table]
    return "\n\n".join(parts) + "\n" if parts else ""
