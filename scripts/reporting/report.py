"""Write a whole report, tables and figures, into one folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from reporting.aggregate import group_by_backbone, warnings_for
from reporting.classes import classes_csv, classes_section, confusion_cells, plan_class_figures
from reporting.figures import plan_figures, render_png
from reporting.protocols import ProtocolRow, base_to_new, protocol_sections, transfer
from reporting.tables import Row, backbone_section, table_rows
from runs.records import Run
from utils import atomic_write, plural, print_quietly, to_csv

FIGURES = """## Figures

Bands in curves go from the lowest seed to the highest. A run that ended early is continued at its
last value.
"""


def write_report(runs: Sequence[Run], out: Path, warn: Callable[[str], None]) -> None:
    """Write and print the tables of some runs, then draw their figures.

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
    print_quietly("\n".join(sections))
    for name, draw in plan.items():
        (out / name).parent.mkdir(exist_ok=True)
        atomic_write(out / name, render_png(draw))
    count = plural(len(runs), "run")
    print_quietly(f"{count}: tables and {plural(len(plan), 'figure')} in {out}")
