"""The doctor: `python -m datasets --root_path ROOT [--dataset NAME] [--decode]`, or `--list`.

Shows what was found where, the counts against the published ones, and what to do about all that is
amiss. Writes nothing. Exit status: 0 all is well, 1 something is amiss (a missing dataset is), 2
wrong usage.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from datasets.base import DEFAULT_ROOT, PARTS, Source, Split, few_of, find_source
from datasets.splits import read_split
from datasets.table import DATASETS, find_spec
from utils import progress

HEADER = ("dataset", "folder", "split", "classes", *PARTS, "status")


@dataclass
class Finding:
    """A row of the doctor's table, and the lines below it."""

    name: str
    folder: str = "-"
    split: str = "-"
    counts: list[str] = field(default_factory=lambda: ["-"] * 4)  # classes, then PARTS
    status: str = "ok"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The row's texts, in the order of HEADER."""
        return (self.name, self.folder, self.split, *self.counts, self.status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m datasets", description="Check the datasets.")
    parser.add_argument("--root_path", help="folder that holds all datasets")
    parser.add_argument("--dataset", help="check this one alone")
    parser.add_argument("--decode", action="store_true", help="open every image, too")
    parser.add_argument("--list", action="store_true", help="show what is known and end")
    args = parser.parse_args(arguments)
    if args.list:
        print_known()
        return 0
    try:
        names = [args.dataset] if args.dataset else list(DATASETS)
        needy = [name for name in names if not find_spec(name).prepare]
    except ValueError as error:
        parser.error(str(error))
    if needy and not args.root_path:
        parser.error("--root_path, the folder that holds the datasets, is missing")
    if args.root_path and not os.path.isdir(os.path.expanduser(args.root_path)):
        parser.error(f"--root_path {args.root_path} is not a folder")
    bar = progress(names, desc="datasets", unit="dataset")
    findings = [examine(name, args.root_path, args.decode) for name in bar]
    print_table([HEADER, *(finding.cells() for finding in findings)])
    print("\nImages and classes: as published, or found/published.")
    for finding in findings:
        for line in (*finding.problems, *finding.notes):
            print(f"* {line}")
    return int(any(finding.problems for finding in findings))


def examine(name: str, root_path: str | None, decode: bool) -> Finding:
    """Look at one dataset, without writing anything.

    Args:
        name: Its name in the table.
        root_path: The folder of all datasets.
        decode: Open every image.
    """
    spec, finding = DATASETS[name], Finding(name)
    try:
        source = find_source(name, spec, root_path, prepare=False)
    except (OSError, ValueError) as error:
        finding.status = "not found"
        if spec.prepare:
            finding.status = "on use"
            where = Path(root_path or DEFAULT_ROOT) / spec.folders[0]
            finding.notes.append(f"{name}: made in {where} when it is first used")
        else:
            finding.problems.append(str(error))
        return finding
    root = Path(os.path.expanduser(root_path or DEFAULT_ROOT))
    finding.folder = str(source.folder.relative_to(root))
    finding.split = "missing"
    if spec.split and os.path.lexists(source.folder / spec.split):
        finding.split = "published"
    try:
        split = read_split(source, save=False)
    except (OSError, ValueError) as error:
        source.problems.append(error)
    else:
        _count(source, split, finding)
        if decode:
            _decode(source, split)
    finding.problems += [str(problem) for problem in source.problems]
    finding.status = "amiss" if finding.problems else "ok"
    return finding


def _count(source: Source, split: Split, finding: Finding) -> None:
    """Hold numbers of classes and images against the published ones."""
    spec = source.spec
    finding.split = "published" if split.published else "from raw"
    if not split.published:
        finding.notes.append(
            f"{source.name}: without {spec.split} in {source.folder}, a split made from the raw "
            "data is used, not comparable to published figures; DATASETS.md, section "
            f"{spec.title}, says where to get it"
        )
    found = {"classes": len(split.classnames), **{p: len(getattr(split, p)) for p in PARTS}}
    wrong = []
    for column, (what, number) in enumerate(found.items()):
        published = (spec.classes, *spec.counts)[column]
        if published is None:
            continue
        finding.counts[column] = str(number)
        if number != published:
            finding.counts[column] = f"{number}/{published}"
            what = what if what == "classes" else f"{what} images"
            wrong.append(f"{number} {what} ({published} published)")
    if wrong:
        source.report(
            f"{source.folder} has {', '.join(wrong)}: the download is incomplete, or the split "
            "file is another one"
        )


def _decode(source: Source, split: Split) -> None:
    """Report the images that cannot be decoded; missing ones have been reported."""
    paths = list(dict.fromkeys(path for part in PARTS for path, _, _ in getattr(split, part)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which does not matter here
        results = progress(_broken(source, paths), len(paths), f"{source.name} images", "image")
        broken = [path for path in results if path is not None]
    if broken:
        source.report(
            f"{few_of(broken)} in {source.images} cannot be decoded; download or unpack them again"
        )


def _broken(source: Source, paths: list[str]) -> Iterator[str | None]:
    """Each path that cannot be decoded, None for the others."""

    def check(path: str) -> str | None:
        if not os.path.isfile(source.images / path):
            return None
        try:
            with Image.open(source.images / path) as image:
                image.convert("RGB")
        except Exception:  # a damaged file makes PIL fail in any way
            return path
        return None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 4096):  # a few at a time, for ImageNet has a million
            yield from pool.map(check, paths[start : start + 4096])


def print_table(rows: Sequence[Sequence[str]], width: int = 100) -> None:
    """Print rows in columns: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) <= width else " "
    for row in rows:
        cells = [
            cell.rjust(size) if 3 <= column < 7 else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        print(gap.join(cells).rstrip())


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
