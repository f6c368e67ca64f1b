"""Image datasets as few-shot tasks: the field's eleven, others of ImageNet's classes, the digits.

`build_dataset("eurosat", root, shots=16)` reads one, `describe_data("eurosat", root)` says which
data that is; `python -m datasets --root_path ROOT` checks what is on the disk; DATASETS.md says
where to get it and how it must lie.
"""

from datasets.base import SUBSAMPLES, DatasetSpec, FewShotDataset, Item
from datasets.build import (
    build_dataset,
    build_test,
    check_dataset,
    dataset_name,
    describe_data,
    find_spec,
)
from datasets.catalog import DATASETS
from datasets.fewshot import fewshot_json

__all__ = [
    "DATASETS",
    "SUBSAMPLES",
    "DatasetSpec",
    "FewShotDataset",
    "Item",
    "build_dataset",
    "build_test",
    "check_dataset",
    "dataset_name",
    "describe_data",
    "fewshot_json",
    "find_spec",
]
