"""Tables and figures of finished runs, from their result.json and curve.csv files alone.

    python scripts/report.py results                        # writes results/report/
    python scripts/report.py results more --out docs/study

Per backbone: accuracy by dataset, method and shots as mean and standard deviation over seeds,
beside published figures (reporting/published.yaml); memory and time; accuracy by shots; curves.
tables.md is for reading, tables.csv holds the same numbers, one line per cell and published figure.
Runs that are broken or unfinished are named on standard error and left out. Figures need
matplotlib; without it there are tables alone.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from reporting.figures import can_draw, figures, png
from reporting.numbers import (  # which puts the repository on the path
    LABELS,
    METHODS,
    Published,
    Stat,
    Study,
    complete,
    find_runs,
    inconsistencies,
    mean_over,
    plural,
    published_for,
    read_published,
    studies,
    title_of,
    zero_shot,
)
from scipy.stats import binomtest, sem
from scipy.stats import t as student

from run_utils import Parser
from utils import atomic_write, explain, one_line, say

FIGURES = """## Figures

Bands in curves go from the lowest seed to the highest; a run that ended early is carried on at its
last value.
"""


class Row(NamedTuple):
    """A line of tables.csv; None is an empty field."""

    backbone: str
    dataset: str
    shots: int
    method: str
    mean: float | None
    std: float | None
    seeds: int | None
    zero_shot: float | None
    published: float | None
    published_source: str | None
    difference: float | None  # ours minus published
    within_spread: str | None  # yes or no: whether the difference is at most std


def table_rows(study: Study, published: Sequence[Published]) -> list[Row]:
    """All lines of tables.csv for a backbone: by shots, dataset (the mean last) and method."""
    rows = []
    for shots in study.shots:
        whole, seeds = complete(study, shots)
        lines = [(name, [name]) for name in study.datasets]
        if len(lines) > 1:
            lines.append((f"mean over {len(whole)} of {len(lines)}", whole))
        for name, datasets in lines:
            base = zero_shot(study, datasets)
            for method in ["zero_shot", *study.methods]:
                if method == "zero_shot":
                    ours = None if base is None else Stat(base, None, None)
                else:
                    own = None if name in study.datasets else seeds
                    ours = mean_over(study, datasets, own, shots, method)
                there = published_for(published, study, method, datasets)
                there = [(row.source, x) for row, x in there if row.shots in (None, shots)]
                for source, figure in there or [(None, None)]:
                    mine = study.backbone, name, shots, method, *(ours or (None, None, 0)), base
                    rows.append(Row(*mine, figure, source, *compare(ours, figure)))
    return rows


def compare(ours: Stat | None, figure: float | None) -> tuple[float | None, str | None]:
    """Ours minus a published figure, and whether that is within our standard deviation."""
    if ours is None or figure is None:
        return None, None
    difference = round(ours.mean - figure, 4)
    if ours.std is None:
        return difference, None
    return difference, "yes" if abs(difference) <= ours.std else "no"


# Tables


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text, too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in lines:
        line[:] = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(rows: Sequence[Row], marks: dict[str, int]) -> str:
    """The table of one shot count: datasets down, methods with their published figures across."""
    cells, columns = {}, {}
    for row in rows:
        if row.mean is not None or row.method in METHODS:  # ablations of other shots are left out
            columns[row.method, None] = LABELS.get(row.method, row.method)
        cells[row.dataset, row.method, None] = ours_text(row)
        if row.published is not None:
            source = row.published_source
            columns[row.method, source] = f"{source} [{marks[source]}]"
            cells[row.dataset, row.method, source] = published_text(row)
    methods = list(dict.fromkeys(row.method for row in rows))
    order = sorted(columns, key=lambda c: (methods.index(c[0]), marks.get(c[1], 0)))
    lines = (
        [title_of(name), *(cells.get((name, *column), "-") for column in order)]
        for name in dict.fromkeys(row.dataset for row in rows)
    )
    return markdown(["dataset", *(columns[column] for column in order)], lines)


def ours_text(row: Row) -> str:
    """Our cell: mean ± standard deviation (number of seeds)."""
    if row.mean is None:
        return "-"
    spread = "" if row.std is None else f" ± {row.std:.2f}"
    return f"{row.mean:.2f}{spread}" + ("" if row.seeds is None else f" ({row.seeds})")


def published_text(row: Row) -> str:
    """A published cell: figure (our difference, whether within the spread)."""
    if row.difference is None:
        return str(row.published)
    verdict = {"yes": ", within", "no": ", outside", None: ""}[row.within_spread]
    return f"{row.published} ({row.difference:+.2f}{verdict})"


def cost_table(study: Study) -> str:
    """Memory and time by shots and method, over complete datasets."""
    lines = []
    for shots in study.shots:
        whole, seeds = complete(study, shots)
        lines.append([str(shots), str(len(whole))])
        for method in study.methods:
            memory = mean_over(study, whole, seeds, shots, method, "memory")
            time = mean_over(study, whole, seeds, shots, method, "seconds")
            lines[-1].append(f"{memory.mean:,.0f} MB, {time.mean:,.1f} s" if memory else "-")
    return markdown(["shots", "datasets", *(LABELS.get(m, m) for m in study.methods)], lines)


class Pairs(NamedTuple):
    """Differences between two methods on the same datasets, shots and seeds, first minus second."""

    mean: float
    half: float | None  # of the 95 % confidence interval; None for a single seed
    better: int
    equal: int
    worse: int
    p: float  # of the two-sided sign test; 1 where all are equal


def pairs(study: Study, first: str, second: str, shots: Iterable[int]) -> Pairs | None:
    """Compare two methods where both ran: None where they never did.

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
    differences = [round(value, 6) for row in table for value in row]
    better, worse = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    decided = better + worse
    p = binomtest(better, decided).pvalue if decided else 1.0
    mean, half = interval([fmean(row) for row in table])
    return Pairs(mean, half, better, len(differences) - decided, worse, p)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """A mean and half the width of its 95 % confidence interval, by Student's distribution."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), float(student.ppf(0.975, len(values) - 1)) * sem(values)


def pairs_table(study: Study) -> str | None:
    """How the first method differs from each other one, by shots and over all of them."""
    first, *others = [method for method in study.methods if method in METHODS] or [None]
    lines = []
    for label, shots in [*((str(n), [n]) for n in study.shots), ("all", study.shots)]:
        found = [pairs(study, first, other, shots) for other in others]
        if any(found) and (label != "all" or len(study.shots) > 1):
            lines.append([label, *(text for one in found for text in pairs_text(one))])
    if not lines:
        return None
    header = ["shots"]
    for other in others:
        header += [f"{LABELS[first]} - {LABELS[other]}", "better / equal / worse", "p"]
    return markdown(header, lines)


def pairs_text(found: Pairs | None) -> tuple[str, str, str]:
    """Three cells of the table of pairs."""
    if found is None:
        return "-", "-", "-"
    spread = "" if found.half is None else f" ± {found.half:.2f}"
    counts = f"{found.better} / {found.equal} / {found.worse}"
    return f"{found.mean:+.2f}{spread}", counts, f"{found.p:.2g}"


def study_text(study: Study, rows: Sequence[Row], sources: dict[str, str]) -> str:
    """The Markdown section of a backbone."""
    made_by = [
        ", ".join(sorted(set(column)))
        for column in zip(*(r.made_by for r in study.runs()), strict=True)
    ]
    parts = [
        f"## {study.backbone}",
        "{}. Commit: {}. PyTorch: {}. Device: {}.".format(
            plural(len(study.runs()), "run"), *made_by
        ),
        "Test accuracy in percent: mean ± standard deviation over seeds (number of seeds).",
    ]
    used = [source for source in sources if any(row.published_source == source for row in rows)]
    marks = {source: number for number, source in enumerate(used, start=1)}
    if used:
        parts[-1] += (
            " Beside ours published figures: in brackets ours minus theirs, and whether that is "
            "within our standard deviation."
        )
        parts.append("\n".join(f"* [{marks[s]}] {s}: {sources[s]}." for s in used))
    for shots in study.shots:
        here = [row for row in rows if row.shots == shots]
        parts += [f"### {plural(shots, 'shot')}", accuracy_table(here, marks)]
        whole, seeds = complete(study, shots)
        if len(study.datasets) > 1:
            parts.append(
                f"The mean, published ones too, is over the {len(whole)} of {len(study.datasets)} "
                f"datasets on which every method ran with {plural(len(seeds), 'seed')} "
                f"({', '.join(map(str, seeds))}); its spread is that of each seed's mean."
            )
    if table := pairs_table(study):
        parts += [
            "### Paired differences",
            "Mean difference in points over the same datasets and seeds, ± half of its 95 % "
            "confidence interval (Student's, over seeds); on how many datasets and seeds the first "
            "is better, equal, worse; p of the two-sided sign test over these.",
            table,
        ]
    parts += [
        "### Memory and time",
        "Peak memory and time of a whole run, its evaluations included: means over the datasets "
        "and seeds with which every method ran.",
        cost_table(study),
    ]
    return "\n\n".join(parts) + "\n"


def csv_text(rows: Iterable[Row]) -> str:
    """The contents of tables.csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
    return text.getvalue()


