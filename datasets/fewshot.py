"""The few-shot draw, how it uses Python's global `random`, and lists in place of it."""

import json
import os
import random

from datasets.base import Datum, FewShotDataset, RawSample, Split, group_by_label
from datasets.splits import is_valid_entry
from utils import did_you_mean, truncate_list


def generate_fewshot_dataset(
    split: Split, shots: int, together: bool = False
) -> tuple[list[RawSample], list[RawSample]]:
    """Draw the few training and validation images with Python's global `random`.

    The order of draws is that of CLIP-LoRA's loaders, which SO's authors use as well, so that one
    seed gives one set of images everywhere: validation (min(shots, 4) a class) before training; in
    each, the classes in order of first appearance; in each class one `random.sample` of its images
    as they are listed, or one `random.choices` where there are fewer than wanted. With `together`
    (ImageNet) one `random.sample` of shots + min(shots, 4) training images a class instead:
    training images first, validation behind them. Nothing else here uses the global generator.

    Args:
        split: What to draw from.
        shots: Training images per class.
        together: Draw validation images from the training images, too.

    Returns:
        Training and validation entries.

    Raises:
        ValueError: `together`, and a class has too few images.
    """
    few = min(shots, 4)
    if not together:
        val = [entry for items in group_by_label(split.val) for entry in _draw(items, few)]
        return [
            entry for items in group_by_label(split.train) for entry in _draw(items, shots)
        ], val
    groups = group_by_label(split.train)
    for items in groups:
        if len(items) < shots + few:
            raise ValueError(
                f"class {items[0][2]!r} has {len(items)} training images, but {shots} shots take "
                f"{shots + few} ({few} of them for validation): lower --shots or complete the class"
            )
    drawn = [random.sample(items, shots + few) for items in groups]
    train = [entry for items in drawn for entry in items[:shots]]
    return train, [entry for items in drawn for entry in items[shots:]]


def _draw(items: list[RawSample], count: int) -> list[RawSample]:
    """One draw of one class."""
    return random.sample(items, count) if len(items) >= count else random.choices(items, k=count)


def load_fewshot_split(
    path: str | os.PathLike, original: Split, split: Split, subsample: str = "all"
) -> tuple[list[RawSample], list[RawSample]]:
    """Take the few images from a list in place of the draw, which is left alone.

    The list is {"train": [...], "val": [...]} of {"impath", "label", "classname"}, as the code of
    cross-modal adaptation writes it, or of [path, label, class name], as `dump_fewshot_split` does. An
    image is found by its path below the image folder, with any number of folders before it or
    the first ones left out.

    Args:
        path: The list, a JSON file.
        original: The dataset, with its own class names.
        split: The same, with those that the user gives the classes.
        subsample: The half of the classes that labels in the list may be counted within, as a run
            on that half has them in its own list.

    Raises:
        ValueError: The file is not such a list, or has an image, a class or a label that the
            dataset does not have.
    """  # noqa: E501
    listed = _load_list(path)
    first = len(split.names) - len(split.half("new").names) if subsample == "new" else 0
    known = {image: (image, label, name) for image, label, name in split.entries()}
    few = {image for part in (split.train, split.val) for image, _, _ in part}
    names = [*original.names.values(), *split.names.values()]
    by_file: dict[str, list[str]] = {}
    for image in known:
        by_file.setdefault(image.rsplit("/", 1)[-1], []).append(image)

    def find(given: str) -> RawSample:
        if given in known:
            return known[given]
        given = given.replace("\\", "/")
        alike = by_file.get(given.rsplit("/", 1)[-1], [])
        found = [image for image in alike if given.endswith(f"/{image}")]
        found = [max(found, key=len)] if found else [i for i in alike if i.endswith(f"/{given}")]
        if len(found) != 1:
            kind = "several images have" if found else f"{split.where} does not have"
            raise ValueError(f"{path} names the image {given}, which {kind}")
        return known[found[0]]

    def entry(image: str, label: int, name: str) -> RawSample:
        if all(_spaced(name) != _spaced(other) for other in names):
            hint = did_you_mean(name, names)
            raise ValueError(
                f"{path} names the class {name!r}{hint}, which {split.where} does not have"
            )
        found = find(image)
        own = original.names[found[1]]
        if found[1] not in (label, label + first) or _spaced(name) not in (
            _spaced(own),
            _spaced(found[2]),
        ):
            raise ValueError(
                f"{path} gives {image} the label {label} and the class {name!r}, which are "
                f"{found[1]} and {own!r} in {split.where}"
            )
        if found[0] not in few:
            raise ValueError(f"{path} names {image}, a test image in {split.where}: take it out")
        return found

    train, val = ([entry(*item) for item in listed[part]] for part in ("train", "val"))
    return train, val


def _load_list(path: str | os.PathLike) -> dict[str, list[list]]:
    """The content of a list of images."""
    path = os.path.expanduser(path)
    form = '{"train": [...], "val": [...]} with entries [path, label, class name]'
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: --fewshot_split takes one of the form {form}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    parts: dict[str, list[list]] = {}
    for part in ("train", "val"):
        entries = data.get(part) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not entries and part == "train":
            raise ValueError(f"{path} has no list of images named {part}: it must be {form}")
        keys = ("impath", "label", "classname")
        parts[part] = [[e.get(key) for key in keys] if isinstance(e, dict) else e for e in entries]
        if bad := [repr(e)[:60] for e in parts[part] if not is_valid_entry(e)]:
            raise ValueError(
                f"{path} has entries in {part} that are not {form}: {truncate_list(bad)}"
            )
    return parts


def dump_fewshot_split(dataset: FewShotDataset) -> str:
    """The text of a list of a dataset's few images, which `load_fewshot_split` takes on any disk."""  # noqa: E501

    def entries(items: list[Datum]) -> list[RawSample]:
        start = os.path.join(dataset.image_dir, "")
        return [(item.impath.removeprefix(start), item.label, item.classname) for item in items]

    return json.dumps({"train": entries(dataset.train_x), "val": entries(dataset.val)})


def _spaced(name: str) -> str:
    """A class name as prompts have it."""
    return name.replace("_", " ")
