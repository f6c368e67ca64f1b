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
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool

from datasets.base import SPLITS, DatasetDir, Split, describe_problem, find_dataset_dir
from datasets.catalog import DATASETS, dataset_name, get_dataset_info
from datasets.splits import count_mismatch, find_problems, format_counts, read_split
from datasets.transforms import read_image
from utils import Progress, format_error, truncate_list

COLUMNS = ("dataset", "folder", "split", "classes", *SPLITS, "status")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checker; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m datasets", description="Check the datasets.")
    parser.add_argument("--root_path", type=os.path.expanduser, help="folder of all datasets")
    parser.add_argument("--dataset", help="only this dataset: a name, or the path of your own")
    parser.add_argument("--decode", action="store_true", help="open every image as well")
    args = parser.parse_args(argv)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs each TIFF of many bands
    names = [args.dataset] if args.dataset else list(DATASETS)
    try:
        needs_root = any(get_dataset_info(name).needs_root for name in names)
    except ValueError as error:
        parser.error(str(error))
    if needs_root and not os.path.isdir(args.root_path or ""):
        parser.error("--root_path is missing, or not a folder")
    rows, lines, status = [], [], 0
    for name in Progress(names, desc="datasets", unit="dataset"):
        row, notes, problems = check_dataset(name, args.root_path, args.decode)
        if not args.dataset and DATASETS[name].test_only and row["status"] == "not found":
            problems = []  # few people have these
        rows.append(row)
        lines += [*notes, *(f"* {problem}" for problem in problems)]
        status = 1 if problems else status
    print_table(rows)
    print(*lines, sep="\n")
    return status


def check_dataset(
    name: str, root_path: str | None, decode: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return a dataset's row by COLUMNS, notes on own images, and its problems."""
    info, name = get_dataset_info(name), dataset_name(name)
    row, notes = {"dataset": name, "status": "not found"}, []
    try:
        dataset_dir = find_dataset_dir(name, info, root_path, prepare=False)
    except (OSError, ValueError) as error:
        if info.prepare:
            return row | {"status": "made on first use"}, [], []
        return row, [], [str(error)]
    row |= {"folder": str(dataset_dir.path.relative_to(dataset_dir.root)), "status": "incomplete"}
    try:
        split = read_split(dataset_dir)
        problems = list(find_problems(dataset_dir, split))
        if decode:
            problems += find_corrupt_images(dataset_dir, split)
    except (OSError, ValueError) as error:
        return row, [], [describe_problem(dataset_dir, format_error(error))]
    if info.custom_path:
        notes = [*count_by_class(split), *(f"note: {note}" for note in split.notes)]
        problems += find_equal_images(dataset_dir, split) if decode else []
    problems = [describe_problem(dataset_dir, problem) for problem in problems]
    problems += [f"{name}: {sentence}" for sentence in count_mismatch(dataset_dir, split)]
    row |= {"split": split.origin, **format_counts(info, split)}
    return row if problems else row | {"status": "ok"}, notes, problems


def count_by_class(split: Split) -> list[str]:
    counts = [Counter(label for _, label, _ in samples) for samples in split.parts.values()]
    return [
        "{}: {} train, {} val, {} test".format(name, *(count[label] for count in counts))
        for label, name in split.lab2cname.items()
    ]


def find_corrupt_images(dataset_dir: DatasetDir, split: Split) -> Iterator[str]:
    """Yield a sentence on images that cannot be decoded; missing ones are not looked at."""

    def decode(path: str) -> str:
        try:
            read_image(dataset_dir.image_path(path))
        except (ValueError, FileNotFoundError) as error:
            return "" if isinstance(error, FileNotFoundError) else str(error)
        return ""

    paths = list(dict.fromkeys(path for path, _, _ in split.samples()))
    bar = Progress(paths, desc=f"{dataset_dir.name} images", unit="image")
    with warnings.catch_warnings(), ThreadPool(16) as pool:  # which also wait for disks
        warnings.simplefilter("ignore")  # of odd metadata
        errors = pool.imap(decode, paths, chunksize=64)
        corrupt = {path: error for path, error in zip(bar, errors, strict=True) if error}
    if corrupt:
        first = next(iter(corrupt.values()))
        yield f"{truncate_list(corrupt)} cannot be decoded: get them again (the first: {first})"


def find_equal_images(dataset_dir: DatasetDir, split: Split) -> Iterator[str]:
    """Yield a sentence on images of different parts or classes that are equal byte for byte."""
    places: dict[str, dict[str, tuple]] = defaultdict(dict)  # by content and path
    for part, samples in split.parts.items():
        for path, _, name in samples:
            with suppress(OSError), open(dataset_dir.image_path(path), "rb") as file:
                places[hashlib.sha256(file.read()).hexdigest()][path] = part, name
    equal = [
        " = ".join(f"{path} ({part}, {name})" for path, (part, name) in by_path.items())
        for by_path in places.values()
        if len(set(by_path.values())) > 1
    ]
    if equal:
        yield f"equal images in different parts or classes: {truncate_list(equal)}: keep one each"


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
