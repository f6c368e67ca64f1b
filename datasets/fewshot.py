"""The few-shot draw with Python's global `random`, and lists of images that take its place."""

import json
import os
import random
import re
from typing import Any

from datasets.base import (
    Datum,
    FewShotDataset,
    PathLike,
    RawSample,
    Split,
    group_by_label,
    nfc,
    read_json,
)
from datasets.readers import parse_lines
from datasets.splits import is_sample
from utils import truncate_list

FORM = '{"train": [...], "val": [...]} with entries [path, label, class name]'


def generate_fewshot_dataset(
    split: Split, shots: int, val_from_train: bool = False
) -> tuple[list[RawSample], list[RawSample]]:
    """Draw the few training and validation images with Python's global `random`.

    The order of draws is the one of CLIP-LoRA's and SO's loaders, so that a seed gives the same
    images everywhere: validation (min(shots, 4) of each class) before training; in each, the
    classes in order of first appearance; for each class one `random.sample` of its images in their
    order, or one `random.choices` if it has fewer than wanted. With `val_from_train` (ImageNet) it
    is one `random.sample` of shots + min(shots, 4) training images of each class, training images
    first. Nothing else here uses the global generator.

    Args:
        split: What to draw from.
        shots: Training images per class.
        val_from_train: Draw validation images from the training images.

    Returns:
        Training and validation samples.

    Raises:
        ValueError: With `val_from_train`, a class has too few images.
    """
    num_val = min(shots, 4)
    if not val_from_train:
        val = _draw(split.val, num_val)
        return _draw(split.train, shots), val
    train, val = [], []
    for samples in group_by_label(split.train):
        if len(samples) < shots + num_val:
            raise ValueError(
                f"class {samples[0][2]!r} has {len(samples)} training images, but {shots} shots "
                f"take {shots + num_val}, with those for validation: lower --shots"
            )
        drawn = random.sample(samples, shots + num_val)
        train += drawn[:shots]
        val += drawn[shots:]
    return train, val


def _draw(samples: list[RawSample], count: int) -> list[RawSample]:
    """Draw so many samples of each class."""
    drawn = []
    for group in group_by_label(samples):
        enough = len(group) >= count
        drawn += random.sample(group, count) if enough else random.choices(group, k=count)
    return drawn


def load_fewshot_split(
    path: PathLike, original: Split, split: Split, subsample: str = "all"
) -> tuple[list[RawSample], list[RawSample]]:
    """Take the few images from a list instead of a draw.

    The list is a JSON file, {"train": [...], "val": [...]}, with entries [path, label, class name],
    as `dump_fewshot_split` writes it, or {"impath", "label", "classname"}, as the code of
    cross-modal adaptation does. Or it is one of 2SFS's two files, `shot_{K}-seed_{S}_train.jsonl`
    and `..._val.jsonl`, with one such entry a line. An image is found by its path below the image
    folder: more folders before it do not matter, nor do its first ones.

    Args:
        path: The list.
        original: The dataset with its own class names.
        split: The same with the class names that prompts have.
        subsample: The half of the classes in which the list's labels may be counted.

    Returns:
        Training and validation samples of `split`.

    Raises:
        ValueError: The file is not such a list, or has an image, a class or a label that the
            dataset does not have.
    """
    path = os.path.expanduser(path)
    by_filename: dict[str, list[RawSample]] = {}
    for sample in (*split.train, *split.val):
        by_filename.setdefault(nfc(os.path.basename(sample[0])), []).append(sample)
    num_new = len(split.subsample_classes("new").lab2cname)
    offset = len(split.lab2cname) - num_new if subsample == "new" else 0
    parts_by_image: dict[str, str] = {}
    few = {"train": [], "val": []}
    for part, entries in _read_list(path).items():
        for image, label, name in entries:
            matches = _find_image(image, by_filename)
            if len(matches) != 1:
                which = "which several images have" if matches else "which is not a training image"
                raise ValueError(f"{path} names the image {image}, {which} in {split.source_path}")
            true_image, true_label, prompt_name = matches[0]
            if parts_by_image.setdefault(true_image, part) != part:
                raise ValueError(f"{path} has the image {image} in train and in val: take one out")
            true_name = original.lab2cname[true_label]
            names = [nfc(n.replace("_", " ")) for n in (name, true_name, prompt_name)]
            if true_label not in (label, label + offset) or names[0] not in names[1:]:
                raise ValueError(
                    f"{path} gives {image} the label {label} and the class {name!r}, which are "
                    f"{true_label} and {true_name!r} in {split.source_path}"
                )
            few[part] += matches
    return few["train"], few["val"]


def _read_list(path: str) -> dict[str, list[list]]:
    """Return the entries [path, label, class name] of a list, by part."""
    if not os.path.isfile(path):
        raise ValueError(
            f"there is no file {path}: --fewshot_split takes a list of the form {FORM}"
        )
    is_jsonl = path.endswith(".jsonl")
    data = _read_jsonl_pair(path) if is_jsonl else read_json(path, f"it must be {FORM}")
    parts = {}
    for part in ("train", "val"):
        entries = data.get(part) if isinstance(data, dict) else None
        if not isinstance(entries, list) or part == "train" and not entries:
            raise ValueError(f"{path} has no list of images named {part}: it must be {FORM}")
        keys = ("impath", "label", "classname")
        parts[part] = [[e.get(key) for key in keys] if isinstance(e, dict) else e for e in entries]
        if bad := [repr(entry)[:60] for entry in parts[part] if not is_sample(entry)]:
            raise ValueError(
                f"{path} has entries in {part} that are not {FORM}: {truncate_list(bad)}"
            )
    return parts


def _read_jsonl_pair(path: str) -> dict[str, list[Any]]:
    """Read the pair of JSON-lines files that one of them belongs to."""
    match = re.fullmatch(r"(.*)_(train|val)\.jsonl", path)
    if not match:
        raise ValueError(f"{path} is not one of a pair ..._train.jsonl and ..._val.jsonl")
    files = {part: f"{match[1]}_{part}.jsonl" for part in ("train", "val")}
    for file in files.values():
        if not os.path.isfile(file):
            raise ValueError(f"there is no file {file}: --fewshot_split needs both of the pair")
    form = '{"impath": ..., "label": ..., "classname": ...}'
    return {part: parse_lines(file, form, json.loads) for part, file in files.items()}


def _find_image(path: str, by_filename: dict[str, list[RawSample]]) -> list[RawSample]:
    """Return the samples whose path ends as this one does: one, if the path is right."""
    path = nfc(path.replace("\\", "/"))
    candidates = by_filename.get(os.path.basename(path), [])
    full_matches = [sample for sample in candidates if f"/{path}".endswith(f"/{nfc(sample[0])}")]
    suffix_matches = [sample for sample in candidates if nfc(sample[0]).endswith(f"/{path}")]
    return sorted(full_matches, key=lambda sample: len(sample[0]))[-1:] or suffix_matches


def dump_fewshot_split(dataset: FewShotDataset) -> str:
    """Return a dataset's few images as the JSON that `load_fewshot_split` reads on any disk."""

    def entries(items: list[Datum]) -> list[RawSample]:
        start = os.path.join(dataset.image_dir, "")
        return [(item.impath.removeprefix(start), item.label, item.classname) for item in items]

    parts = {"train": entries(dataset.train_x), "val": entries(dataset.val)}
    gray_range = dataset.train_x[0].gray_range if dataset.train_x else None
    return json.dumps(parts | ({"gray_range": gray_range} if gray_range else {}))
