"""Make report.html: the tables, the figures, and of each cell few-shot images and mistakes.

The page is one file that needs nothing beside it. Its size is bounded: figures are embedded up to
MAX_FIGURE_BYTES, and the cells share MAX_THUMBNAILS thumbnails of 2 to 3 KB each.
"""

import base64
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datasets.base import find_dataset_dir
from datasets.build import get_dataset_info
from datasets.transforms import read_image
from reporting.classes import ConfusionCell
from runs.records import Run, load_predictions
from utils import format_error, one_line, plural

MAX_FIGURE_BYTES = 12 * 2**20  # a third more in the page
MAX_THUMBNAILS = 3000  # of all cells together
MAX_CLASSES, MAX_FEW, MAX_MISTAKES = 24, 16, 8  # classes of a cell, images of a class
THUMBNAIL_SIZE = 80  # pixels of the longer side


class Thumbnail(NamedTuple):
    """A small image, or what stands in its place."""

    path: str  # below the folder of images
    uri: str  # "" where there is no image
    problem: str  # "gone" or "unreadable"


class ClassImages(NamedTuple):
    """What the page shows of a class."""

    name: str
    num_images: int
    accuracy: float  # in percent, over all seeds
    few: list[Thumbnail]
    mistakes: list[tuple[Thumbnail, str, float]]  # predicted class, its probability; highest first
    not_shown: str  # "2 few-shot images and 1 mistake", or ""


class CellImages(NamedTuple):
    """What the page shows of a cell."""

    cell: ConfusionCell
    run: Run  # whose images and mistakes these are
    classes: list[ClassImages]  # worst first
    problems: list[str]  # sentences


def render_html(
    sections: Sequence[str], figures: Mapping[str, bytes], cells: Sequence[ConfusionCell]
) -> bytes:
    """Return the page.

    Args:
        sections: The report's sections in Markdown.
        figures: PNG files by name.
        cells: Whose classes are shown.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["plural"] = plural
    by_cell = {cell.figure_path(kind) for cell in cells for kind in ("confusion", "classes")}
    names = sorted(figures, key=lambda name: name in by_cell)  # the others are embedded first
    page = environment.get_template("report.html.jinja").render(
        blocks=list(parse_markdown("\n\n".join(sections))), by_cell=by_cell,
        figures=embed_figures({name: figures[name] for name in names}),
        cells=[collect_images(cell, MAX_THUMBNAILS // len(cells)) for cell in cells],
    )  # fmt: skip
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


def embed_figures(figures: Mapping[str, bytes]) -> dict[str, str]:
    """Return data URIs by name; "" for those that MAX_FIGURE_BYTES leave no room for."""
    uris, total = {}, 0
    for name, png in figures.items():
        total += len(png)
        uris[name] = data_uri("image/png", png) if total <= MAX_FIGURE_BYTES else ""
    return uris


def data_uri(kind: str, data: bytes) -> str:
    """Return a file of some MIME type as a URI that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def collect_images(cell: ConfusionCell, limit: int) -> CellImages:
    """Return the few-shot images and the mistakes of the seed whose accuracy is nearest the mean.

    Args:
        cell: With its runs.
        limit: Number of thumbnails.
    """
    mean = fmean(run.final_accuracy for run in cell.runs)
    run = min(cell.runs, key=lambda run: abs(run.final_accuracy - mean))
    few, gray_range = read_few_shots(run)
    problems = [] if few else [f"There is no readable fewshot.json in {run.folder}."]
    try:
        folder = find_image_dir(run)
    except (OSError, ValueError, TypeError) as error:
        folder = run.folder
        problems.append(f"The images are gone: {one_line(format_error(error))}.")
    mistakes = defaultdict(list)
    for path, label, predicted, probability in load_predictions(run):
        if label != predicted:
            mistakes[label].append((-probability, path, cell.names[predicted]))
    classes, labels = [], {name: label for label, name in enumerate(cell.names)}
    max_few, max_mistakes = min(MAX_FEW, limit // 4), min(MAX_MISTAKES, limit // 4)
    for name, num_images, accuracy, *_ in cell.worst_first[: min(MAX_CLASSES, limit)]:
        paths, wrong = few.get(labels[name], []), sorted(mistakes[labels[name]])
        shown, worst = paths[:max_few], wrong[:max_mistakes]
        limit -= len(shown) + len(worst)
        if limit < 0:
            break
        more = {"few-shot image": len(paths) - len(shown), "mistake": len(wrong) - len(worst)}
        classes.append(ClassImages(
            name, num_images, accuracy, [make_thumbnail(folder, p, gray_range) for p in shown],
            [(make_thumbnail(folder, p, gray_range), names, -q) for q, p, names in worst],
            " and ".join(plural(n, noun) for noun, n in more.items() if n),
        ))  # fmt: skip
    return CellImages(cell, run, classes, problems)


def read_few_shots(run: Run) -> tuple[dict[int, list[str]], tuple[float, float] | None]:
    """Return different training images by label, {} if they are unknown; their range of grays."""
    few: dict[int, dict[str, None]] = defaultdict(dict)
    try:
        data = json.loads((run.folder / "fewshot.json").read_text(encoding="utf-8"))
        for path, label, _ in data["train"]:
            few[label][str(path)] = None
        gray_range = tuple(data["gray_range"]) if "gray_range" in data else None
        return {label: list(paths) for label, paths in few.items()}, gray_range
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None


def find_image_dir(run: Run) -> Path:
    """Return the folder that the paths of a run's images start from.

    Raises:
        OSError, ValueError: It or the run's configuration is gone.
    """
    try:
        config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
        name, root_path = config["dataset"], config["root_path"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"there is no readable config.yaml in {run.folder}") from error
    return find_dataset_dir(run.dataset, get_dataset_info(name), root_path).image_dir


@cache
def make_thumbnail(folder: Path, path: str, gray_range: tuple | None) -> Thumbnail:
    """Return a small JPEG of an image."""
    try:
        image = read_image(os.path.join(folder, path), gray_range)
    except FileNotFoundError:
        return Thumbnail(path, "", "gone")
    except (ValueError, OSError):
        return Thumbnail(path, "", "unreadable")
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Thumbnail(path, data_uri("image/jpeg", file.getvalue()), "")
