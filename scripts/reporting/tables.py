"""The report's tables, in Markdown for reading and in CSV with the same values unrounded."""

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import fmean

from scipy.stats import binomtest

from reporting.aggregate import (
    LABELS,
    PUBLISHED,
    ZERO_SHOT,
    BackboneResults,
    MeanStd,
    confidence_interval,
    display_name,
)
from reporting.markdown import markdown
from utils import plural

ACCURACIES = (
    "Test accuracy in percent: mean ± standard deviation over seeds (number of seeds). Where a "
    "method ran with several settings, those that are not its defaults follow its name. Zero-shot "
    "accuracies that differ between runs are left out. Published figures stand beside the first "
    "variant of a method; in brackets ours minus theirs. The mean is over the datasets on which "
    "every method ran, its standard deviation that of each seed's mean. The last two lines are "
    "memory and time of a whole run, evaluations included, for the line above them."
)
PAIRED_DIFFERENCES = (
    "Mean differences in points on the same datasets and seeds, ± half of their 95 % confidence "
    "intervals (Student's, over seeds). In brackets: how often the first is better/equal/worse, "
    "and p of the two-sided sign test, which takes all pairs as independent."
)
COSTS = ("peak_memory_mb", "wall_seconds")
MEANS = ("balanced_accuracy", "macro_f1", "new_accuracy", *COSTS)  # over seeds
CSV_HEADER = [
    "backbone", "dataset", "shots", "method", "settings", "mean", "std", "seeds", "published",
    "published_source", "difference", *MEANS,
]  # fmt: skip


def csv_rows(results: BackboneResults) -> Iterator[list]:
    """Yield the lines of tables.csv: one for each cell, or for each figure published for it."""
    variants = [ZERO_SHOT, *results.variants]
    for shots in results.shots:
        for (name, datasets), variant in product(results.table_lines(shots), variants):
            ours = results.mean(datasets, shots, variant)
            means = [results.mean(datasets, shots, variant, key) for key in MEANS]
            cell = [results.name, name, shots, *variant, *(ours or (None, None, 0))]
            figures = results.published(variant.method, shots, datasets)
            for source, figure in figures.items() or [(None, None)]:
                difference = ours.mean - figure if ours and figure is not None else None
                yield [*cell, figure, source, difference, *(mean and mean.mean for mean in means)]


def backbone_section(results: BackboneResults) -> str:
    """Return the Markdown section of a backbone."""
    parts = [f"## {results.name}"]
    if results.name == PUBLISHED["backbone"]:
        sources = {row["source"]: None for row in PUBLISHED["figures"] if row["method"] in LABELS}
        parts.append("\n".join(f"* {name}: {PUBLISHED['sources'][name]}." for name in sources))
    for shots in results.shots:
        parts += [f"### {plural(shots, 'shot')}", accuracy_table(results, shots)]
    if len(results.variants) > 1:
        parts += ["### Paired differences", PAIRED_DIFFERENCES, paired_differences_table(results)]
    return "\n\n".join(parts) + "\n"


def accuracy_table(results: BackboneResults, shots: int) -> str:
    """Return the table of one number of shots: datasets down, variants across.

    The published figures of a method stand once, behind the first of its variants.
    """
    names, groups = zip(*results.table_lines(shots), strict=True)
    columns = {"dataset": [*map(display_name, names), "peak memory (MB)", "time (s)"]}
    variants = [ZERO_SHOT, *results.variants]
    first = {variant.method: variant for variant in reversed(variants)}.values()
    for variant in variants:
        ours = [results.mean(datasets, shots, variant) for datasets in groups]
        costs = [results.mean(groups[-1], shots, variant, key) for key in COSTS]
        if any(ours):  # others ran with other shots
            texts = [f"{cost.mean:,.1f}" if cost else "-" for cost in costs]
            columns[variant.label] = [*map(format_mean, ours), *texts]
        published = [results.published(variant.method, shots, datasets) for datasets in groups]
        for source in dict.fromkeys(source for figures in published for source in figures):
            if variant in first:
                figures = [figures.get(source) for figures in published]
                columns[source] = [*map(format_published, figures, ours), "-", "-"]
    lines = zip(*columns.values(), strict=True)
    return markdown(list(columns), [line for line in lines if set(line[1:]) != {"-"}])


def paired_differences_table(results: BackboneResults, key: str = "final_accuracy") -> str:
    """Return how the first variant differs from each other one, by shots and over all of them."""
    first, *others = results.variants
    columns = {plural(n, "shot"): [n] for n in results.shots}
    if len(results.shots) > 1:
        columns["all"] = results.shots
    lines = []
    for other in others:
        by_shots = (results.paired_differences(first, other, n, key) for n in columns.values())
        lines.append([other.label, *map(format_differences, by_shots)])
    return markdown([f"{first.label} minus", *columns], lines)


def shots_table(results: BackboneResults, key: str = "final_accuracy") -> str:
    """Return means on the first dataset, ± half of their 95 % confidence intervals, by shots."""
    lines = []
    for variant in results.variants:
        cells = [results.seed_means(results.datasets[:1], n, variant, key) for n in results.shots]
        texts = [format_spread(*confidence_interval(v), ".1f") if v else "-" for v in cells]
        lines.append([variant.label, *texts])
    return markdown(["", *(plural(n, "shot") for n in results.shots)], lines)


# Cells


def format_mean(mean: MeanStd | None) -> str:
    """Return "63.00 ± 3.61 (2)"; without the parts that are None, "-" without a mean."""
    if mean is None:
        return "-"
    return format_spread(*mean[:2]) + ("" if mean.seeds is None else f" ({mean.seeds})")


def format_spread(mean: float, spread: float | None, form: str = ".2f") -> str:
    """Return "63.00 ± 3.61"; without the latter where there is none."""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def format_published(figure: float | None, ours: MeanStd | None) -> str:
    """Return "66.4 (+0.10)"; without the difference where we have no mean."""
    if figure is None:
        return "-"
    return f"{round(figure, 2)}" + (f" ({ours.mean - figure:+.2f})" if ours else "")


def format_differences(by_seed: Sequence[Sequence[float]]) -> str:
    """Return paired differences as "+2.69 ± 0.92 (24/0/1, p 1.5e-06)"; "-" without any."""
    if not by_seed:
        return "-"
    differences = [difference for row in by_seed for difference in row]
    wins, losses = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    p_value = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    mean = format_spread(*confidence_interval([fmean(row) for row in by_seed]), "+.2f")
    return f"{mean} ({wins}/{len(differences) - wins - losses}/{losses}, p {p_value:.2g})"
