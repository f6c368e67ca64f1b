"""--test_on: accuracies of a run on other datasets, in transfer.json next to its result."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import FewShotDataset, build_test_dataset, dataset_name
from runs.cli import print_accuracy
from runs.records import read_transfer
from utils import Predictions, atomic_write


def build_transfer_datasets(args: argparse.Namespace) -> dict[str, FewShotDataset]:
    """The datasets that --test_on names, by their names in results, which must differ."""
    targets: dict[str, FewShotDataset] = {}
    for path in args.test_on or ():
        name = dataset_name(path)
        if name in targets:
            raise ValueError(f"--test_on names {name!r} twice")
        if name == "new classes":
            raise ValueError(f"--test_on {path}: {name!r} are the run's own; give it another name")
        targets[name] = build_test_dataset(path, args.root_path, template=args.template)
    return targets


def load_known_targets(
    output_dir: Path, fingerprints: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The entries of transfer.json of which the datasets still have the same fingerprints."""
    entries = read_entries(output_dir)
    return {name: e for name, e in entries.items() if e["data"] == fingerprints.get(name)}


def read_entries(output_dir: Path) -> dict[str, dict[str, Any]]:
    """The entries of transfer.json; none of a damaged one, which is written anew."""
    try:
        return read_transfer(output_dir / "transfer.json")
    except ValueError:
        return {}


def print_known_targets(output_dir: Path, targets: Mapping[str, FewShotDataset]) -> list[str]:
    """Print what transfer.json has of the targets; return the names of the others."""
    fingerprints = {name: dataset.fingerprint for name, dataset in targets.items()}
    entries = load_known_targets(output_dir, fingerprints)
    for name, entry in entries.items():
        for kind in ("zero_shot_accuracy", "final_accuracy"):
            print_accuracy(kind, entry[kind], "test", name)
    return [name for name in targets if name not in entries]


def save_transfer(
    output_dir: Path,
    targets: Mapping[str, FewShotDataset],
    zero_shot: Mapping[str, Predictions],
    final: Mapping[str, Predictions],
) -> None:
    """Write the targets' accuracies before and after training; entries of other targets stay."""
    if not targets:
        return
    entries = read_entries(output_dir)
    for name, dataset in targets.items():
        entries[name] = {
            "zero_shot_accuracy": zero_shot[name].accuracy,
            "final_accuracy": final[name].accuracy,
            "classes": len(dataset.classnames),
            "images": len(dataset.test),
            "data": dataset.fingerprint,
        }
    atomic_write(output_dir / "transfer.json", json.dumps(entries, indent=2) + "\n")
