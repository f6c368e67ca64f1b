"""The report's tables, in Markdown for reading and in CSV with the same values unrounded."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from reporting.markdown import markdown
from reporting.numbers import (
    LABELS,
    METHODS,
    Pairs,
    Published,
    Stat,
    Study,
    Variant,
    complete,
    mean_and_std,
    mean_over,
    pairs,
    published_for,
    title_of,
    zero_shot,
)
from utils import plural, to_csv

ZERO_SHOT = Variant("zero_shot")


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
    within_spread: str | None  # yes or no: whether the difference is at most std

    @property
    def variant(self) -> Variant:
        """The method with its settings."""
        return Variant(self.method, self.settings)


# Rows


def table_rows(study: Study, published: Sequence[Published]) -> list[Row]:
    """All lines of tables.csv for a backbone: by shots, dataset (the mean last) and variant.

    Methods that are published alone come last, where there are figures of theirs.
    """
    rows = []
    others = [Variant(m) for m in dict.fromkeys(p.method for p in published) if m not in LABELS]
    for shots in study.shots:
        whole, seeds = complete(study, shots)
        lines = [(name, [name]) for name in study.datasets]
        if len(lines) > 1:
            lines.append((f"mean over {len(whole)} of {len(lines)}", whole))
        for name, datasets in lines:
            base = zero_shot(study, datasets)
            for variant in [ZERO_SHOT, *study.variants, *others]:
                if variant == ZERO_SHOT:
                    ours = None if base is None else Stat(base, None, None)
                elif variant in others:
                    ours = None
                else:
                    own = None if name in study.datasets else seeds
                    ours = mean_over(study, datasets, own, shots, variant)
                theirs = published_for(published, study, variant.method, datasets)
                theirs = [(row.source, x) for row, x in theirs if row.shots in (None, shots)]
                for source, figure in theirs or [(None, None)] * (variant not in others):
                    mine = study.backbone, name, shots, *variant, *(ours or (None, None, 0)), base
                    rows.append(Row(*mine, figure, source, *compare(ours, figure)))
    return rows


def compare(ours: Stat | None, figure: float | None) -> tuple[float | None, str | None]:
    """Ours minus a published figure, and whether that is within our standard deviation."""
    if ours is None or figure is None:
        return None, None
    difference = ours.mean - figure
    if ours.std is None:
        return difference, None
    return difference, "yes" if abs(difference) <= ours.std + 1e-9 else "no"


def csv_text(rows: Iterable[Row]) -> str:
    """The contents of tables.csv."""
    return to_csv(Row._fields, rows)


# Cells


def with_spread(mean: float, spread: float | None, form: str = ".2f") -> str:
    """Such as "63.00 ± 3.61"; without the latter where there is none."""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def mean_text(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, to one decimal."""
    return with_spread(*mean_and_std(values), ".1f")


def ours_text(row: Row) -> str:
    """Our cell: mean ± standard deviation (number of seeds)."""
    if row.mean is None:
        return "-"
    return with_spread(row.mean, row.std) + ("" if row.seeds is None else f" ({row.seeds})")


def published_text(row: Row) -> str:
    """A published cell: figure (our difference, whether within the spread)."""
    figure = str(round(row.published, 2))
    if row.difference is None:
        return figure
    verdict = {"yes": ", within", "no": ", outside", None: ""}[row.within_spread]
    return f"{figure} ({row.difference:+.2f}{verdict})"


def pairs_text(found: Pairs | None) -> tuple[str, str, str]:
    """Three cells of the table of pairs."""
    if found is None:
        return "-", "-", "-"
    counts = f"{found.better} / {found.equal} / {found.worse}"
    return with_spread(found.mean, found.half, "+.2f"), counts, f"{found.p:.2g}"


# Tables


def accuracy_table(study: Study, rows: Sequence[Row], marks: dict[str, int]) -> str:
    """The table of one shot count: datasets down, variants with published figures across.

    A published figure belongs to a method, whatever its settings: it stands once, behind the
    first of them.
    """
    cells, columns = {}, {}
    rows = [row for row in rows if row.variant in [ZERO_SHOT, *study.variants]]
    for row in rows:
        variant, source = row.variant, row.published_source
        usual = variant in study.firsts() and row.method in METHODS
        if usual or row.mean is not None or variant == ZERO_SHOT:  # others of these shots alone
            columns[variant, None] = variant.label
        cells[row.dataset, variant, None] = ours_text(row)
        if row.published is not None and variant in [ZERO_SHOT, *study.firsts()]:
            columns[variant, source] = f"{source} [{marks[source]}]"
            cells[row.dataset, variant, source] = published_text(row)
    variants = list(dict.fromkeys(row.variant for row in rows))
    order = sorted(columns, key=lambda c: (variants.index(c[0]), marks.get(c[1], 0)))
    lines = (
        [title_of(name), *(cells.get((name, *column), "-") for column in order)]
        for name in dict.fromkeys(row.dataset for row in rows)
    )
    return markdown(["dataset", *(columns[column] for column in order)], lines)


