"""The flags: all settings of a run, with their defaults and checks, in one place."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import clip
from datasets import DATASETS, SUBSAMPLES, check_dataset
from machine import default_device
from optimizers.ablations import GRAD_SUPPORTS, MOMENT_SUPPORTS, MOMENTS
from optimizers.methods import METHODS, POSITIONS, SUPPORTS
from processes import may_complain
from utils import nearest, one_line

LARGEST = 10**18  # whole number that a setting may have
SPLITS = {"test": "test", "val": "validation"}  # images that accuracies are measured on


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        sentence = one_line(f"{self.prog}: error: {message}") + "\n"
        self.exit(2, sentence if may_complain() else None)


def choice(kind: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A parser type: one of the valid names, or an error with the nearest and all of them."""

    def parse(name: str) -> str:
        if name in valid:
            return name
        raise argparse.ArgumentTypeError(
            f"unknown {kind} {name!r}{nearest(name, valid)}; valid: {', '.join(valid)}"
        )

    return parse


def number(kind: type, low: float, high: float = math.inf, open_: str = "") -> Callable[[str], Any]:
    """A parser type: an int or float from low to high, bounds named in `open_` excluded.

    Whole numbers end at LARGEST: torch does not take far larger ones.
    """
    high = min(high, LARGEST) if kind is int else high
    bounds = []
    if low > -math.inf:
        bounds.append((">" if "low" in open_ else ">=") + f" {low:g}")
    if high < math.inf:
        bounds.append(("<" if "high" in open_ else "<=") + f" {high:g}")
    wanted = " ".join(["a whole number" if kind is int else "a number", " and ".join(bounds)])

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            inside = low <= value <= high and math.isfinite(value)
        except (ValueError, OverflowError):
            value, inside = None, False
        if not inside or ("low" in open_ and value == low) or ("high" in open_ and value == high):
            raise argparse.ArgumentTypeError(f"must be {wanted.strip()}, not {text!r}")
        return value

    return parse


def backbone(name: str) -> str:
    """A parser type: whatever `clip.load` would find, without looking into it."""
    try:
        clip.check(name)
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error).replace("unknown model", "unknown backbone")  # as the flag calls it
        raise argparse.ArgumentTypeError(sentence) from None
    return name


