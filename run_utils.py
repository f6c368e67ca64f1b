"""A run's surroundings: flags and YAML, seeds and devices, the run's folder, clean endings.

The parser below is the one place where settings, their defaults and their checks stand. A YAML
file's entries pass through the same parser as the command line's, so both are checked alike.
"""

import argparse
import ctypes
import io
import logging
import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

import clip
from datasets import DATASETS
from datasets.base import on_disk
from optimizers.ablations import GRAD_SUPPORTS, MOMENT_SUPPORTS
from optimizers.methods import METHODS, SUPPORTS
from train import POSITIONS
from utils import Interrupted, explain, nearest, one_line

MOST = 10**18  # of whole numbers
HERE = Path(__file__).parent
DEMO = {"dataset": "digits", "backbone": "ViT-Tiny/8"}  # what `python main.py` alone stands for
DEMO_CONFIG = HERE / "configs" / "digits.yaml"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PATHS = {"root_path", "save_path", "backbone"}
SPLITS = {"test": "test", "val": "validation"}  # that accuracies may be of, and their names


# Flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


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

    Whole numbers end at MOST: far larger ones are no numbers to torch.
    """
    high = min(high, MOST) if kind is int else high
    signs = (">" if "low" in open_ else ">=") + f" {low:g}"
    if high < math.inf:
        signs += (" and <" if "high" in open_ else " and <=") + f" {high:g}"
    article = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            inside = low <= value <= high and math.isfinite(value)
        except (ValueError, OverflowError):
            value, inside = None, False
        if not inside or ("low" in open_ and value == low) or ("high" in open_ and value == high):
            raise argparse.ArgumentTypeError(f"must be {article} {signs}, not {text!r}")
        return value

    return parse


def backbone(name: str) -> str:
    """A parser type: a model's name or a checkpoint that is there."""
    names = clip.available_models()
    if name in names or os.path.isfile(os.path.expanduser(name)):
        return name
    if Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise argparse.ArgumentTypeError(f"there is no checkpoint at {name!r}: check the path")
    raise argparse.ArgumentTypeError(
        f"unknown backbone {name!r}{nearest(name, names)}; valid: {', '.join(names)}, "
        "or a checkpoint's path"
    )


def logit_scale(text: str) -> float | str:
    """A parser type: a positive number, or "checkpoint"."""
    return text if text == "checkpoint" else number(float, 0, open_="low")(text)