# The command line


def report(folders: Sequence[Path], out: Path, complain: Callable[[str], None]) -> None:
    """Read the runs, write the tables and print them, then draw.

    Args:
        folders: Where to look for runs.
        out: The report's folder.
        complain: Gets a sentence for each run that is left out, and for what is odd.

    Raises:
        ValueError: A folder is not there, or no folder holds a finished run.
        OSError: The report cannot be written.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
    runs = find_runs(folders, complain)
    if not runs:
        raise ValueError(f"there is no finished run below {', '.join(map(str, folders))}")
    published, sources = read_published()
    rows, texts, plan = [], ["# Report\n"], {}
    for study in studies(runs):
        for oddity in inconsistencies(study):
            complain(f"note: {oddity}")
        rows.append(table_rows(study, published))
        texts.append(study_text(study, rows[-1], sources))
        plan.update(figures(study, published))
    if not can_draw():
        complain("no figures: matplotlib is missing; `pip install matplotlib` brings it")
        plan = {}
    links = "\n".join(f"* [{name}]({name})" for name in plan)

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "tables.csv", csv_text(row for part in rows for row in part))
    atomic_write(out / "tables.md", "\n".join([*texts, f"{FIGURES}\n{links}\n"] if plan else texts))
    say("\n".join(texts))
    for name, draw in plan.items():
        (out / name).parent.mkdir(exist_ok=True)
        atomic_write(out / name, png(draw))
    drawn = f" and {plural(len(plan), 'figure')}" if plan else ""
    say(f"{plural(len(runs), 'run')}: tables{drawn} in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "results", nargs="+", type=Path, help="folders that hold runs, at any depth"
    )
    parser.add_argument("--out", type=Path, help="the report's folder (report/ in the first one)")
    args = parser.parse_args(argv)

    def complain(sentence: str) -> None:
        print(one_line(f"report.py: {sentence}"), file=sys.stderr, flush=True)

    try:
        report(args.results, args.out or args.results[0] / "report", complain)
        return 0
    except (ValueError, OSError) as error:
        complain(f"error: {explain(error)}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted; the same command starts it again")
        return 130


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for terminals without ±
    sys.exit(main())
