"""What makes two runs the same: settings, and the content of weights, images, names and prompts.

Paths do not: a folder may be written otherwise, be moved or be copied.
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Datum, FewShotDataset
from datasets.files import nfc
from datasets.transforms import retry_disk_errors
from run_utils import default_settings

# Flags that do not change the numbers.
NON_HPARAMS = {
    "config", "root_path", "save_path", "filename", "save_weights", "overwrite", "eval_only",
    "device", "num_workers", "threads", "cache_mb", "resume", "checkpoint_every", "test_on",
    "overrides", "local_rank",
}  # fmt: skip
# Flags of whose values the content is compared, not the spelling.
COMPARED_BY_CONTENT = {
    "dataset", "backbone", "classnames", "template", "fewshot_split", "activation", "heads",
}  # fmt: skip
INPUT_TITLES = {
    "backbone": "the backbone's weights, activation, heads or normalization",
    "classnames": "the class names",
    "template": "the prompts",
    "train_images": "the few training images",
    "test_images": "the test images",
}
TAIL_BYTES = 4096  # of an image file that are digested; another picture has others


def get_hparams(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the numbers of a run depend on."""
    return {key: value for key, value in vars(args).items() if key not in NON_HPARAMS}


def get_identity(
    args: argparse.Namespace, dataset: FewShotDataset, base_sha256: str
) -> dict[str, Any]:
    """What a run computes, as result.json has it; `base_sha256` is PretrainedModel.model_sha256."""
    return {
        "config": get_hparams(args),
        "data": dataset.fingerprint,
        "inputs": {
            "backbone": base_sha256,
            "classnames": dataset.classnames,
            "template": dataset.template,
            "train_images": images_sha256(dataset.train_x + dataset.val, dataset.image_dir),
            "test_images": images_sha256(dataset.test, dataset.image_dir),
        },
    }


def images_sha256(items: Sequence[Datum], image_dir: str) -> str:
    """SHA-256 of labels, paths below image_dir, sizes and last bytes of image files."""
    sha = hashlib.sha256()
    for item in items:
        path = nfc(os.path.relpath(item.impath, image_dir))
        sha.update(f"{path}\0{item.label}\0".encode())
        sha.update(retry_disk_errors(partial(read_tail, item.impath), item.impath))
    return sha.hexdigest()


def read_tail(path: str) -> bytes:
    """The size of a file and its last bytes."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        return f"{size} ".encode() + file.read()


def diff_runs(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between a saved run's identity and this one's, in words."""
    return diff_settings(saved["config"], current["config"]) + diff_inputs(saved, current)


def diff_settings(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs in the values of flags, in words."""
    saved = {**default_settings(), **saved}  # which may be older than some flag
    return [
        f"{key} {saved.get(key)} there, {current.get(key)} here"
        for key in sorted((saved.keys() | current.keys()) - NON_HPARAMS - COMPARED_BY_CONTENT)
        if saved.get(key) != current.get(key)
    ]


def diff_inputs(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs in the content of weights, images, names and prompts, in words."""
    changes = [
        f"{title} differ"
        for key, title in INPUT_TITLES.items()
        if saved["inputs"][key] != current["inputs"][key]
    ]
    if saved["data"]["digest"] != current["data"]["digest"] and not changes:
        changes = ["the images that few shots are drawn from differ"]
    return changes
