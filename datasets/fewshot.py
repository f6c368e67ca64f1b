"""The few-shot draw with Python's global `random`, and lists of images that take its place."""

import json
import os
import random
from pathlib import Path
from typing import Any

from datasets.base import FewShotDataset, RawSample, Split, group_by_label
from datasets.files import PathLike, nfc, read_json
from datasets.readers import parse_lines
from datasets.splits import parse_samples

FORM = (
    "--fewshot_split takes UTF-8 text of the form "
    '{"train": [[path, label, class name], ...], "val": [...]}, or a .jsonl'
)


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
    """
    num_val = min(shots, 4)
    if not val_from_train:
        val = _draw(split.val, num_val)
        return _draw(split.train, shots), val
    train, val = [], []
    for samples in group_by_label(split.train):
        if len(samples) < shots + num_val:
            problem = f"class {samples[0][2]!r} has {len(samples)} training images"
            raise ValueError(f"{problem}, but {shots} shots take {shots + num_val}: lower --shots")
        drawn = random.sample(samples, shots + num_val)
        train += drawn[:shots]
        val += drawn[shots:]
    return train, val


def _draw(samples: list[RawSample], count: int) -> list[RawSample]:
    drawn = []
    for group in group_by_label(samples):
        enough = len(group) >= count
        drawn += random.sample(group, count) if enough else random.choices(group, k=count)
    return drawn


def load_fewshot_split(
    path: PathLike, split: Split, subsample: str
) -> tuple[list[RawSample], list[RawSample]]:
    """Take the few training and validation images from a list instead of a draw.

    The list is a JSON file as `parse_samples` describes it, such as `dump_fewshot_split` writes; or
    one of 2SFS's two files, `shot_{K}-seed_{S}_train.jsonl` and `..._val.jsonl`, with an entry a
    line. An image is found by its path below the image folder, whatever folders are before it.
    Labels may be counted in the half of the classes. A list of other images is a ValueError.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: {FORM}")
    data = _read_jsonl_pair(path) if path.endswith(".jsonl") else read_json(path, FORM)
    by_path = {nfc(sample[0]): sample for sample in (*split.train, *split.val)}
    offset = len(split.subsample_classes("base").lab2cname) if subsample == "new" else 0
    few: dict[str, list[RawSample]] = {"train": [], "val": []}
    for part, entries in parse_samples(data, few, path, FORM).items():
        for image, label, _ in entries:
            folders = nfc(image.replace("\\", "/")).split("/")
            suffixes = ("/".join(folders[i:]) for i in range(len(folders)))
            sample = next((by_path[suffix] for suffix in suffixes if suffix in by_path), None)
            if not sample:
                raise ValueError(f"{path} names {image}, no training image of {split.source_path}")
            if sample[1] not in (label, label + offset):
                raise ValueError(f"{path} gives {image} the label {label}, which is {sample[1]}")
            few[part].append(sample)
    if not few["train"]:
        raise ValueError(f"{path} has no training images")
    if both := set(few["train"]) & set(few["val"]):
        raise ValueError(f"{path} has the image {min(both)[0]} in train and in val: take one out")
    return few["train"], few["val"]


def _read_jsonl_pair(path: str) -> dict[str, list[Any]]:
    if not path.endswith(("_train.jsonl", "_val.jsonl")):
        raise ValueError(f"{path} is not one of a pair ..._train.jsonl and ..._val.jsonl")
    stem = path.rpartition("_")[0]
    files = {part: Path(f"{stem}_{part}.jsonl") for part in ("train", "val")}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"there is no file {file}: --fewshot_split needs both of the pair")
    form = '{"impath": ..., "label": ..., "classname": ...}'
    return {part: parse_lines(file, form, json.loads) for part, file in files.items()}


def dump_fewshot_split(dataset: FewShotDataset) -> str:
    """Return a dataset's few images as the JSON that `load_fewshot_split` reads on any disk."""
    start = os.path.join(dataset.image_dir, "")
    few = {
        part: [(item.impath.removeprefix(start), item.label, item.classname) for item in items]
        for part, items in (("train", dataset.train_x), ("val", dataset.val))
    }
    gray_range = dataset.train_x[0].gray_range if dataset.train_x else None
    return json.dumps(few | ({"gray_range": gray_range} if gray_range else {}))
