"""Make report.html: the tables, the figures, and of each cell few-shot images and mistakes.

The page is one file that needs nothing beside it. To bound its size, figures share some bytes, and
cells the number of classes that are shown; a class has up to 24 thumbnails of 2 to 3 KB.
"""

import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datasets import get_dataset_info
from datasets.base import find_dataset_dir
from datasets.transforms import read_image
from reporting.classes import ConfusionCell
from runs.records import load_predictions
from utils import format_error, one_line, plural

MAX_FIGURE_BYTES = 12 * 2**20  # of all figures that are shown; a third more in the page
MAX_CLASSES, MAX_CELL_CLASSES = 120, 24  # shown in all cells together, and in one
MAX_FEW, MAX_MISTAKES = 16, 8  # images of a class
THUMBNAIL_SIZE = 80  # pixels of the longer side


def render_html(text: str, figures: Mapping[str, bytes], cells: Sequence[ConfusionCell]) -> bytes:
    """Return the page with tables.md's text, PNG files by name, and images of each cell."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["plural"] = plural
    by_cell = {cell.figure_path(kind) for cell in cells for kind in ("confusion", "classes")}
    uris, room = {}, MAX_FIGURE_BYTES
    for name in sorted(figures, key=lambda name: name in by_cell):  # the others come first
        room -= len(figures[name])
        uris[name] = data_uri("image/png", figures[name]) if room >= 0 else ""
    limit = min(MAX_CELL_CLASSES, max(1, MAX_CLASSES // max(1, len(cells))))
    page = environment.get_template("report.html.jinja").render(
        blocks=list(parse_markdown(text)),
        figures=uris,
        by_cell=by_cell,
        cells=[collect_images(cell, limit) for cell in cells],
    )
    return page.encode(errors="replace")  # of names that are not Unicode


def parse_markdown(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the blocks of Markdown as this package writes it: an HTML tag and its content."""
    for block in filter(None, map(str.strip, text.split("\n\n"))):
        lines = block.splitlines()
        if block.startswith("|"):
            cells = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines]
            yield "table", [[cell.replace("\\|", "|") for cell in row] for row in cells]
        elif block.startswith("#"):
            marks, title = block.split(" ", 1)
            yield f"h{len(marks)}", title
        elif block.startswith("* "):
            yield "ul", [line[2:] for line in lines]
        else:
            yield "p", block


def data_uri(kind: str, data: bytes) -> str:
    """Return a file of some MIME type as a URI that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def collect_images(cell: ConfusionCell, limit: int) -> dict[str, Any]:
    """Return what the page shows of a cell: its seed nearest the mean, so many classes of it."""
    mean = fmean(run.final_accuracy for run in cell.runs)
    run = min(cell.runs, key=lambda run: abs(run.final_accuracy - mean))
    problems, few, gray_range, folder = [], {}, None, run.folder
    try:
        few, gray_range = read_few_shots(run.folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        problems.append(f"The few-shot images are not known: {one_line(format_error(error))}.")
    try:
        config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
        info = get_dataset_info(config["dataset"])
        folder = find_dataset_dir(run.dataset, info, config["root_path"]).image_dir
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        problems.append(f"The images are gone: {one_line(format_error(error))}.")
    mistakes = defaultdict(list)
    for path, label, predicted, probability in load_predictions(run):
        if label != predicted:
            mistakes[label].append((-probability, path, cell.names[predicted]))
    classes = []
    for accuracy, name, label, num_images in cell.worst_first[:limit]:
        shots = [make_thumbnail(folder, path, gray_range) for path in few.get(label, [])[:MAX_FEW]]
        worst = [  # thumbnail, predicted class and its probability
            (make_thumbnail(folder, path, gray_range), predicted, -probability)
            for probability, path, predicted in sorted(mistakes[label])[:MAX_MISTAKES]
        ]
        shown = {"name": name, "num_images": num_images, "accuracy": accuracy}
        classes.append(shown | {"few": shots, "mistakes": worst})
    return {"cell": cell, "run": run, "classes": classes, "problems": problems}


def read_few_shots(folder: Path) -> tuple[dict[int, list[str]], tuple[float, float] | None]:
    """Return a run's training images by label, each once, and their range of grays."""
    data = json.loads((folder / "fewshot.json").read_text(encoding="utf-8"))
    few: dict[int, list[str]] = defaultdict(list)
    for path, label, _ in data["train"]:
        if path not in few[label]:  # repeated, where a class has too few
            few[label].append(path)
    return few, tuple(data["gray_range"]) if "gray_range" in data else None


@cache
def make_thumbnail(folder: Path, path: str, gray_range: tuple | None) -> dict[str, str]:
    """Return an image's path, and a small JPEG of it or what is the matter with it."""
    try:
        image = read_image(folder / path, gray_range)
    except FileNotFoundError:
        return {"path": path, "problem": "gone"}
    except (ValueError, OSError):
        return {"path": path, "problem": "unreadable"}
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return {"path": path, "uri": data_uri("image/jpeg", file.getvalue())}
