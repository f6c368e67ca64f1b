"""Tables and figures of finished runs, from their result.json and curve.csv files alone.

    python scripts/report.py results                        # writes results/report/
    python scripts/report.py results more --out docs/study

Per backbone: accuracy by dataset, method and shots as mean and standard deviation over seeds,
beside published figures (scripts/published.yaml); memory and time; accuracy against shots; curves.
tables.md is for reading, tables.csv holds the same numbers, one line per cell and published figure.
Runs that are broken or unfinished are named on standard error and left out. Figures need
matplotlib; without it there are tables alone.
"""

import csv
import io
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip  # noqa: E402
from datasets import DATASETS  # noqa: E402
from run_utils import Parser  # noqa: E402
from utils import atomic_write, one_line  # noqa: E402

PUBLISHED = Path(__file__).with_name("published.yaml")
METHODS = {"so": "SO", "lora": "LoRA", "adam": "Adam"}  # others are ablations, by their own name
LABELS = {"zero_shot": "zero-shot", **METHODS}
COLUMNS = ["iteration", "loss", "lr", "test_accuracy"]  # of curve.csv
FIELDS = {  # of result.json: type, then a number's range or a text's pattern
    "method": (str, r"\w[\w.+-]*"),
    "backbone": (str, r".*\w.*"),
    "dataset": (str, r"\w[\w.+-]*"),
    "shots": (int, 1, 10**6),
    "seed": (int, 0, 10**18),
    "zero_shot_accuracy": (int | float, 0, 100),
    "final_accuracy": (int | float, 0, 100),
    "iterations": (int, 1, 10**9),
    "wall_seconds": (int | float, 0, 10**9),
    "peak_memory_mb": (int | float, 0, 10**9),
    "config": (dict,),
}
# Colours of Okabe and Ito; the first three differ in lightness, all in mark, line and hatch, too.
COLOURS = ["#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00"]
MARKS, HATCHES = "os^DvPX", ["", "///", "...", "xxx", "\\\\\\", "ooo", "+++"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3))]
LOOK = {
    "savefig.dpi": 150, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "figure.constrained_layout.use": True, "hatch.linewidth": 0.6,
}  # fmt: skip
FIGURES = """## Figures

Bands in curves go from the lowest seed to the highest; a run that ended early is carried on at its
last value.
"""


class Run(NamedTuple):
    """A finished run."""

    method: str
    backbone: str
    dataset: str
    shots: int
    seed: int
    zero_shot: float  # accuracies in percent
    accuracy: float
    seconds: float
    memory: float  # MB
    loss: np.ndarray  # (iterations,)
    evaluated: np.ndarray  # (E, 2): iteration, test accuracy; zero-shot at iteration 0 first
    settings: dict[str, Any]
    made_by: tuple[str, str, str]  # commit, torch's version, device


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
                _, first = runs.setdefault(run[:5], (run, folder))
                if first != folder:
                    raise ValueError(f"the same run as {first}, which is kept")
            except (ValueError, OSError, csv.Error, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                complain(f"skipped {path}: {reason}")
    return [run for run, _ in runs.values()]


def read_run(folder: Path) -> Run:
    """Read a run's files.

    Raises:
        ValueError: One of them is not what a finished run leaves; the sentence says why.
        OSError, csv.Error, RecursionError: It cannot be read at all.
    """
    path = folder / "result.json"
    if path.exists() and not path.is_file():  # reading a pipe would never end
        raise ValueError("result.json is not a file")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"result.json is not JSON ({error})") from error
    check_result(result)
    method, dataset, shots, seed = (result[k] for k in ("method", "dataset", "shots", "seed"))
    if folder.parts[-3:] == (dataset, f"{shots}shots", f"seed{seed}") and len(folder.parts) > 5:
        method = folder.parts[-5]  # the folder tells an ablation from its method
    loss, evaluated = read_curve(folder / "curve.csv", result["iterations"])
    zero_shot = result["zero_shot_accuracy"]
    versions = result.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    made_by = (result.get("git_commit"), torch, result.get("device"))
    return Run(
        method, backbone_name(result["backbone"]), dataset, shots, seed, zero_shot,
        result["final_accuracy"], result["wall_seconds"], result["peak_memory_mb"], loss,
        np.array([(0, zero_shot), *evaluated], float), result["config"],
        tuple(str(value or "unknown") for value in made_by),
    )  # fmt: skip


