"""What prompts say: names that a user gives the classes, and the templates around them."""

import os
from collections.abc import Sequence
from dataclasses import replace

import yaml

from datasets.base import SPLITS, TEMPLATE, DatasetInfo, RawSample, Split
from datasets.catalog import CLIP_TEMPLATES
from utils import did_you_mean, one_line, truncate_list


def resolve_templates(template: str | Sequence[str] | None, spec: DatasetInfo) -> list[str]:
    """The prompts with {} for the class name.

    Args:
        template: Texts; "dataset" for the one that CoOp has for this dataset; "clip" for the seven
            general ones of CLIP's authors; None for "a photo of a {}.".
        spec: The dataset's row.

    Raises:
        ValueError: A text has not exactly one {}, or other braces; or there is no text.
    """
    template = TEMPLATE if template is None else template
    texts = [template] if isinstance(template, str) else list(template)
    if texts == ["dataset"]:
        return [spec.template]
    if texts == ["clip"]:
        return list(CLIP_TEMPLATES)
    bad = [repr(t) for t in texts if t.count("{}") != 1 or set("{}") & set(t.replace("{}", ""))]
    if bad or not texts:
        raise ValueError(
            f"the template {truncate_list(bad) or 'is empty and'} must have {{}} exactly once, where "  # noqa: E501
            "the class name goes, as in 'a photo of a {}.'; or be the word dataset or clip"
        )
    return texts


def rename_classes(split: Split, path: str | os.PathLike | None) -> Split:
    """Give classes the names of a YAML file, if any, which maps folder names or labels to names.

    A number is the label where no class has a number for its name. Classes that the file leaves
    out keep their own name.

    Raises:
        ValueError: The file is not such a map, or names a class that there is not.
    """
    if not path:
        return split
    new = _read_names(path)
    keys = {name: label for label, name in split.names.items()}
    if not any(name.isdecimal() for name in keys):
        keys |= {str(label): label for label in split.names}
    if unknown := [f"{name!r}{did_you_mean(name, keys)}" for name in new if name not in keys]:
        raise ValueError(
            f"{path} names {truncate_list(unknown)}, a class that {split.where} does not have: correct "  # noqa: E501
            "it or take it out"
        )
    names = dict(split.names)
    for key, name in new.items():
        # Two classes may share a name, as two pairs do in ImageNet.
        for label in [at for at, old in split.names.items() if old == key] or [keys[key]]:
            names[label] = name

    def renamed(entries: list[RawSample]) -> list[RawSample]:
        return [(image, label, names[label]) for image, label, _ in entries]

    parts = {part: renamed(getattr(split, part)) for part in SPLITS}
    return replace(split, **parts, names=names)


def _read_names(path: str | os.PathLike) -> dict[str, str]:
    """The content of a file of class names."""
    form = "lines like 'folder: name for the prompt'"
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: --classnames takes one of {form}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            # All as text: no, 01 and 1.0 may be names of folders.
            names = yaml.load(file, Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({one_line(str(error))})") from error
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path} is not made of {form}")
    if bad := [str(key) for key, name in names.items() if not _text(key) or not _text(name)]:
        raise ValueError(f"{path} has no name for {truncate_list(bad)}: it takes {form}")
    return names


def _text(value: object) -> bool:
    """Whether a value is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())
