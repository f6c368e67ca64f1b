"""The report's tables, in Markdown for reading and in CSV with the same values unrounded."""

from collections.abc import Sequence
from typing import NamedTuple

from reporting.aggregate import (
    LABELS,
    PUBLISHED,
    BackboneResults,
    MeanStd,
    PairedTest,
    Variant,
    common_datasets_and_seeds,
    confidence_interval,
    display_name,
    mean_over_seeds,
    paired_test,
    published_figures,
    seed_means,
    table_lines,
    zero_shot_mean,
)
from reporting.markdown import markdown
from utils import plural

ZERO_SHOT = Variant("zero_shot")
ACCURACIES = (
    "Test accuracy in percent: mean ± standard deviation over seeds (number of seeds). Where a "
    "method ran with several settings, those that differ follow its name; a flag at its default is "
    "not named. Zero-shot accuracies that differ between runs are left out. Beside ours are those "
    "that others published, by the numbers of their sources: in brackets ours minus theirs. They "
    "belong to a method, not to one of its settings, and stand beside the first; tables.csv "
    "compares all. "
    "The mean, also of published figures, is over the datasets on which every method ran with the "
    "same seeds; its standard deviation is that of each seed's mean."
)
PAIRED_DIFFERENCES = (
    "Mean differences in points on the same datasets and seeds, ± half of their 95 % confidence "
    "intervals (Student's, over seeds). In brackets: how often the first is better/equal/worse, "
    "and p of the two-sided sign test, which takes all pairs as independent."
)


class Row(NamedTuple):
    """A line of tables.csv; None is an empty field."""

    backbone: str
    dataset: str
    shots: int
    method: str
    settings: str  # those that tell it from the method's other lines
    mean: float | None
    std: float | None
    seeds: int | None
    zero_shot: float | None
    published: float | None
    published_source: str | None
    difference: float | None  # ours minus published
    balanced_accuracy: float | None  # mean over seeds
    macro_f1: float | None

    @property
    def variant(self) -> Variant:
        """The method with its settings."""
        return Variant(self.method, self.settings)


def table_rows(results: BackboneResults) -> list[Row]:
    """Return all lines of tables.csv for a backbone: by shots, dataset (the mean last), variant.

    Methods that only others ran come last, where figures of theirs are published.
    """
    rows = []
    others = {row["method"]: None for row in PUBLISHED["figures"] if row["method"] not in LABELS}
    for shots in results.shots:
        for name, datasets, seeds in table_lines(results, shots):
            zero_shot = zero_shot_mean(results, datasets)
            for variant in [ZERO_SHOT, *results.variants, *map(Variant, others)]:
                ours = mean_over_seeds(results, datasets, seeds, shots, variant)
                if variant == ZERO_SHOT and zero_shot is not None:
                    ours = MeanStd(zero_shot, None, None)
                figures = published_figures(results, variant.method, shots, datasets)
                by_class = (
                    mean_over_seeds(results, datasets, seeds, shots, variant, key)
                    for key in ("balanced_accuracy", "macro_f1")
                )
                by_class = [mean and mean.mean for mean in by_class]
                for source, figure in figures or [(None, None)] * (variant.method not in others):
                    cell = results.name, name, shots, *variant, *(ours or (None, None, 0))
                    difference = ours.mean - figure if ours and figure is not None else None
                    rows.append(Row(*cell, zero_shot, figure, source, difference, *by_class))
    return rows


