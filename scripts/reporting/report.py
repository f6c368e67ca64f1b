"""A whole report: runs read, tables and figures written into one folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from reporting.classes import class_figures, classes_csv, classes_text, find_classes
from reporting.figures import can_draw, figures, png
from reporting.numbers import find_runs, inconsistencies, read_published, studies
from reporting.protocols import (
    ToNew,
    Transferred,
    base_to_new,
    base_to_new_text,
    transfer,
    transfer_text,
)
from reporting.tables import csv_text, study_text, table_rows
from utils import atomic_write, plural, print_quietly, to_csv

FIGURES = """## Figures

Bands in curves go from the lowest seed to the highest; a run that ended early is carried on at its
last value.
"""


def write_report(folders: Sequence[Path], out: Path, complain: Callable[[str], None]) -> None:
    """Read the runs, write the tables and print them, then draw.

    Args:
        folders: Where to look for runs.
        out: The report's folder.
        complain: Gets a sentence for each run that is left out, and for each oddity.

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
    rows, texts, plan, classes = [], ["# Report\n"], {}, []
    halves, targets = [], []
    for study in studies(runs):
        for oddity in inconsistencies(study):
            complain(f"note: {oddity}")
        rows.append(table_rows(study, published))
        texts.append(study_text(study, rows[-1], sources))
        halves += (own := base_to_new(study))
        texts.append(base_to_new_text(own))
        targets += (own := transfer(study))
        texts.append(transfer_text(own))
        cells = find_classes(study, complain)
        texts.append(classes_text(cells))
        classes += cells
        plan.update(figures(study, published) | class_figures(cells))
    if not can_draw():
        complain("no figures: matplotlib is missing; `pip install matplotlib` brings it")
        plan = {}
    links = "\n".join(f"* [{name}]({name})" for name in plan)

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "tables.csv", csv_text(row for part in rows for row in part))
    atomic_write(out / "classes.csv", classes_csv(classes))
    if halves:
        atomic_write(out / "base_to_new.csv", to_csv(ToNew._fields, halves))
    if targets:
        atomic_write(out / "transfer.csv", to_csv(Transferred._fields, targets))
    texts = [text for text in texts if text]
    tables = "\n".join([*texts, f"{FIGURES}\n{links}\n"] if plan else texts)
    atomic_write(out / "tables.md", tables)
    print_quietly("\n".join(texts))
    for name, draw in plan.items():
        (out / name).parent.mkdir(exist_ok=True)
        atomic_write(out / name, png(draw))
    drawn = f" and {plural(len(plan), 'figure')}" if plan else ""
    print_quietly(f"{plural(len(runs), 'run')}: tables{drawn} in {out}")
