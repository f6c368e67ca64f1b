"""Classify images with the weights of a run.

    python scripts/predict.py results/so/ViT-B-16/birds/16shots/seed3 cat.jpg more_images/ --top 3
    python scripts/predict.py RUN_FOLDER IMAGES/ --csv > predictions.csv

Prints a line for each image and class, most probable class first: path, class, probability.
Folders are searched at any depth. Files that are not images are named on standard error and
skipped; the exit status is then 2. A note there names images that the run was trained on: those
whose paths end as in its fewshot.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import reporting  # noqa: F401  (puts the repository on the path)
import torch
from torch import Tensor

from clip import available_models
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import Datum
from datasets.files import list_images, list_subdirs
from datasets.loader import ImageLoader
from run_utils import OneLineErrorParser, bounded_number, path_arg
from runs.cli import run_cli
from runs.environment import get_default_device, set_up_device
from runs.records import Run
from runs.weights import find_saved_run, load_run_model
from utils import format_error, one_line, to_csv, truncate_list, unique_classnames

BATCH_SIZE = 64


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineErrorParser(prog="predict.py", description=__doc__.split("\n\n")[2])
    add = parser.add_argument
    add("run", type=path_arg, metavar="RUN_FOLDER", help="folder of a run that saved its weights")
    add("images", type=path_arg, nargs="+", metavar="IMAGE", help="image, or folder of images")
    add("--top", type=bounded_number(int, 1), default=5, help="classes for each image (5)")
    add("--csv", action="store_true", help="print CSV with a header")
    add("--backbone", type=os.path.expanduser, help="the pretrained model, if it has moved")
    add("--device", default=get_default_device(), help="device, such as cuda or cpu")
    args = parser.parse_args(argv)
    return run_cli(lambda: predict(args), "predict.py")


@torch.no_grad()
def predict(args: argparse.Namespace) -> int:
    """Print the most probable classes of each image, then what could not be read."""
    run, weights = find_saved_run(args.run)
    run = replace(run, config=run.config | {"backbone": args.backbone or find_backbone(run)})
    path, few = run.folder / "fewshot.json", {"train": []}
    if path.is_file():
        few = json.loads(path.read_text(encoding="utf-8"))
    device = set_up_device(args.device, None)
    model = load_run_model(run, weights, device)
    text_tokens = tokenize_class_prompts(model, run.classnames, run.template)
    settings = {key: run.config[key] for key in ("logit_scale", "precision")}
    classifier = ZeroShotClassifier(model, text_tokens, **settings)
    with classifier.autocast:
        text_features = classifier.encode_classes()  # (C, D)
    names, errors = unique_classnames(run.classnames), []
    paths = list(find_images(args.images, errors))
    endings = tuple(f"/{name}" for name, *_ in few["train"])
    if trained := [str(path) for path in paths if os.path.abspath(path).endswith(endings)]:
        print(f"note: the run was trained on {truncate_list(trained)}", file=sys.stderr)
    if args.csv:
        print("path,class,probability")
    loader = ImageLoader(model.visual.input_resolution, resize=model.image_resize)
    images = read_images(paths, loader, few.get("gray_range"), errors)
    while batch := list(islice(images, BATCH_SIZE)):
        batch_paths, pixels = zip(*batch, strict=True)
        with classifier.autocast:
            cosines = classifier.encode_images(torch.cat(pixels).to(device)) @ text_features.T
        probs = (classifier.logit_scale * cosines.float()).softmax(dim=-1).cpu()  # (b, C)
        for path, row in zip(batch_paths, probs, strict=True):
            top = row.topk(min(args.top, len(names)))
            for prob, label in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                line = path, names[label], prob
                print(to_csv(line)[:-1] if args.csv else "{}  {}  {:.4f}".format(*line), flush=True)
    for error in errors:
        print(one_line(f"predict.py: error: {error}"), file=sys.stderr)
    return 2 if errors else 0


def find_backbone(run: Run) -> str:
    """Return the run's backbone; if its file has moved, the one next to the run or further up."""
    backbone = run.config["backbone"]
    if backbone not in available_models() and not os.path.exists(backbone):
        for folder in (run.folder, *run.folder.resolve().parents):
            if (folder / os.path.basename(backbone)).exists():
                return str(folder / os.path.basename(backbone))
    return backbone


def find_images(paths: Sequence[Path], errors: list[str]) -> Iterator[Path]:
    """Yield the files among the paths, and all images in the folders among them."""
    for path in paths:
        images = list(walk_images(path, set())) if path.is_dir() else [path]
        if not path.exists():
            errors.append(f"{path}: not found")
        elif not images:
            errors.append(f"there is no image in {path}")
        else:
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
    loader: ImageLoader,
    gray_range: tuple[float, float] | None,
    errors: list[str],
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each readable image as (1, 3, R, R) uint8."""
    for path in paths:
        try:
            ((pixels, _),) = loader.test_batches([Datum(str(path), 0, "", gray_range)], 1)
            yield path, pixels
        except (ValueError, OSError) as error:
            errors.append(format_error(error))


if __name__ == "__main__":
    sys.exit(main())