def backbone_section(results: BackboneResults, rows: Sequence[Row]) -> str:
    """Return the Markdown section of a backbone."""
    sources = [s for s in PUBLISHED["sources"] if any(row.published_source == s for row in rows)]
    footnotes = {source: number for number, source in enumerate(sources, start=1)}
    parts = [f"## {results.name}", provenance_line(results)]
    parts.append(ACCURACIES)
    if sources:
        lines = [
            f"* [{n}] {source}: {PUBLISHED['sources'][source]}." for source, n in footnotes.items()
        ]
        parts.append("\n".join(lines))
    for shots in results.shots:
        shots_rows = [row for row in rows if row.shots == shots]
        parts += [f"### {plural(shots, 'shot')}", accuracy_table(results, shots_rows, footnotes)]
        if others := [row for row in shots_rows if row.method not in LABELS]:
            figures = [
                f"{r.method} {r.published:.2f} [{footnotes[r.published_source]}]" for r in others
            ]
            parts.append(f"Published means of other methods: {', '.join(figures)}.")
    if table := paired_differences_table(results):
        parts += ["### Paired differences", PAIRED_DIFFERENCES, table]
    parts += [
        "### Memory and time",
        "Peak memory and time of a whole run, evaluations included: means over the datasets and "
        "seeds with which every method ran.",
        cost_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def provenance_line(results: BackboneResults) -> str:
    """Return how many runs there are, of which commits and versions, on which devices."""
    runs = results.runs()
    columns = zip(*((r.git_commit, r.versions.get("torch"), r.device) for r in runs), strict=True)
    texts = [", ".join(sorted({str(value) for value in column})) for column in columns]
    return "{}. Commit: {}. PyTorch: {}. Device: {}.".format(plural(len(runs), "run"), *texts)


def accuracy_table(results: BackboneResults, rows: Sequence[Row], footnotes: dict[str, int]) -> str:
    """Return the table of one number of shots: datasets down, variants across.

    The published figures of a method stand once, behind the first of its variants.
    """
    cells, headers = {}, {}  # by column: (variant's number, source's number)
    variants = [ZERO_SHOT, *results.variants]
    with_published = [ZERO_SHOT, *results.default_variants()]
    for row in (row for row in rows if row.variant in variants):
        column = variants.index(row.variant), 0
        if row.mean is not None or row.variant in with_published:  # others ran with other shots
            headers[column] = row.variant.label
        cells[row.dataset, column] = format_mean(row.mean, row.std, row.seeds)
        if row.published is not None and row.variant in with_published:
            column = column[0], footnotes[row.published_source]
            headers[column] = f"{row.published_source} [{column[1]}]"
            difference = "" if row.difference is None else f" ({row.difference:+.2f})"
            cells[row.dataset, column] = f"{round(row.published, 2)}{difference}"
    lines = (
        [display_name(name), *(cells.get((name, column), "-") for column in sorted(headers))]
        for name in dict.fromkeys(row.dataset for row in rows)
    )
    return markdown(["dataset", *(headers[column] for column in sorted(headers))], lines)


def paired_differences_table(results: BackboneResults, key: str = "final_accuracy") -> str | None:
    """Return how the first variant differs from each other one, by shots and over all of them."""
    first, *others = results.variants
    columns = {plural(n, "shot"): [n] for n in results.shots}
    if len(results.shots) > 1:
        columns["all"] = results.shots
    lines = []
    for other in others:
        tests = [paired_test(results, first, other, shots, key) for shots in columns.values()]
        lines.append([other.label, *map(format_paired, tests)])
    return markdown([f"{first.label} minus", *columns], lines) if lines else None


def shots_table(results: BackboneResults, key: str = "final_accuracy") -> str:
    """Return means on the first dataset, ± half of their 95 % confidence intervals, by shots."""
    lines = []
    for variant in results.variants:
        cells = [
            seed_means(results, results.datasets[:1], None, n, variant, key) for n in results.shots
        ]
        texts = [format_spread(*confidence_interval(v), ".1f") if v else "-" for v in cells]
        lines.append([variant.label, *texts])
    return markdown(["", *(plural(n, "shot") for n in results.shots)], lines)


def cost_table(results: BackboneResults) -> str:
    """Return memory and time by shots and variant, over the datasets that all methods have."""
    lines = []
    for shots in results.shots:
        common, seeds = common_datasets_and_seeds(results, shots)
        line = [str(shots), str(len(common))]
        for variant in results.variants:
            cost = [
                mean_over_seeds(results, common, seeds, shots, variant, key)
                for key in ("peak_memory_mb", "wall_seconds")
            ]
            line.append(
                "{:,.0f} MB, {:,.1f} s".format(*(c.mean for c in cost)) if all(cost) else "-"
            )
        lines.append(line)
    return markdown(["shots", "datasets", *(v.label for v in results.variants)], lines)


# Cells


def format_mean(mean: float | None, spread: float | None = None, seeds: int | None = None) -> str:
    """Return "63.00 ± 3.61 (2)"; without the parts that are None, "-" without a mean."""
    if mean is None:
        return "-"
    return format_spread(mean, spread) + ("" if seeds is None else f" ({seeds})")


def format_spread(mean: float, spread: float | None, form: str = ".2f") -> str:
    """Return "63.00 ± 3.61"; without the latter where there is none."""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def format_paired(test: PairedTest | None) -> str:
    """Return "+2.69 ± 0.92 (24/0/1, p 1.5e-06)"."""
    if test is None:
        return "-"
    counts = f"{test.wins}/{test.ties}/{test.losses}"
    return f"{format_spread(test.mean, test.half_width, '+.2f')} ({counts}, p {test.p_value:.2g})"
