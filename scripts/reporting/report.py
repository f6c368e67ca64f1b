"""Write a whole report, tables and figures, into one folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from reporting.aggregate import display_name, group_by_backbone
from reporting.classes import classes_csv, classes_section, confusion_cells, plan_class_figures
from reporting.figures import plan_figures, render_png
from reporting.html import render_html
from reporting.protocols import ProtocolRow, base_to_new, protocol_sections, transfer
from reporting.tables import Row, backbone_section, format_mean, table_rows
from runs.records import Run
from utils import atomic_write, plural, to_csv


def write_report(runs: Sequence[Run], out: Path, warn: Callable[[str], None]) -> None:
    """Write the tables of some runs and draw their figures; print a summary.

    Args:
        runs: At least one.
        out: The report's folder.
        warn: Is called with a sentence for each oddity.

    Raises:
        OSError: The report cannot be written.
    """
    sections, plan = ["# Report\n"], {}
    rows, protocol_rows, cells = [], [], []
    for results in group_by_backbone(runs):
        new_rows = table_rows(results)
        new_protocol_rows = base_to_new(results) + transfer(results)
        new_cells = confusion_cells(results, warn)
        sections.append(backbone_section(results, new_rows))
        sections += filter(None, [protocol_sections(new_protocol_rows), classes_section(new_cells)])
        plan |= plan_figures(results) | plan_class_figures(new_cells)
        rows += new_rows
        protocol_rows += new_protocol_rows
        cells += new_cells

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "tables.csv", to_csv(Row._fields, rows))
    atomic_write(out / "classes.csv", classes_csv(cells))
    if protocol_rows:
        atomic_write(out / "protocols.csv", to_csv(ProtocolRow._fields, protocol_rows))
    atomic_write(out / "tables.md", "\n".join(sections))
    figures = {name: render_png(draw) for name, draw in plan.items()}
    for name, png in figures.items():
        (out / name).parent.mkdir(exist_ok=True)
        atomic_write(out / name, png)
    atomic_write(out / "report.html", render_html(sections[1:], figures, cells))
    for line in summary_lines(rows):
        print(line)
    count = plural(len(runs), "run")
    drawn = plural(len(figures), "figure")
    print(f"{count}: tables and {drawn} in {out} (report.html, tables.md)")


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each backbone, shots and variant: the mean over its datasets."""
    last = {(row.backbone, row.shots): row.dataset for row in rows}  # a mean over several, or one
    lines = [
        f"{row.backbone}, {display_name(row.dataset)}, {plural(row.shots, 'shot')}, "
        f"{row.variant.label}: {format_mean(row.mean, row.std, row.seeds)}"
        for row in rows
        if row.dataset == last[row.backbone, row.shots] and row.mean is not None
    ]
    return list(dict.fromkeys(lines))  # a variant has a row for each published figure
