"""Classify images with the weights of a run.

    python scripts/predict.py results/so/ViT-B-16/birds/16shots/seed3 cat.jpg more_images/ --top 3
    python scripts/predict.py RUN_FOLDER IMAGES/ --csv > predictions.csv

Prints a line for each image and class, most probable class first: path, class, probability.
Folders are searched at any depth. Files that are not images are named on standard error and
skipped; the exit status is then 2. A note there names images that the run was trained on.
"""

import argparse
import filecmp
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import reporting  # noqa: F401  (puts the repository on the path)
import torch
from torch import Tensor

from clip import available_models
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import Datum
from datasets.base import list_images, list_subdirs
from datasets.loader import ImageLoader
from run_utils import OneLineErrorParser, bounded_number
from runs.cli import run_cli
from runs.environment import get_default_device, set_up_device
from runs.records import Run
from runs.weights import find_saved_run, load_run_model
from utils import format_error, one_line, to_csv, truncate_list, unique_classnames

BATCH_SIZE = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="predict.py", description=__doc__.split("\n\n")[2])
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_FOLDER", help="folder of a run that saved its weights")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image, or folder of images")
    add("--top", type=bounded_number(int, 1), default=5, help="classes for each image (5)")
    add("--csv", action="store_true", help="print CSV with a header")
    add("--backbone", type=os.path.expanduser, help="the pretrained model, if it has moved")
    add("--device", default=get_default_device(), help="device, such as cuda or cpu")
    args = parser.parse_args(argv)
    errors = []

    def log_error(message: str) -> None:
        errors.append(message)
        print(one_line(f"predict.py: error: {message}"), file=sys.stderr, flush=True)

    status = run_cli(lambda: print_predictions(args, log_error), "predict.py")
    return status or (2 if errors else 0)


def print_predictions(args: argparse.Namespace, log_error: Callable[[str], None]) -> None:
    """Print the most probable classes of each image."""
    run, weights = find_saved_run(args.run)
    backbone = args.backbone or find_backbone(run)
    run = replace(run, config=run.config | {"backbone": backbone})
    names = unique_classnames(run.classnames)
    if args.csv:
        print("path,class,probability")
    for path, probabilities in predict(run, weights, args.images, args.device, log_error):
        top = probabilities.topk(min(args.top, len(names)))
        for probability, label in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            row = path, names[label], probability
            line = to_csv(row)[:-1] if args.csv else "{}  {}  {:.4f}".format(*row)
            print(line, flush=True)


@torch.no_grad()
def predict(
    run: Run, weights: Path, images: Sequence[Path], device: str, log_error: Callable[[str], None]
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each image's path and the probabilities (C,) of the run's classes."""
    device = set_up_device(device, None)
    model = load_run_model(run, weights, device)
    text_tokens = tokenize_class_prompts(model, run.classnames, run.template)
    settings = {key: run.config[key] for key in ("precision", "logit_scale") if key in run.config}
    classifier = ZeroShotClassifier(model, text_tokens, **settings)
    with classifier.autocast:
        text_features = classifier.encode_classes()  # (C, D)
    loader = ImageLoader(model.visual.input_resolution, resize=model.image_resize)
    few = read_few_shots(run)
    paths = list(find_images(images, log_error))
    trained = {image for image, *_ in few.get("train", [])}
    folder = Path(run.config.get("dataset", ""))
    folder = folder if folder.is_dir() else folder.parent
    if seen := [str(path) for path in paths if is_among(path, trained, folder)]:
        print(f"note: the run was trained on {truncate_list(seen)}", file=sys.stderr)
    readable = read_images(paths, few.get("gray_range"), loader, log_error)
    while batch := list(islice(readable, BATCH_SIZE)):
        paths, pixels = zip(*batch, strict=True)
        with classifier.autocast:
            cosines = classifier.encode_images(torch.cat(pixels).to(device)) @ text_features.T
        probs = (classifier.logit_scale * cosines.float()).softmax(dim=-1).cpu()  # (b, C)
        yield from zip(paths, probs, strict=True)


def find_backbone(run: Run) -> str:
    """Return the run's backbone; if its file has moved, the one next to the run or further up."""
    backbone = run.config["backbone"]
    if backbone not in available_models() and not os.path.exists(backbone):
        for folder in (run.folder, *run.folder.resolve().parents):
            if (folder / os.path.basename(backbone)).exists():
                return str(folder / os.path.basename(backbone))
    return backbone


def read_few_shots(run: Run) -> dict[str, Any]:
    """Return the run's fewshot.json; nothing if it is gone."""
    try:
        return json.loads((run.folder / "fewshot.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_among(path: Path, listed: set[str], folder: Path) -> bool:
    """Return whether an image ends as a listed path does, and equals the one in folder, if any."""
    parts = Path(os.path.abspath(path)).parts
    below = ("/".join(parts[start:]) for start in range(1, len(parts)))
    originals = [folder / name for name in below if name in listed]
    return any(not o.exists() or filecmp.cmp(path, o, shallow=False) for o in originals)


def find_images(paths: Sequence[Path], log_error: Callable[[str], None]) -> Iterator[Path]:
    """Yield the files among the paths, and all images in the folders among them."""
    for path in paths:
        if not path.exists():
            log_error(f"{path}: not found")
            continue
        images = list(walk_images(path, set())) if path.is_dir() else [path]
        if not images:
            log_error(f"there is no image in {path}")
        yield from images


def walk_images(folder: Path, visited: set[Path]) -> Iterator[Path]:
    """Yield the images in a folder, then those in its subfolders; links may form loops."""
    if folder.resolve() not in visited:
        visited.add(folder.resolve())
        yield from (folder / name for name in list_images(folder))
        for name in list_subdirs(folder):
            yield from walk_images(folder / name, visited)


def read_images(
    paths: Iterable[Path],
    gray_range: tuple[float, float] | None,
    loader: ImageLoader,
    log_error: Callable[[str], None],
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each readable image as (1, 3, R, R) uint8."""
    for path in paths:
        try:
            ((pixels, _),) = loader.test_batches([Datum(str(path), 0, "", gray_range)], 1)
        except (ValueError, OSError) as error:
            log_error(format_error(error))
        else:
            yield path, pixels


if __name__ == "__main__":
    sys.exit(main())
