"""Prompts: the templates around class names, and names that a user gives the classes."""

import os
from collections import defaultdict
from collections.abc import Sequence

import yaml

from datasets.base import DEFAULT_TEMPLATE, DatasetInfo, Split
from datasets.catalog import CLIP_TEMPLATES
from datasets.files import PathLike, nfc, read_text
from utils import did_you_mean, one_line, truncate_list


def resolve_templates(template: str | Sequence[str] | None, info: DatasetInfo) -> list[str]:
    """Return the prompts, each with one {} for the class name, or raise a ValueError.

    "dataset" means CoOp's prompt for this dataset, "clip" the seven general ones of CLIP's authors,
    None "a photo of a {}.".
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
    keep their own name; other names in it are a ValueError. No file changes nothing.
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
        raise ValueError(f"{path} names {truncate_list(unknown)}, no class of {split.source_path}")
    names = split.lab2cname | {i: new for old, new in new_names.items() for i in labels[old]}
    return split.relabel({label: (label, name) for label, name in names.items()})


def _read_names(path: PathLike) -> dict[str, str]:
    """Read a YAML file that maps text to text; no, 01 and 1.0 may be names of folders."""
    path, form = os.path.expanduser(path), "lines like 'folder: name for the prompt'"
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: --classnames takes one of {form}")
    try:
        names = yaml.load(read_text(path, "save it as UTF-8"), Loader=yaml.BaseLoader)
    except (RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML ({one_line(str(error))})") from error
    pairs = list(names.items()) if isinstance(names, dict) else []
    bad = [pair for pair in pairs if not all(isinstance(x, str) and x.strip() for x in pair)]
    if bad or not pairs:
        raise ValueError(f"{path} is not made of {form}: {str(bad or names)[:60]}")
    return names
