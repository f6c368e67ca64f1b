"""Eleven image datasets and one that needs no download, as few-shot tasks.

`build_dataset("eurosat", root, shots=16)` reads one; `python -m datasets --root_path ROOT` checks
what is on the disk; DATASETS.md says where to get it and how it must lie.
"""

from datasets.base import DatasetSpec, FewShotDataset, Item
from datasets.table import DATASETS, build_dataset, find_spec

__all__ = ["DATASETS", "DatasetSpec", "FewShotDataset", "Item", "build_dataset", "find_spec"]
