"""Image datasets as few-shot tasks: the field's eleven, others of ImageNet's classes, the digits.

`build_dataset("eurosat", root, shots=16)` reads one, `describe_data("eurosat", root)` says which
data that is; `python -m datasets --root_path ROOT` checks what is on the disk; DATASETS.md says
where to get it and how it must lie.
"""

from datasets.base import SUBSAMPLES, DatasetInfo, Datum, FewShotDataset
from datasets.build import (
    build_dataset,
    build_test_dataset,
    dataset_fingerprint,
    dataset_name,
    get_dataset_info,
    validate_dataset_name,
)
from datasets.catalog import DATASETS
from datasets.fewshot import dump_fewshot_split

__all__ = [
    "DATASETS",
    "SUBSAMPLES",
    "DatasetInfo",
    "FewShotDataset",
    "Datum",
    "build_dataset",
    "build_test_dataset",
    "validate_dataset_name",
    "dataset_name",
    "dataset_fingerprint",
    "dump_fewshot_split",
    "get_dataset_info",
]