# fmt: off
def make_parser() -> Parser:
    """All flags, with the defaults of the authors' command line."""
    parser = Parser(
        prog="main.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Adapt CLIP to an image classification task from a few images per class. "
        "Without arguments: handwritten digits and a tiny CLIP, no download.",
    )
    switch = dict(action=argparse.BooleanOptionalAction)
    cores = os.cpu_count() or 1

    add = parser.add_argument_group("task").add_argument
    add("--dataset", type=choice("dataset", list(DATASETS)), help="name of the task")
    add("--root_path", help="folder of all datasets, laid out as DATASETS.md says")
    add("--shots", type=number(int, 1, 10**6), default=1, help="training images per class")
    add("--seed", type=number(int, 0), default=3, help="of the few shots and of the run")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", type=backbone, default="ViT-B/16", help="a name, or a checkpoint's path")
    add("--activation", type=choice("activation", ["quickgelu", "gelu"]),
        help="activation that the backbone's weights were trained with")
    add("--heads", type=number(int, 1, 1024), nargs=2, metavar=("VISION", "TEXT"),
        help="attention heads of the backbone's two towers")
    add("--encoder", type=choice("encoder", ["text", "vision", "both"]), default="both",
        help="tower to adapt: text, vision or both")
    add("--position", type=choice("position", list(POSITIONS)), default="all",
        help=f"layers to adapt: {', '.join(POSITIONS)}")
    add("--logit_scale", type=logit_scale, default=100.0,
        help="factor of cos(image, text), or `checkpoint` for the weights' own")

    add = parser.add_argument_group("method").add_argument
    add("--method", type=choice("method", METHODS), default="so",
        help="so; lora on q, k and v; or adam on the same matrices as so")
    add("--s", type=number(float, 0, 1, open_="high"), default=0.99995,
        help="of so: sparsity kappa, the share of entries left out; density_ratio = 1 - s")
    add("--t", type=number(int, 1), default=5,
        help="of so: T, iterations between two draws of the gradient support")
    add("--grad_support", type=choice("support", GRAD_SUPPORTS), default=SUPPORTS["grad_support"],
        help="of so, for ablation: random, or by magnitude of the gradient")
    add("--moment_support", type=choice("support", MOMENT_SUPPORTS),
        default=SUPPORTS["moment_support"],
        help="of so, for ablation: by magnitude of the first moment, random, or fixed")
    add("--rank", type=number(int, 1), default=2, help="of lora: rank of the adapters")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=number(float, 0, open_="low"), default=2e-4,
        help="learning rate at the start; a cosine takes it to 1e-6")
    add("--n_iters", type=number(int, 1, 10**9), default=2000, help="iterations per shot")
    add("--early_stop_loss", type=number(float, 0), default=0.01,
        help="end when the mean loss of an epoch is below this")
    add("--batch_size", type=number(int, 1), default=32, help="images per iteration")
    add("--accumulate", type=number(int, 1), default=1,
        help="parts that each batch is computed in, one after the other, for less memory")
    add("--crop_scale", type=number(float, 0, 1, open_="low"), nargs=2, default=[0.08, 1.0],
        metavar=("MIN", "MAX"), help="area of the random crop, as shares of the image")
    add("--crop_ratio", type=number(float, 0, open_="low"), nargs=2, default=[3 / 4, 4 / 3],
        metavar=("MIN", "MAX"), help="width / height of the random crop")
    add("--flip", **switch, default=True, help="mirror every other training image")
    add("--precision", type=choice("precision", ["fp32", "bf16", "fp16"]), default="fp32",
        help="of matrix products: fp32, bf16 or fp16; weights stay fp32")
    add("--text_chunk", type=number(int, 0), default=0,
        help="classes whose text is encoded at once, for less memory and more time; 0 for all")
    add("--dense_grad", **switch, default=False,
        help="compute whole weight gradients, not only the entries that SO reads")
    add("--compile", **switch, default=False,
        help="translate the towers with torch.compile; whole weight gradients are then computed")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=number(int, 0), default=0,
        help="iterations between two test accuracies in curve.csv; 0 for the last one alone")
    add("--eval_split", type=choice("split", list(SPLITS)), default="test",
        help="images that accuracies are measured on: test, or val for the few validation images, "
        "to choose settings by")
    add("--select", type=choice("iterate", ["last", "val"]), default="last",
        help="iterate to report: last, or val for the best on the few validation images, which "
        "are looked at every --eval_every iterations")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default=default_device(), help="such as cuda, cuda:1, mps or cpu")
    add("--num_workers", type=number(int, 0, 1024), default=min(8, cores),
        help="threads that prepare images")
    add("--threads", type=number(int, 1, 1024), help="threads of torch on the CPU")
    add("--cache_mb", type=number(int, 0), default=2048, help="memory for decoded images, in MB")

    add = parser.add_argument_group("files").add_argument
    add("--config", help="YAML file of settings; flags win over it")
    add("--save_path", default="results", help="folder of all results")
    add("--filename", default="weights", help="name of the weights file")
    add("--save_weights", **switch, default=False, help="keep the adapted matrices")
    add("--checkpoint_every", type=number(int, 0), default=500,
        help="iterations between two checkpoints; 0 for those on SIGINT and SIGTERM alone")
    add("--resume", **switch, default=False, help="go on from the checkpoint, if there is one")
    add("--overwrite", **switch, default=False, help="replace another configuration's result")
    add("--eval_only", **switch, default=False, help="evaluate saved weights, do not train")
    return parser
# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Resolve the configuration: flags win over the YAML file, which wins over the defaults.

    Where flags name no file, and neither another dataset nor another backbone than the embedded
    ones, the file is configs/digits.yaml.

    Args:
        argv: The arguments; those of the process when None.

    Raises:
        SystemExit: With status 2, after one sentence, where something cannot be understood.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    named = argparse.Namespace(**{action.dest: None for action in parser._actions})
    named, unknown = parser.parse_known_args(argv, named)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        hint = nearest(unknown[0].split("=")[0], flags)
        parser.error(f"unknown argument {unknown[0]!r}{hint}; --help lists all")

    file = named.config
    embedded = all(getattr(named, key) in (None, value) for key, value in DEMO.items())
    if not file and embedded:
        file = DEMO_CONFIG
    config = parser.parse_args(from_yaml(parser, Path(file)) if file else [])
    if file:
        parser.prog = "main.py"
    config = parser.parse_args(argv, config)
    config.config = str(file) if file else None
    for key, value in vars(config).items():
        if value == []:  # argparse of Python 3.11 and older takes "--" out of --key=--
            parser.error(f"argument --{key}: expected a value")
    if config.dataset is None:
        parser.error(f"name a task with --dataset; valid: {', '.join(DATASETS)}")
    if config.select == "val" and not config.eval_every:
        parser.error("argument --select: val needs --eval_every N, iterations between two looks")
    if config.method != "so":
        for key, usual in SUPPORTS.items():
            if getattr(config, key) != usual:
                parser.error(f"argument --{key}: is of --method so, not of {config.method}")
    for key in ("crop_scale", "crop_ratio"):
        if getattr(config, key)[0] > getattr(config, key)[1]:
            parser.error(f"argument --{key}: MIN is above MAX: {getattr(config, key)}")
    if not config.filename or Path(config.filename).name != config.filename:
        parser.error(
            f"argument --filename: must be a name without folders, not {config.filename!r}"
        )
    return config


class PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, of which few lines can make more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which no setting needs")
        return super().compose_node(parent, index)


def from_yaml(parser: Parser, path: Path) -> list[str]:
    """The entries of a YAML file, as the arguments that would say the same."""
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except OSError as error:
        parser.error(f"argument --config: cannot read {path}: {error.strerror}")
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        parser.error(f"argument --config: {path} is not YAML: {error}")
    if not isinstance(entries, dict):
        parser.error(f"argument --config: {path} must hold lines of the form `key: value`")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    parser.prog = f"main.py: {path}"  # complaints about an entry name the file that it is in
    argv = []
    for key, value in entries.items():
        if key not in actions or key == "config":
            valid = sorted(set(actions) - {"config"})
            hint = nearest(str(key), valid)
            parser.error(f"unknown key {key!r}{hint}; valid: {', '.join(valid)}")
        if value is None:
            continue
        if key in PATHS and isinstance(value, str):
            value = on_disk(value)
        if isinstance(actions[key], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                parser.error(f"key {key!r}: must be true or false, not {value!r}")
            argv.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict | bool):
            parser.error(f"key {key!r}: cannot be {value!r}")
        else:
            argv.append(f"--{key}={value}")
    return argv


# Seeds and devices


def default_device() -> str:
    """CUDA where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def prepare_machine(name: str, threads: int | None, seed: int) -> torch.device:
    """Set torch's threads and seed, and return the device.

    Python's `random` is seeded for the few shots alone: nothing else here draws from it.

    Raises:
        ValueError: There is no such device.
    """
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers to compute with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); try --device {default_device()}"
        ) from error
    return device


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep what is freed instead of giving it back.

    Otherwise each large tensor is new pages from the system, which have to be filled with zeros:
    on two cores a fifth of an iteration over ViT-B/16. It costs some 5 % of memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# Endings


def exit_status(main: Callable[[], None]) -> int:
    """Run main; turn what the user can mend into one sentence and status 2.

    The environment variable SO_TRACEBACK brings the traceback back.
    """
    # What Pillow has against an image's metadata does not matter here.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may have letters that it lacks
    try:
        main()
        return 0
    except (KeyboardInterrupt, Interrupted) as stop:
        number = stop.args[0] if isinstance(stop, Interrupted) else signal.SIGINT
        text = f"ended by {signal.Signals(number).name}; --resume goes on from the checkpoint"
        print(f"\nmain.py: {text}, if there is one", file=sys.stderr)
        return 128 + number
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        full = full or "can't allocate memory" in str(error)  # torch's, on a CPU
        if os.environ.get("SO_TRACEBACK") or (isinstance(error, RuntimeError) and not full):
            raise
        sentence = explain(error)
        if full:
            reason = sentence.partition("\n")[0] or "out of memory"
            sentence = f"{reason}: lower --batch_size, or use --accumulate or --precision bf16"
        print(one_line(f"main.py: error: {sentence}"), file=sys.stderr)
        return 2
