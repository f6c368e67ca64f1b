"""Write a whole report, tables and figures, into one folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from reporting.aggregate import display_name, group_by_backbone, warnings_for
from reporting.classes import classes_csv, classes_section, confusion_cells, plan_class_figures
from reporting.figures import plan_figures, render_png
from reporting.html import render_html
from reporting.protocols import ProtocolRow, base_to_new, protocol_sections, transfer
from reporting.tables import Row, backbone_section, format_mean, table_rows
from runs.records import Run
from utils import atomic_write, format_error, plural, to_csv

MAX_WIDTH = 200  # characters of a printed line
FIGURES = """## Figures

Bands in curves go from the lowest seed to the highest. A run that ended early is continued at its
last value.
"""


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
        for sentence in warnings_for(results):
            warn(f"note: {sentence}")
        new_rows = table_rows(results)
        new_protocol_rows = base_to_new(results) + transfer(results)
        new_cells = confusion_cells(results, warn)
        sections.append(backbone_section(results, new_rows))
        sections += filter(None, [protocol_sections(new_protocol_rows), classes_section(new_cells)])
        plan |= plan_figures(results) | plan_class_figures(new_cells)
        rows += new_rows
        protocol_rows += new_protocol_rows
        cells += new_cells
    links = "\n".join(f"* [{name}]({name})" for name in plan)

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "tables.csv", to_csv(Row._fields, rows))
    atomic_write(out / "classes.csv", classes_csv(cells))
    if protocol_rows:
        atomic_write(out / "protocols.csv", to_csv(ProtocolRow._fields, protocol_rows))
    atomic_write(out / "tables.md", "\n".join([*sections, f"{FIGURES}\n{links}\n"]))
    figures = {name: write_figure(out / name, draw, warn) for name, draw in plan.items()}
    figures = {name: png for name, png in figures.items() if png}
    atomic_write(out / "report.html", render_html(sections[1:], figures, cells))
    for line in summary_lines(rows):
        print(line)
    count = plural(len(runs), "run")
    drawn = plural(len(figures), "figure")
    print(f"{count}: tables and {drawn} in {out} (report.html, tables.md)")


def write_figure(path: Path, draw: Callable[[], Figure], warn: Callable[[str], None]) -> bytes:
    """Draw a figure into a file; return its content, b"" where it could not be drawn or written."""
    try:
        png = render_png(draw)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, png)
        return png
    except Exception as error:  # of matplotlib, of fonts, of the disk: the others are still drawn
        warn(f"left out the figure {path.name}: {format_error(error)}")
        return b""


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each backbone, shots and variant: the mean over its datasets."""
    last = {(row.backbone, row.shots): row.dataset for row in rows}  # a mean over several, or one
    lines = [
        f"{row.backbone}, {display_name(row.dataset)}, {plural(row.shots, 'shot')}, "
        f"{row.variant.label}: {format_mean(row.mean, row.std, row.seeds)}"
        for row in rows
        if row.dataset == last[row.backbone, row.shots] and row.mean is not None
    ]
    return [
        line if len(line) <= MAX_WIDTH else f"{line[:90]} ... {line[-90:]}"
        for line in dict.fromkeys(lines)  # a variant has a row for each published figure
    ]
