"""FGVC-Aircraft: lists of its own, with class names that hold spaces and slashes."""

from datasets.base import PARTS, Entry, Source, Split
from datasets.checks import check_split
from datasets.raw import parse_lines, require


def read_fgvc(source: Source) -> Split:
    """Lines "0034309 Boeing 707-320" in the lists; labels follow the order in variants.txt."""
    lists = [source.folder / f"images_variant_{part}.txt" for part in PARTS]
    require(source, source.folder / "variants.txt", *lists)
    names = parse_lines(source, source.folder / "variants.txt", "variant", str)
    labels = {name: label for label, name in enumerate(names)}

    def entry(line: str) -> Entry:
        image, name = line.split(maxsplit=1)
        return f"{image}.jpg", labels[name], name

    form = "image variant, with a variant of variants.txt"
    parts = [parse_lines(source, path, form, entry) for path in lists]
    return check_split(source, f"{source.folder}/images_variant_*.txt", *parts, names)