def means_table(study: Study, rows: Sequence[Row], marks: dict[str, int]) -> str | None:
    """Means over the datasets of the published ones: methods down, ours first, shots across.

    None where ours are never over all of these datasets.
    """
    mine = [ZERO_SHOT, *study.variants]
    shots = sorted({row.shots for row in rows if row.variant not in mine})
    rows = [row for row in rows if row.dataset not in study.datasets and row.shots in shots]
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        if row.mean is not None:
            cells.setdefault(row.variant.label, {})[row.shots] = ours_text(row)
    for row in sorted(rows, key=lambda row: marks.get(row.published_source, 0)):
        if row.published is not None:
            label = f"{Variant(row.method).label} [{marks[row.published_source]}]"
            cells.setdefault(label, {})[row.shots] = f"{row.published:.2f}"
    lines = [[label, *(line.get(n, "-") for n in shots)] for label, line in cells.items()]
    return markdown(["", *(plural(n, "shot") for n in shots)], lines) if shots else None


def cost_table(study: Study) -> str:
    """Memory and time by shots and variant, over complete datasets."""
    lines = []
    for shots in study.shots:
        whole, seeds = complete(study, shots)
        lines.append([str(shots), str(len(whole))])
        for variant in study.variants:
            memory = mean_over(study, whole, seeds, shots, variant, "memory")
            time = mean_over(study, whole, seeds, shots, variant, "seconds")
            lines[-1].append(f"{memory.mean:,.0f} MB, {time.mean:,.1f} s" if memory else "-")
    return markdown(["shots", "datasets", *(v.label for v in study.variants)], lines)


def pairs_table(study: Study) -> str | None:
    """How the first variant differs from each other one, by shots and over all of them."""
    first, *others = [v for v in study.variants if v.method in METHODS] or [None]
    lines = []
    for label, shots in [*((str(n), [n]) for n in study.shots), ("all", study.shots)]:
        found = [pairs(study, first, other, shots) for other in others]
        if any(found) and (label != "all" or len(study.shots) > 1):
            lines.append([label, *(text for one in found for text in pairs_text(one))])
    if not lines:
        return None
    header = ["shots"]
    for other in others:
        header += [f"{first.label} - {other.label}", "better / equal / worse", "p"]
    return markdown(header, lines)


# A backbone's section


def study_text(study: Study, rows: Sequence[Row], sources: dict[str, str]) -> str:
    """The Markdown section of a backbone."""
    used = [source for source in sources if any(row.published_source == source for row in rows)]
    marks = {source: number for number, source in enumerate(used, start=1)}
    parts = [f"## {study.backbone}", made_by(study), introduction(study, bool(used))]
    if used:
        parts.append("\n".join(f"* [{marks[s]}] {s}: {sources[s]}." for s in used))
    for shots in study.shots:
        here = [row for row in rows if row.shots == shots]
        parts += [f"### {plural(shots, 'shot')}", accuracy_table(study, here, marks)]
        whole, seeds = complete(study, shots)
        if len(study.datasets) > 1:
            parts.append(
                f"The mean, published ones too, is over the {len(whole)} of {len(study.datasets)} "
                f"datasets on which every method ran with {plural(len(seeds), 'seed')} "
                f"({', '.join(map(str, seeds))}); its spread is that of each seed's mean."
            )
    if table := means_table(study, rows, marks):
        parts += [
            "### Means beside published ones",
            "Over the eleven datasets: ours, then figures of others, by the numbers of their "
            "sources above.",
            table,
        ]
    if table := pairs_table(study):
        parts += [
            "### Paired differences",
            "Mean difference in points over the same datasets and seeds, ± half of its 95 % "
            "confidence interval (Student's, over seeds); the number of datasets and seeds on "
            "which the first is better, equal and worse; p of the two-sided sign test over these.",
            table,
        ]
    parts += [
        "### Memory and time",
        "Peak memory and time of a whole run, its evaluations included: means over the datasets "
        "and seeds with which every method ran.",
        cost_table(study),
    ]
    return "\n\n".join(parts) + "\n"


def made_by(study: Study) -> str:
    """How many runs there are, and by which versions on which devices they were made."""
    runs = study.runs()
    columns = zip(*(run.made_by for run in runs), strict=True)
    told = [", ".join(sorted(set(column))) for column in columns]
    return "{}. Commit: {}. PyTorch: {}. Device: {}.".format(plural(len(runs), "run"), *told)


def introduction(study: Study, with_published: bool) -> str:
    """How to read the tables of accuracies."""
    text = "Test accuracy in percent: mean ± standard deviation over seeds (number of seeds)."
    if any(variant.settings for variant in study.variants):
        text += (
            " Where a method ran with several settings, those that differ follow its name; a flag "
            "at its default is not named."
        )
    if with_published:
        text += (
            " Beside ours published figures: in brackets ours minus theirs, and whether that is "
            "within our standard deviation. They belong to a method, not to one of its settings, "
            "and stand beside the first; tables.csv compares all."
        )
    return text