def dataset(name: str) -> str:
    """A parser type: a name of the table, or the path of images of one's own."""
    try:
        check_dataset(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def logit_scale(text: str) -> float | str:
    """A parser type: a positive number, or "checkpoint"."""
    return text if text == "checkpoint" else number(float, 0, open_="low")(text)


# fmt: off
def make_parser() -> Parser:
    """All flags, with the defaults of the authors' command line."""
    parser = Parser(
        prog="main.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Adapt CLIP to an image classification task from a few images per class. "
        "Without arguments: handwritten digits and a tiny CLIP, nothing to download.",
    )
    switch = dict(action=argparse.BooleanOptionalAction)
    cores = os.cpu_count() or 1

    add = parser.add_argument_group("task").add_argument
    add("--dataset", type=dataset, metavar="NAME|PATH",
        help=f"name of a dataset ({', '.join(DATASETS)}), or path of your own images: a folder of "
        "class folders, a CSV or a JSON; dtd if only --root_path is given, digits if neither is")
    add("--root_path", help="folder that holds all datasets, laid out as DATASETS.md says")
    add("--classnames", metavar="FILE.yaml",
        help="file of names for the prompts, by folder or label of the class")
    add("--template", nargs="+", metavar="TEXT",
        help="prompts with {} for the class's name, averaged where there are several; or dataset "
        "for the one that CoOp has for this dataset, or clip for seven general ones")
    add("--fewshot_list", metavar="FILE.json",
        help="list of the training and validation images, instead of a draw: a run's fewshot.json")
    add("--subsample", type=choice("subsample", SUBSAMPLES), default="all",
        help="classes of the task: all; base, the first half, tested on the new ones as well; or "
        "new, the other half")
    add("--shots", type=number(int, 1, 10**6), default=1, help="training images per class")
    add("--seed", type=number(int, 0), default=3,
        help="seed of the few shots and of everything random in the run")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", type=backbone, default="ViT-B/16",
        help="name of a CLIP, or path of a checkpoint")
    add("--activation", type=choice("activation", ["quickgelu", "gelu"]),
        help="activation that the backbone's weights were trained with")
    add("--heads", type=number(int, 1, 1024), nargs=2, metavar=("VISION", "TEXT"),
        help="attention heads of the backbone's two towers")
    add("--encoder", type=choice("encoder", ["text", "vision", "both"]), default="both",
        help="tower to adapt: text, vision or both")
    add("--position", type=choice("position", list(POSITIONS)), default="all",
        help=f"layers to adapt: {', '.join(POSITIONS)}")
    add("--logit_scale", type=logit_scale, default=100.0,
        help="factor of cos(image, text), or `checkpoint` for the one that the weights carry")

    add = parser.add_argument_group("method").add_argument
    add("--method", type=choice("method", METHODS), default="so",
        help="optimizer: so, adam on the same matrices, or lora on queries, keys and values")
    add("--s", "--sparsity", type=number(float, 0, 1, open_="high"), default=0.99995,
        help="sparsity kappa of so, the share of entries left out (its density is 1 - s)")
    add("--t", type=number(int, 1), default=5,
        help="T of so, iterations between two draws of the gradient support")
    add("--grad_support", type=choice("support", GRAD_SUPPORTS), default=SUPPORTS["grad_support"],
        help="gradient support of so, for ablations: random, or by magnitude of the gradient")
    add("--moment_support", type=choice("support", MOMENT_SUPPORTS),
        default=SUPPORTS["moment_support"],
        help="moment support of so, for ablations: by magnitude of the first moment, random, "
        "fixed, or reset to the gradient support at each draw")
    add("--moments", type=choice("moments", MOMENTS), default=SUPPORTS["moments"],
        help="moments of so, for ablations: usual, aged (bias corrections by each entry's own "
        "age), or none")
    add("--rank", type=number(int, 1), default=2, help="rank of lora's adapters")
    add("--wise", type=number(float, 0), default=1.0, metavar="ALPHA",
        help="factor of what was learned, in evaluations and saved weights: base + ALPHA * delta")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=number(float, 0, open_="low"), default=2e-4,
        help="learning rate of the first iteration; a cosine takes it down to 1e-6")
    add("--n_iters", type=number(int, 0, 10**9), default=2000,
        help="iterations per shot; 0 measures the zero-shot accuracy alone")
    add("--early_stop_loss", type=number(float, -math.inf), default=0.01,
        help="stop after an epoch whose mean loss is below this; never, if negative")
    add("--batch_size", type=number(int, 1), default=32, help="images per iteration")
    add("--accumulate", type=number(int, 1), default=1,
        help="parts that each batch is split into and computed one after the other, to save memory")
    add("--crop_scale", type=number(float, 0, 1, open_="low"), nargs=2, default=[0.08, 1.0],
        metavar=("MIN", "MAX"), help="area of the random crop, as a share of the image")
    add("--crop_ratio", type=number(float, 0, open_="low"), nargs=2, default=[3 / 4, 4 / 3],
        metavar=("MIN", "MAX"), help="width / height of the random crop")
    add("--flip", **switch, default=True,
        help="mirror each training image with probability one half")
    add("--precision", type=choice("precision", ["fp32", "bf16", "fp16"]), default="fp32",
        help="precision of the matrix products: fp32, bf16 or fp16; the weights stay in fp32")
    add("--text_chunk", type=number(int, 0), default=0,
        help="classes whose prompts are encoded at once, to save memory at the cost of time; "
        "0 for all")
    add("--dense_grad", **switch, default=False,
        help="compute whole weight gradients, not only the entries that so reads")
    add("--compile", **switch, default=False,
        help="compile the towers with torch.compile; weight gradients are then computed whole")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=number(int, 0), default=0,
        help="iterations between two test accuracies in curve.csv; 0 for the last one alone")
    add("--eval_split", type=choice("split", list(SPLITS)), default="test",
        help="images that accuracies are measured on: test, or val for the few validation "
        "images, to choose settings by")
    add("--select", type=choice("iterate", ["last", "val"]), default="last",
        help="weights to report: those of the last iteration, or with val those of the best "
        "accuracy on the few validation images, measured every --eval_every iterations")

    add("--test_on", type=dataset, nargs="+", metavar="NAME",
        help="other datasets to test on when training has ended, or with a finished run's weights")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default=default_device(), help="device, such as cuda, cuda:1, mps or cpu")
    add("--num_workers", type=number(int, 0, 1024), default=min(8, cores),
        help="threads that prepare images")
    add("--threads", type=number(int, 1, 1024), help="threads that torch computes with on a CPU")
    add("--cache_mb", type=number(int, 0), default=2048, help="memory for decoded images, in MB")

    add = parser.add_argument_group("files").add_argument
    add("--config", help="YAML file of settings; flags win over it")
    add("--save_path", default="results",
        help="folder of all results; given, it implies --save_weights")
    add("--filename", default="weights", help="name of the weights file, without its suffix")
    add("--save_weights", **switch, default=False, help="keep the adapted matrices")
    add("--checkpoint_every", type=number(int, 0), default=500,
        help="iterations between two checkpoints; 0 for those on SIGINT and SIGTERM alone")
    add("--resume", **switch, default=False, help="go on from the checkpoint, if there is one")
    add("--overwrite", **switch, default=False,
        help="replace a result or checkpoint that is in the run's folder")
    add("--eval_only", **switch, default=False, help="evaluate saved weights, without training")
    return parser
# fmt: on
