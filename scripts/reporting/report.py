"""Write a whole report, tables and figures, into one folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from reporting.aggregate import BackboneResults, display_name, group_by_backbone
from reporting.classes import classes_section, confusion_cells, plan_class_figures
from reporting.figures import plan_figures, render_png
from reporting.html import render_html
from reporting.protocols import base_to_new_section, transfer_results
from reporting.tables import ACCURACIES, CSV_HEADER, backbone_section, csv_rows, format_mean
from runs.records import Run
from utils import atomic_write, one_line, plural, to_csv


def write_report(runs: Sequence[Run], out: Path, warn: Callable[[str], None]) -> None:
    """Write the tables of some runs, at least one, and draw their figures; print a summary."""
    sections, rows, plan, cells, summary = [f"# Report\n\n{ACCURACIES}\n"], [], {}, [], []
    for results in group_by_backbone(runs):
        transfers, new_cells = list(transfer_results(results)), confusion_cells(results, warn)
        sections += [backbone_section(results), base_to_new_section(results)]
        sections += [classes_section(new_cells), *map(backbone_section, transfers)]
        for tested in [results, *transfers]:
            rows += csv_rows(tested)
        plan |= plan_figures(results) | plan_class_figures(new_cells)
        cells += new_cells
        summary += summary_lines(results)
    text = "\n".join(filter(None, sections))

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "tables.csv", to_csv(CSV_HEADER, rows))
    atomic_write(out / "tables.md", text)
    figures = {}
    for name, draw in plan.items():
        try:
            figures[name] = render_png(draw)
        except Exception as error:  # of matplotlib: one failure costs one figure
            warn(f"left out {name}: {one_line(str(error))}")
    for name, png in figures.items():
        (out / name).parent.mkdir(exist_ok=True)
        atomic_write(out / name, png)
    atomic_write(out / "report.html", render_html(text, figures, cells))
    drawn = plural(len(figures), "figure")
    print(*summary, sep="\n")
    print(f"{plural(len(runs), 'run')}: tables and {drawn} in {out} (report.html, tables.md)")


def summary_lines(results: BackboneResults) -> list[str]:
    """Return a line for each number of shots and variant: the mean over its datasets."""
    lines = []
    for shots in results.shots:
        name, datasets = results.table_lines(shots)[-1]
        where = f"{results.name}, {display_name(name)}, {plural(shots, 'shot')}"
        for variant in results.variants:
            if mean := results.mean(datasets, shots, variant):
                lines.append(f"{where}, {variant.label}: {format_mean(mean)}")
    return lines
