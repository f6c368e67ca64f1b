"""Classify images with what a run has learnt.

    python scripts/predict.py results/so/ViT-B-16/birds/16shots/seed3 cat.jpg more_images/ --top 3
    python scripts/predict.py RUN_FOLDER IMAGES/ --csv > predictions.csv

A line for each image and class, the likeliest class first: path, class, probability. Weights, names
and prompts are the run's; folders are searched for images at any depth. What is not an image is
named on standard error and left out: all others are classified, and the status is 2 in the end.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import reporting  # noqa: F401  (which puts the repository on the path)
import torch
from torch import Tensor

from clip.zero_shot import (
    encode_classes,
    encode_images,
    get_autocast,
    get_logit_scale,
    tokenize_class_prompts,
)
from datasets import Datum
from datasets.base import list_images, list_subdirs
from datasets.loader import ImageLoader
from run_utils import OneLineErrorParser, bounded_number
from runs.environment import get_default_device, set_up_device
from runs.records import Run, read_run
from runs.weights import PretrainedModel, load_weights
from utils import format_error, one_line, print_quietly, to_csv, unique_classnames

BATCH = 64  # images classified at once


def find_run(folder: Path) -> tuple[Run, Path]:
    """The finished run in a folder, and its weights; a ValueError if one of them is missing."""
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} holds no result.json: name the folder that main.py printed")
    run, usual = read_run(folder), folder / "weights.safetensors"
    if not run.classnames:
        raise ValueError(f"{folder} is of an earlier version, without names: --overwrite it")
    weights = [usual] if usual.is_file() else sorted(folder.glob("*.safetensors"))
    if not weights:
        remedy = "--overwrite and --save_weights, which --save_path implies"
        raise ValueError(f"{folder} holds no weights: run main.py again with {remedy}")
    return run, weights[0]


def find_images(paths: Sequence[Path], complain: Callable[[str], None]) -> Iterator[Path]:
    """Yield the files that are named, and all images in the folders that are."""
    for path in paths:
        inside = list(walk(path, set())) if path.is_dir() else [path]
        if not inside:
            complain(f"there is no image in {path}")
        yield from inside


def walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield a folder's images, then those of the folders in it, each of which is seen once."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        yield from (folder / name for name in list_images(folder))
        for name in list_subdirs(folder):
            yield from walk(folder / name, seen)


def read_images(
    paths: Iterator[Path], loader: ImageLoader, complain: Callable[[str], None]
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each image as (1, 3, R, R) uint8; those that cannot be read are complained of."""
    for path in paths:
        try:
            ((image, _),) = loader.test_batches([Datum(str(path), 0, "")], 1)
        except (ValueError, OSError) as error:
            complain(format_error(error))
        else:
            yield path, image


@torch.no_grad()
def predict(
    run: Run, weights: Path, images: Sequence[Path], device: str, complain: Callable[[str], None]
) -> Iterator[tuple[Path, Tensor]]:
    """Yield the probabilities (C,) of a run's classes for each image."""
    settings = run.settings
    place = set_up_device(device, None, run.seed)
    base = PretrainedModel(settings["backbone"], settings.get("activation"), settings.get("heads"))
    model = base.load(place)
    load_weights(model, weights, base.name)
    precision = settings.get("precision", "fp32")
    scale = get_logit_scale(model, settings.get("logit_scale", 100.0))
    with get_autocast(place, precision):
        classes = encode_classes(model, tokenize_class_prompts(model, run.classnames, run.template))
    loader = ImageLoader(model.visual.input_resolution)
    readable = read_images(find_images(images, complain), loader, complain)
    while some := list(islice(readable, BATCH)):
        batch = torch.cat([image for _, image in some]).to(place)
        with get_autocast(place, precision):
            cosines = encode_images(model, batch) @ classes.T  # (b, C)
        probabilities = (scale * cosines.float()).softmax(dim=-1).cpu()
        yield from zip((path for path, _ in some), probabilities, strict=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="predict.py", description=__doc__.split("\n\n")[2])
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_FOLDER", help="folder of a run that kept its weights")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image, or folder of images")
    add("--top", type=bounded_number(int, 1), default=5, help="classes for each image (5)")
    add("--csv", action="store_true", help="print CSV, with a header")
    add("--device", default=get_default_device(), help="device, such as cuda or cpu")
    args = parser.parse_args(argv)
    complaints = []

    def complain(sentence: str) -> None:
        complaints.append(sentence)
        print(one_line(f"predict.py: error: {sentence}"), file=sys.stderr, flush=True)

    try:
        run, weights = find_run(args.run)
        names = unique_classnames(run.classnames)
        if args.csv:
            print_quietly("path,class,probability")
        for path, probabilities in predict(run, weights, args.images, args.device, complain):
            best = probabilities.topk(min(args.top, len(names)))
            for value, label in zip(*map(Tensor.tolist, best), strict=True):
                row = path, names[label], value
                print_quietly(to_csv(row)[:-1] if args.csv else "{}  {}  {:.4f}".format(*row))
    except (ValueError, OSError) as error:
        complain(format_error(error))
    except KeyboardInterrupt:
        print("predict.py: interrupted", file=sys.stderr)
        return 130
    return 2 if complaints else 0


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it lacks
    sys.exit(main())
