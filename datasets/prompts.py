"""Prompts: the templates around class names, and names that a user gives the classes."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import yaml

from datasets.base import DEFAULT_TEMPLATE, SPLITS, DatasetInfo, PathLike, Split, nfc, read_text
from datasets.catalog import CLIP_TEMPLATES
from utils import did_you_mean, one_line, truncate_list


def resolve_templates(template: str | Sequence[str] | None, info: DatasetInfo) -> list[str]:
    """Return the prompts with {} for the class name.

    Args:
        template: Texts; "dataset" for CoOp's prompt for this dataset; "clip" for the seven general
            ones of CLIP's authors; None for "a photo of a {}.".
        info: The dataset's row in the catalog.

    Raises:
        ValueError: A text has not exactly one {}, or other braces; or there is no text.
    """
    template = DEFAULT_TEMPLATE if template is None else template
    texts = [template] if isinstance(template, str) else list(template)
    if texts == ["dataset"]:
        return [info.template]
    if texts == ["clip"]:
        return list(CLIP_TEMPLATES)
    bad = [repr(t) for t in texts if t.count("{}") != 1 or set("{}") & set(t.replace("{}", ""))]
    if bad or not texts:
        raise ValueError(
            f"the template {truncate_list(bad) or 'is empty and'} must have {{}} exactly once, for "
            "the class name; or be the word dataset or clip"
        )
    return texts


def rename_classes(split: Split, path: PathLike | None) -> Split:
    """Give classes the names of a YAML file, which maps folder names or labels to names.

    A number is a label, unless a class has a number for its name. Classes that the file leaves out
    keep their own name. Without a file, the split is returned as it is.

    Raises:
        ValueError: The file is not such a map, or names an unknown class.
    """
    if not path:
        return split
    labels: dict[str, list[int]] = defaultdict(list)
    for label, name in split.lab2cname.items():  # two pairs of ImageNet's classes share a name
        labels[nfc(name)].append(label)
    if not any(name.isdecimal() for name in labels):
        labels |= {str(label): [label] for label in split.lab2cname}
    new_names = {nfc(name): new for name, new in _read_names(path).items()}
    if unknown := [f"{n!r}{did_you_mean(n, labels)}" for n in new_names if n not in labels]:
        raise ValueError(
            f"{path} names {truncate_list(unknown)}, which is no class of {split.source_path}"
        )
    names = split.lab2cname | {i: new for old, new in new_names.items() for i in labels[old]}
    parts = {
        part: [(image, label, names[label]) for image, label, _ in getattr(split, part)]
        for part in SPLITS
    }
    return replace(split, **parts, lab2cname=names)


def _read_names(path: PathLike) -> dict[str, str]:
    """Read a YAML file that maps text to text; no, 01 and 1.0 may be names of folders."""
    path, form = os.path.expanduser(path), "lines like 'folder: name for the prompt'"
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: --classnames takes one of {form}")
    text = read_text(path)
    try:
        names = yaml.load(text, Loader=yaml.BaseLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML ({one_line(str(error))})") from error
    entries = names.items() if isinstance(names, dict) else [(names, "")]
    bad = [
        f"{key}: {name}"[:60]
        for key, name in entries
        if not all(isinstance(text, str) and text.strip() for text in (key, name))
    ]
    if bad or not names:
        raise ValueError(f"{path} is not made of {form}: {truncate_list(bad) or 'it is empty'}")
    return names
