"""The dataset checker: `python -m datasets --root_path ROOT [--dataset NAME] [--decode]`.

It prints which datasets were found and where, their numbers of classes and images next to the
published ones, and what to do about each fault. It writes nothing. Exit status: 0 if all are well,
1 if one is missing or has a fault, 2 for wrong usage.
"""

import argparse
import hashlib
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from datasets.base import SPLITS, DatasetDir, Split, dataset_errors, find_dataset_dir, resolve_root
from datasets.build import dataset_name, find_gray_range, get_dataset_info
from datasets.catalog import DATASETS
from datasets.splits import CHECKS, count_mismatch, format_counts, read_split
from datasets.transforms import read_image
from utils import Progress, truncate_list

COLUMNS = ("dataset", "folder", "split", "classes", *SPLITS, "status")


@dataclass
class CheckResult:
    """A row of the checker's table, by COLUMNS, and the lines below it."""

    row: dict[str, str]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on own images


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checker; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m datasets", description="Check the datasets.")
    parser.add_argument("--root_path", help="folder that holds all datasets")
    parser.add_argument("--dataset", help="only this dataset: a name, or the path of your own")
    parser.add_argument("--decode", action="store_true", help="open every image as well")
    args = parser.parse_args(argv)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs each TIFF of many bands
    names = [args.dataset] if args.dataset else list(DATASETS)
    try:
        needs_root = any(get_dataset_info(name).needs_root for name in names)
    except ValueError as error:
        parser.error(str(error))
    if needs_root and not args.root_path:
        parser.error("--root_path, the folder that holds the datasets, is missing")
    if args.root_path and not os.path.isdir(resolve_root(args.root_path)):
        parser.error(f"--root_path {args.root_path} is not a folder")
    bar = Progress(names, desc="datasets", unit="dataset")
    results = [check_dataset(name, args.root_path, args.decode) for name in bar]
    if not args.dataset:
        for name, result in zip(names, results, strict=True):
            if DATASETS[name].test_only and result.row["status"] == "not found":
                result.problems = []  # few people have these
    print_table([result.row for result in results])
    for note in (note for result in results for note in result.notes):
        print(note)
    problems = [problem for result in results for problem in result.problems]
    for problem in problems:
        print(f"* {problem}")
    return int(bool(problems))


def check_dataset(name: str, root_path: str | None, decode: bool) -> CheckResult:
    """Check a dataset of the catalog, or own images; `decode` opens every image."""
    info, name = get_dataset_info(name), dataset_name(name)
    result = CheckResult({"dataset": name, "status": "not found"})
    if info.prepare and not (resolve_root(root_path) / info.dataset_dirs[0]).exists():
        result.row["status"] = "made on first use"
        return result
    try:
        dataset_dir = find_dataset_dir(name, info, root_path)
        folder = str(dataset_dir.path.relative_to(dataset_dir.root))
        result.row |= {"folder": folder, "status": "incomplete"}
        with dataset_errors(dataset_dir):
            split = read_split(dataset_dir)
    except (OSError, ValueError) as error:
        result.problems = [str(error)]
        return result
    result.row |= {"split": split.origin, **format_counts(info, split)}
    checks = [*CHECKS, *([find_corrupt_images] if decode else [])]
    if info.custom_path:
        result.notes = [*count_by_class(split), *(f"note: {note}" for note in split.notes)]
        find_gray_range(dataset_dir, split)
        checks += [find_equal_images] if decode else []
    for check in checks:
        try:
            with dataset_errors(dataset_dir):
                check(dataset_dir, split)
        except (OSError, ValueError) as error:
            result.problems.append(str(error))
    if mismatch := count_mismatch(dataset_dir, split):
        result.problems.append(mismatch)
    if not result.problems:
        result.row["status"] = "ok"
    return result


def count_by_class(split: Split) -> list[str]:
    """Return a line for each class: its numbers of training, validation and test images."""
    counts = [Counter(label for _, label, _ in getattr(split, part)) for part in SPLITS]
    return [
        "{}: {} train, {} val, {} test".format(name, *(count[label] for count in counts))
        for label, name in split.lab2cname.items()
    ]


def find_corrupt_images(dataset_dir: DatasetDir, split: Split) -> None:
    """Raise ValueError if images cannot be decoded; missing ones are not looked at."""

    def check(path: str) -> tuple[str, str] | None:
        try:
            read_image(dataset_dir.image_path(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            return path, str(error)
        return None

    paths = list(dict.fromkeys(path for path, _, _ in split.samples()))
    chunks = (paths[start : start + 4096] for start in range(0, len(paths), 4096))
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of odd metadata
        results = (result for chunk in chunks for result in pool.map(check, chunk))
        bar = Progress(results, total=len(paths), desc=f"{dataset_dir.name} images", unit="image")
        corrupt = dict(filter(None, bar))
    if corrupt:
        raise ValueError(
            f"{truncate_list(corrupt)} in {dataset_dir.image_dir} cannot be decoded: download or "
            f"unpack them again (of the first: {next(iter(corrupt.values()))})"
        )


def find_equal_images(dataset_dir: DatasetDir, split: Split) -> None:
    """Raise ValueError if images of different parts or classes are equal byte for byte."""
    places = {path: (part, name) for part in SPLITS for path, _, name in getattr(split, part)}
    by_content: dict[str, list[str]] = {}
    for path in places:
        with suppress(OSError), open(dataset_dir.image_path(path), "rb") as file:
            by_content.setdefault(hashlib.sha256(file.read()).hexdigest(), []).append(path)
    equal = [
        " = ".join(f"{path} ({', '.join(places[path])})" for path in paths)
        for paths in by_content.values()
        if len({places[path] for path in paths}) > 1
    ]
    if equal:
        raise ValueError(
            f"equal images in different parts or classes: {truncate_list(equal)}: keep one of each"
        )


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print rows in COLUMNS: text to the left, numbers to the right."""
    cells = [COLUMNS, *([row.get(column, "-") for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    for row in cells:
        line = " ".join(f"{c:{a}{w}}" for c, a, w in zip(row, "<<<>>>><", widths, strict=True))
        print(line.rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
