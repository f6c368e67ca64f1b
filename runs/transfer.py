"""--test_on: tests of a run on other datasets, and transfer.json beside its result.

Each dataset keeps its own classes and images; nothing is trained on it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import FewShotDataset, build_test_dataset, dataset_name
from run_utils import Config
from runs.output_dir import not_writable_error, print_accuracy
from runs.records import read_transfer
from utils import atomic_write

TRANSFER_FILENAME = "transfer.json"


def build_target_datasets(config: Config) -> dict[str, FewShotDataset]:
    """The datasets that --test_on names, by the names that results give them.

    Raises:
        ValueError: One of them cannot be read, or two have one name.
    """
    targets: dict[str, FewShotDataset] = {}
    for path in config.test_on or ():
        name = dataset_name(path)
        if name in targets:
            raise ValueError(f"--test_on names {name!r} twice, for which there is one entry")
        targets[name] = build_test_dataset(path, config.root_path, template=config.template)
    return targets


def load_known_targets(
    folder: Path, data: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What a run's folder already says of datasets, if their images are still the same.

    Args:
        folder: The run's.
        data: By name, as FewShotDataset.data.
    """
    try:
        entries = read_transfer(folder / TRANSFER_FILENAME)
    except (ValueError, OSError):
        return {}
    same = [n for n in data if n in entries and entries[n]["data"] == data[n]]
    return {name: entries[name] for name in same}


def print_known_targets(folder: Path, targets: Mapping[str, FewShotDataset]) -> list[str]:
    """Print what a finished run's folder already says of targets; name those that it does not."""
    entries = load_known_targets(
        folder, {name: dataset.fingerprint for name, dataset in targets.items()}
    )
    for name, entry in entries.items():
        for kind in ("zero_shot_accuracy", "final_accuracy"):
            print_accuracy(kind, entry[kind], "test", name)
    return [name for name in targets if name not in entries]


def save_transfer(
    folder: Path,
    targets: Mapping[str, FewShotDataset],
    zero_shot: Mapping[str, float],
    final: Mapping[str, float],
) -> None:
    """Write accuracies in percent into transfer.json, where entries of other targets stay.

    Args:
        folder: The run's.
        targets: By name.
        zero_shot: Before training, by name of some of the targets.
        final: After it.
    """
    try:
        entries = read_transfer(folder / TRANSFER_FILENAME)
    except (ValueError, OSError):
        entries = {}
    for name, dataset in targets.items():
        if name not in final:
            continue
        entries[name] = {
            "zero_shot_accuracy": zero_shot[name],
            "final_accuracy": final[name],
            "classes": len(dataset.classnames),
            "images": len(dataset.test),
            "data": dataset.fingerprint,
        }
    try:
        atomic_write(folder / TRANSFER_FILENAME, json.dumps(entries, indent=2) + "\n")
    except OSError as error:
        raise not_writable_error(folder, error) from error
