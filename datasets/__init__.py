"""Image datasets as few-shot tasks: the field's eleven, four variants of ImageNet, the digits.

`build_dataset("eurosat", root, shots=16)` reads one and draws its few shots. DATASETS.md says where
to get the datasets and how their folders look; `python -m datasets --root_path ROOT` checks them.
"""

from datasets.base import SUBSAMPLES, Datum, FewShotDataset
from datasets.build import build_dataset, build_test_dataset, dataset_fingerprint
from datasets.catalog import DATASETS, dataset_name, get_dataset_info
from datasets.fewshot import dump_fewshot_split

__all__ = [
    "DATASETS",
    "SUBSAMPLES",
    "Datum",
    "FewShotDataset",
    "build_dataset",
    "build_test_dataset",
    "dataset_fingerprint",
    "dataset_name",
    "dump_fewshot_split",
    "get_dataset_info",
]
