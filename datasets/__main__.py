"""The doctor: `python -m datasets --root_path ROOT [--dataset NAME] [--decode]`, or `--list`.

Shows which datasets were found and where, their numbers of classes and images beside the published
ones, and what to do about each fault. Writes nothing, except with `--fetch NAME`, which downloads a
dataset first. Exit status: 0 where all are well, 1 where one has a fault or is missing, 2 for wrong
usage and for a download that failed.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from datasets.base import SPLITS, DatasetDir, Split, find_dataset_dir, resolve_root
from datasets.build import dataset_name, get_dataset_info
from datasets.catalog import DATASETS
from datasets.checks import count_mismatch, format_counts
from datasets.download import DOWNLOADS, download_dataset
from datasets.splits import read_split
from datasets.transforms import read_image
from utils import format_error, one_line, progress, truncate_list

HEADER = ("dataset", "folder", "split", "classes", *SPLITS, "status")


@dataclass
class Finding:
    """A row of the doctor's table, and the lines below it."""

    name: str
    folder: str = "-"
    split: str = "-"
    counts: dict[str, str] = field(default_factory=dict)
    status: str = "ok"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The row's texts, in the order of HEADER."""
        counts = [self.counts.get(key, "-") for key in ("classes", *SPLITS)]
        return (self.name, self.folder, self.split, *counts, self.status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m datasets", description="Check the datasets.")
    parser.add_argument("--root_path", help="folder that holds all datasets")
    parser.add_argument("--dataset", help="name of the only dataset, or path of your own")
    parser.add_argument("--decode", action="store_true", help="open every image as well")
    parser.add_argument("--list", action="store_true", help="print the known datasets and end")
    parser.add_argument(
        "--fetch", metavar="NAME", help=f"download a dataset: {', '.join(DOWNLOADS)}"
    )
    args = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack letters of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.list:
        print_known()
        return 0
    try:
        only = args.fetch or args.dataset
        names = [only] if only else list(DATASETS)
        to_be_found = [name for name in names if get_dataset_info(name).needs_root]
    except ValueError as error:
        parser.error(str(error))
    if to_be_found and not args.root_path:
        parser.error("--root_path, the folder that holds the datasets, is missing")
    if args.root_path and not os.path.isdir(resolve_root(args.root_path)):
        parser.error(f"--root_path {args.root_path} is not a folder")
    if args.fetch:
        try:
            download_dataset(args.fetch, args.root_path)
        except (ValueError, OSError) as error:
            print(one_line(f"python -m datasets: error: {format_error(error)}"), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with what has arrived", file=sys.stderr)
            return 130
    bar = progress(names, desc="datasets", unit="dataset")
    findings = [examine(name, args.root_path, args.decode) for name in bar]
    for finding in findings:
        if not only and DATASETS[finding.name].test_only and finding.status == "not found":
            finding.problems = []  # few people have these
    print_table([HEADER, *(finding.cells() for finding in findings)])
    for finding in findings:
        for line in (*finding.problems, *finding.notes):
            print(f"* {line}")
    return int(any(finding.problems for finding in findings))


def examine(name: str, root_path: str | None, decode: bool) -> Finding:
    """Look at one dataset, without writing anything.

    Args:
        name: Its name in the table, or the path of own images.
        root_path: The folder of all datasets.
        decode: Open every image.
    """
    spec, name = get_dataset_info(name), dataset_name(name)
    finding = Finding(name)
    try:
        source = find_dataset_dir(name, spec, root_path, prepare=False)
        if spec.prepare and not source.folder.exists():
            finding.status = "made on first use"
            finding.notes.append(f"{name}: made in {source.folder} when it is first used")
            return finding
    except (OSError, ValueError) as error:
        finding.status, finding.problems = "not found", [str(error)]
        return finding
    finding.folder = str(source.folder.relative_to(source.root))
    try:
        split, problems = read_split(source, save=False)
    except (OSError, ValueError) as error:
        problems = [error]
    else:
        finding.split, finding.counts = split.kind, format_counts(spec, split)
        if split.kind == "made":
            finding.notes.append(
                f"{name}: without {spec.split} in {source.folder}, a split made from the raw data "
                "is used, not comparable to published figures; DATASETS.md, section "
                f"{spec.title}, says where to get it"
            )
        problems += filter(None, [count_mismatch(source, split)])
        if decode:
            problems += undecodable(source, split)
    finding.problems = [str(problem) for problem in problems]
    finding.status = "incomplete" if finding.problems else "ok"
    return finding


def undecodable(source: DatasetDir, split: Split) -> list[Exception]:
    """One fault that names the images that cannot be decoded, or none; missing ones were named."""

    def check(path: str) -> tuple[str, str] | None:
        try:
            read_image(source.locate(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            return path, str(error)
        return None

    paths = list(dict.fromkeys(path for path, _, _ in split.entries()))
    some = (paths[start : start + 4096] for start in range(0, len(paths), 4096))  # of a million
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of odd metadata, which does not matter here
        results = (result for chunk in some for result in pool.map(check, chunk))
        bar = progress(results, len(paths), f"{source.name} images", "image")
        broken = dict(filter(None, bar))
    if not broken:
        return []
    text = f"{truncate_list(broken)} in {source.images} cannot be decoded: download or unpack them again"  # noqa: E501
    return [source.error(f"{text} (of the first: {next(iter(broken.values()))})")]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) <= 100 else " "
    for row in rows:
        cells = [
            cell.rjust(size) if 3 <= column < 7 else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        print(gap.join(cells).rstrip())
    print()


def print_known() -> None:
    """Print the rows of the table of datasets."""
    for name, spec in DATASETS.items():
        counts = " / ".join("-" if count is None else str(count) for count in spec.counts)
        print(f"{name}: {spec.classes} classes, {counts} training / validation / test images")
        print(f"    folder  {' or '.join(spec.folders)}")
        print(f"    source  {spec.url}")
    print("DATASETS.md says for each where to get it and how it must lie.")


if __name__ == "__main__":
    sys.exit(main())
