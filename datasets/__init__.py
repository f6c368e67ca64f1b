"""Eleven image datasets and one that needs no download, as few-shot tasks.

`build_dataset("eurosat", root, shots=16)` reads one, `describe_data("eurosat", root)` says which
data that is; `python -m datasets --root_path ROOT` checks what is on the disk; DATASETS.md says
where to get it and how it must lie.
"""

import json
import os
from pathlib import Path

from datasets.base import DatasetSpec, FewShotDataset, Item
from datasets.build import find_spec
from datasets.table import DATASETS

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "FewShotDataset",
    "Item",
    "build_dataset",
    "check_dataset",
    "dataset_name",
    "describe_data",
    "fewshot_json",
    "find_spec",
]


# Stand-ins until own images are merged.
def build_dataset(name, root_path, shots, *, classnames=None, template=None, fewshot_list=None):
    from datasets.build import build_dataset

    return build_dataset(name, root_path, shots)


def describe_data(name, root_path, classnames=None):
    from datasets.build import describe_data

    return describe_data(name, root_path)


def dataset_name(name):
    if name in DATASETS:
        return name
    return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else Path(name).stem


def check_dataset(name):
    if not os.path.exists(name):
        find_spec(name)


def fewshot_json(dataset):
    parts = {"train": dataset.train_x, "val": dataset.val}
    return json.dumps({part: [vars(item) for item in items] for part, items in parts.items()})