def check_result(result: Any) -> None:
    """Raise a ValueError that says what is wrong with the contents of a result.json."""
    if not isinstance(result, dict):
        raise ValueError("result.json does not hold an object")
    for key, (kind, *limits) in FIELDS.items():
        if key not in result:
            raise ValueError(f"result.json has no {key}")
        value = result[key]
        good = isinstance(value, kind) and not isinstance(value, bool)
        if good and kind is str:
            good = re.fullmatch(limits[0], value, re.ASCII) is not None
        elif good and limits:
            good = limits[0] <= value <= limits[1]  # NaN is not
        if not good:
            raise ValueError(f"result.json: {key} cannot be {str(value)[:50]!r}")


def read_curve(path: Path, iterations: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """The loss of each iteration, and (iteration, test accuracy) where it was measured."""
    if not path.is_file():
        raise ValueError("there is no curve.csv")
    losses, evaluated = [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader, None) != COLUMNS:
            raise ValueError(f"curve.csv does not begin with the columns {','.join(COLUMNS)}")
        for count, row in enumerate(reader, start=1):
            try:
                iteration, loss, lr, accuracy = row
                numbers = [float(loss), float(lr), float(accuracy or 0)]
                good = int(iteration) == count and all(map(math.isfinite, numbers))
            except ValueError:
                good = False
            if not good or not 0 <= numbers[2] <= 100:
                raise ValueError(f"curve.csv is malformed at line {count + 1}")
            losses.append(numbers[0])
            if accuracy:
                evaluated.append((count, numbers[2]))
    if len(losses) != iterations:
        raise ValueError(f"curve.csv has {len(losses)} of {iterations} iterations")
    return np.array(losses), evaluated


def slug(backbone: str) -> str:
    """A backbone's name as a folder's, as in a run's path."""
    return re.sub(r"[^\w.-]", "-", backbone).lstrip(".") or "-"


def backbone_name(name: str) -> str:
    """A model's name; for a checkpoint's path its stem, or the model that this stem stands for."""
    known = {slug(model): model for model in clip.available_models()}
    stem = slug(name if name in known.values() else Path(name).stem)
    return known.get(stem, stem)


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


# Tables


def title_of(dataset: str) -> str:
    """A dataset as people write it."""
    return DATASETS[dataset].title if dataset in DATASETS else dataset


def plural(count: int, what: str) -> str:
    """Such as "1 shot", "2 shots"."""
    return f"{count} {what}{'s' * (count != 1)}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text, too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
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


# Figures


def figures(study: Study, published: Sequence[Published]) -> dict[str, Callable[[], Any]]:
    """What to draw for a backbone: by file name, functions that return matplotlib's Figure."""
    plan = {}
    whole = [complete(study, shots)[0] for shots in study.shots]
    common = [name for name in study.datasets if all(name in names for names in whole)]
    if len(common) > 1:
        plan["accuracy-mean"] = partial(draw_accuracy, study, published, common)
    for name in study.datasets:
        plan[f"accuracy-{name}"] = partial(draw_accuracy, study, published, [name])
    if any(whole):
        plan["cost"] = partial(draw_cost, study)
    for name, shots in sorted({key[:2] for key in study.cells}):
        plan[f"curves-{name}-{shots}shots"] = partial(draw_curves, study, name, shots)
    return {f"{slug(study.backbone)}/{name}.png": draw for name, draw in plan.items()}


def draw_accuracy(study: Study, published: Sequence[Published], datasets: Sequence[str]) -> Any:
    """Accuracy against shots: means with error bars, zero-shot, published points."""
    one = len(datasets) == 1
    what = title_of(datasets[0]) if one else f"Mean over {len(datasets)} datasets"
    figure, (axes,) = canvas(f"{what}, {study.backbone}", panels=1)
    theirs = defaultdict(list)
    for method in study.methods:
        for row, value in published_for(published, study, method, datasets):
            theirs[method, row.source].append((row.shots, value))
    slots = [*study.methods, *theirs]  # side by side, so that none hides another
    dodge = {slot: 2 ** (0.045 * (i - (len(slots) - 1) / 2)) for i, slot in enumerate(slots)}

    for method in study.methods:
        seeds = {shots: None if one else complete(study, shots)[1] for shots in study.shots}
        stats = {n: mean_over(study, datasets, seeds[n], n, method) for n in study.shots}
        points = [(n * dodge[method], s.mean, s.std or 0) for n, s in stats.items() if s]
        if points:
            colour, mark, line, _ = style(study, method)
            axes.errorbar(
                *zip(*points, strict=True), color=colour, marker=mark, linestyle=line, capsize=3,
                markersize=5, label=LABELS.get(method, method),
            )  # fmt: skip
    for (method, source), points in theirs.items():
        colour, mark, _, _ = style(study, method)
        first = next(slot for slot in theirs if slot[0] == method)
        axes.plot(
            [shots * dodge[method, source] for shots, _ in points], [y for _, y in points],
            linestyle="", color=colour, markerfacecolor="none", markersize=7, markeredgewidth=1.3,
            marker=mark if (method, source) == first else "D",
            label=f"{LABELS[method]}, published\n({source})",
        )  # fmt: skip
    base = zero_shot(study, datasets)
    axes.axhline(base, color="0.45", linestyle=(0, (1, 1)), label=f"zero-shot ({base:.1f})")

    ticks = sorted({1, 2, 4, 8, 16, *study.shots})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axes.set(xlabel="shots (training images per class)", ylabel="test accuracy (%)")
    return with_legend(figure, "mean ± standard\ndeviation over seeds")


def draw_curves(study: Study, dataset: str, shots: int) -> Any:
    """Training loss and test accuracy by iteration: mean and range over seeds."""
    cells = {m: list(study.cell(dataset, shots, m).values()) for m in study.methods}
    cells = {method: runs for method, runs in cells.items() if runs}
    width = math.ceil(max(len(run.loss) for runs in cells.values() for run in runs) / 50)
    followed = [m for m, runs in cells.items() if any(len(run.evaluated) > 2 for run in runs)]
    title = f"{title_of(dataset)}, {plural(shots, 'shot')}, {study.backbone}"
    figure, panels = canvas(title, panels=2 if followed else 1)
    for method, runs in cells.items():
        label = f"{LABELS.get(method, method)} ({plural(len(runs), 'seed')})"
        draw_band(panels[0], *loss_lines(runs, width), style(study, method), label)
        if method in followed:
            x = sorted({i for run in runs for i in run.evaluated[:, 0]})
            lines = [np.interp(x, *run.evaluated.T) for run in runs]
            draw_band(panels[1], x, lines, style(study, method), label)
            panels[1].set(xlabel="iteration (0: zero-shot)", ylabel="test accuracy (%)")
    averaged = f" (mean of {width} iterations)" if width > 1 else ""
    panels[0].set(xlabel="iteration", ylabel=f"training loss{averaged}", yscale="log")
    plain_numbers(panels[0].yaxis)
    return with_legend(figure, "mean and range\nover seeds")


def loss_lines(runs: Sequence[Run], width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each run's loss as means of `width` iterations, and the iterations where these stand.

    A run's last mean is carried on to the end of the longest.
    """
    longest = max(len(run.loss) for run in runs)
    starts = np.arange(0, longest, width)
    lines = []
    for run in runs:
        means = [run.loss[i : i + width].mean() for i in range(0, len(run.loss), width)]
        lines.append(np.array(means + means[-1:] * (len(starts) - len(means))))
    return (starts + 1 + np.minimum(starts + width, longest)) / 2, lines


def draw_band(
    axes: Any, x: Sequence[float], lines: Sequence[np.ndarray], look: tuple, label: str
) -> None:
    """Draw the mean of lines over the range from the lowest to the highest."""
    colour, mark, line, _ = look
    every = max(1, len(x) // 7)
    first = MARKS.index(mark) * every // 4 % every  # marks of several lines do not coincide
    axes.fill_between(x, np.min(lines, 0), np.max(lines, 0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        x, np.mean(lines, 0), color=colour, linestyle=line, marker=mark, markersize=5,
        markevery=(first, every), label=label,
    )  # fmt: skip


def draw_cost(study: Study) -> Any:
    """Bars of peak memory and time by shots and method, over complete datasets."""
    figure, panels = canvas(f"Memory and time of a run, {study.backbone}", panels=2)
    whole = {shots: complete(study, shots) for shots in study.shots}
    costs = {
        (method, shots): [
            mean_over(study, *whole[shots], shots, method, what) for what in ("memory", "seconds")
        ]
        for method in study.methods
        for shots in study.shots
    }
    methods = [m for m in study.methods if any(all(costs[m, shots]) for shots in study.shots)]
    width = 0.8 / len(methods)
    for panel, axes in enumerate(panels):
        for number, method in enumerate(methods):
            colour, _, _, hatch = style(study, method)
            stats = {i: costs[method, n][panel] for i, n in enumerate(study.shots)}
            bars = [(i, s.mean, s.std or 0) for i, s in stats.items() if s]
            x, y, error = zip(*bars, strict=True)
            axes.bar(
                np.array(x) + width * (number - (len(methods) - 1) / 2), y, width, yerr=error,
                capsize=2, ecolor="0.45", color=colour, hatch=hatch, edgecolor="white",
                label=LABELS.get(method, method),
            )  # fmt: skip
        axes.set_xticks(range(len(study.shots)), labels=map(str, study.shots))
        middle, half = (len(study.shots) - 1) / 2, max(len(study.shots), 3) / 2
        axes.set_xlim(middle - half, middle + half)
        axes.grid(False, axis="x")
        axes.set_xlabel("shots (training images per class)")
        axes.set_ylabel(["peak memory (MB)", "time (s)"][panel])
    return with_legend(figure, "mean ± standard\ndeviation over seeds")


def style(study: Study, method: str) -> tuple:
    """A method's colour, mark, line and hatch, the same in all figures of a backbone."""
    names = [*METHODS, *(name for name in study.methods if name not in METHODS)]
    i = names.index(method) % len(COLOURS)
    return COLOURS[i], MARKS[i], LINES[i], HATCHES[i]


def canvas(title: str, panels: int) -> tuple[Any, Any]:
    """An empty figure, of those that need no pyplot and no window, and its panels in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 4.2 * panels, 3.8))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].set_title(title, loc="left")
    return figure, axes


def with_legend(figure: Any, title: str) -> Any:
    """Put the first panel's legend to the right of all of them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(
        range(len(labels)), key=lambda i: ("published" in labels[i], "zero" in labels[i])
    )
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], title=title, frameon=False,
        loc="outside right upper", alignment="left", labelspacing=0.8, handlelength=3,
    )  # fmt: skip
    return figure


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.05 and 0.1 in place of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def png(draw: Callable[[], Any]) -> bytes:
    """Draw a figure, whatever the user's own settings of matplotlib; the same bytes each time."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        draw().savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def can_draw() -> bool:
    """Whether matplotlib is there; if so, it is told to draw into files."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


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


def say(text: str) -> None:
    """Print, until whoever reads it, such as `head`, has seen enough; files are written anyway."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        if isinstance(error, OSError) and error.strerror:
            error = f"{error.filename}: {error.strerror}"
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted; the same command starts it again")
        return 130


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for terminals without ±
    sys.exit(main())
