"""The arguments of main.py: flags, the YAML file of --config, validation.

A YAML file's values go through the parser types of the flags, so both are checked alike.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

import clip
from datasets import DATASETS, SUBSAMPLES, get_dataset_info
from optimizers.ablations import GRAD_SUPPORTS, MOMENT_SUPPORTS, MOMENTS
from optimizers.build import ABLATION_DEFAULTS, METHODS, POSITIONS
from utils import REPO_ROOT, one_line

DEMO_CONFIG = str(REPO_ROOT / "configs" / "digits.yaml")  # what `python main.py` runs
EVAL_SPLITS = {"test": "test", "val": "validation"}  # images that accuracies are measured on
MAX_NUMBER = 10**18  # torch does not take far larger integers


def get_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments: flags win over the YAML file, which wins over the defaults.

    Where --dataset, --root_path, --backbone and --config are all missing, the file is
    configs/digits.yaml, the demo. `argv` are the arguments; those of the process when None.

    Returns:
        One attribute for each flag, and `overrides`, the names of the flags that were given another
        value than they would have had.

    Raises:
        ValueError: An argument or an entry of the file is unknown, or its value is not allowed.
    """
    parser = get_parser()
    explicit = explicit_args(parser, argv)
    defaults = default_settings()
    config = explicit.get("config")
    if not explicit.keys() & {"dataset", "root_path", "backbone", "config"}:
        config = DEMO_CONFIG
    if config:
        defaults |= load_yaml_config(parser, Path(config), explicit)
    args = argparse.Namespace(**defaults | explicit)
    args.overrides = sorted(key for key, value in explicit.items() if value != defaults[key])
    if "save_path" in explicit and "save_weights" not in explicit:
        args.save_weights = True
    validate_args(parser, args)
    return args


# fmt: off
def get_parser() -> argparse.ArgumentParser:
    """The parser of main.py's flags, with the defaults of the authors' command line."""
    parser = _MainParser(
        prog="main.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Adapt CLIP to an image classification task from a few images per class. "
        "Without arguments: handwritten digits and a tiny CLIP, nothing to download.",
    )
    path = os.path.expanduser  # which shells do not do in --flag=~/x
    count, positive = bounded_number(int, 0), bounded_number(int, 1)
    switch = dict(action=argparse.BooleanOptionalAction)
    ablation = ABLATION_DEFAULTS

    add = parser.add_argument_group("task").add_argument
    add("--dataset", type=dataset_arg, default="dtd", metavar="NAME|PATH",
        help=f"name of a dataset ({', '.join(DATASETS)}), or path of your own images: a folder of "
        "class folders, a CSV or a JSON")
    add("--root_path", type=path, help="folder of all datasets, laid out as DATASETS.md says")
    add("--classnames", type=path, metavar="FILE.yaml", help="names for prompts by folder or label")
    add("--template", nargs="+", metavar="TEXT",
        help="prompts with {} for the class name, averaged where there are several; `dataset` for "
        "the one that CoOp has for this dataset, `clip` for seven general ones")
    add("--fewshot_split", "--fewshot_list", type=path, metavar="FILE",
        help="training and validation images instead of a draw: a run's fewshot.json, or 2SFS's")
    add("--subsample", choices=SUBSAMPLES, default="all",
        help="classes of the task; base are the first half, tested on the new ones too")
    add("--shots", type=bounded_number(int, 1, 10**6), default=1, help="training images per class")
    add("--seed", type=count, default=3, help="seed of the few shots and of all that is random")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", type=backbone_arg, default="ViT-B/16", help="name or checkpoint of a CLIP")
    add("--activation", choices=("quickgelu", "gelu"), help="where no configuration says which")
    add("--heads", type=bounded_number(int, 1, 1024), nargs=2, metavar=("VISION", "TEXT"),
        help="attention heads of the two towers, where no configuration says how many")
    add("--encoder", choices=("text", "vision", "both"), default="both", help="towers to adapt")
    add("--position", choices=tuple(POSITIONS), default="all", help="layers to adapt")
    add("--logit_scale", type=logit_scale_arg, default=100.0,
        help="factor of cos(image, text); `checkpoint` for the one that the weights carry")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="so",
        help="adam trains the same matrices as so; lora queries, keys and values")
    add("--s", "--sparsity", type=bounded_number(float, 0, 1, exclusive="high"), default=0.99995,
        help="sparsity of so: its density is 1 - s")
    add("--t", type=positive, default=5, help="iterations that so keeps its gradient support for")
    add("--grad_support", choices=GRAD_SUPPORTS, default=ablation["grad_support"],
        help="ablation: entries whose gradient so reads")
    add("--moment_support", choices=MOMENT_SUPPORTS, default=ablation["moment_support"],
        help="ablation: entries whose moments so keeps; reset: those of the gradient support")
    add("--moments", choices=MOMENTS, default=ablation["moments"], help="ablation; none is signSGD")
    add("--bias_correction", choices=("tensor", "entry"), default=ablation["bias_correction"],
        help="so counts the steps of a tensor, or of each entry since it entered the support")
    add("--rank", type=positive, default=2, help="rank of lora's adapters")
    add("--wise", type=bounded_number(float, 0), default=1.0, metavar="ALPHA",
        help="WiSE-FT: evaluate and save base + ALPHA * (trained - base)")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=bounded_number(float, 0, exclusive="low"), default=2e-4,
        help="learning rate of the first iteration; a cosine takes it down to 1e-6")
    add("--n_iters", type=bounded_number(int, 0, 10**9), default=2000,
        help="iterations per shot; 0 measures only the zero-shot accuracy")
    add("--early_stop_loss", type=bounded_number(float, -MAX_NUMBER), default=0.01,
        help="stop when an epoch's mean loss falls below this; negative: never")
    add("--batch_size", type=positive, default=32, help="images per iteration")
    add("--grad_accum_steps", type=positive, default=1, help="micro-batches of each batch")
    add("--crop_scale", type=bounded_number(float, 0, 1, exclusive="low"), nargs=2,
        default=[0.08, 1.0], metavar=("MIN", "MAX"), help="area of the crop, of 1 for the image")
    add("--crop_ratio", type=bounded_number(float, 0, exclusive="low"), nargs=2,
        default=[3 / 4, 4 / 3], metavar=("MIN", "MAX"), help="width / height of the crop")
    add("--flip", **switch, default=True, help="mirror every other training image, at random")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="precision of the matrix products; weights stay in fp32")
    add("--class_batch_size", type=count, default=0, help="classes encoded at once; 0 for all")
    add("--dense_grad", **switch, default=False, help="compute whole weight gradients for so")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=count, default=0, help="iterations between evaluations; 0 for none")
    add("--eval_split", choices=tuple(EVAL_SPLITS), default="test",
        help="images to evaluate on; val, the few validation images, to choose settings by")
    add("--final_model", choices=("last_step", "best_val"), default="last_step",
        help="weights to evaluate and save: of the last step, or with the best accuracy on the few "
        "validation images, looked at every --eval_every iterations")
    add("--test_on", type=dataset_arg, nargs="+", metavar="NAME",
        help="other datasets to test on after training, or with a finished run's weights")

    add = parser.add_argument_group("machine").add_argument
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # of old launchers
    add("--device", help="device, such as cuda, cuda:1, mps or cpu; the first of these by default")
    add("--num_workers", type=bounded_number(int, 0, 1024), default=min(8, os.cpu_count() or 1),
        help="threads that prepare images")
    add("--threads", type=bounded_number(int, 1, 1024), help="torch's threads on a CPU")
    add("--cache_mb", type=count, default=2048, help="memory for decoded images, in MB")

    add = parser.add_argument_group("files").add_argument
    add("--config", type=path, help="YAML file of settings; flags win over it")
    add("--save_path", type=path, default="results",
        help="folder of all results; given, it implies --save_weights")
    add("--filename", default="weights", help="name of the weights file, without its suffix")
    add("--save_weights", **switch, default=False, help="save the trained matrices")
    add("--checkpoint_every", type=count, default=500, help="iterations between checkpoints")
    add("--resume", **switch, default=False, help="continue from the checkpoint, if there is one")
    add("--overwrite", **switch, default=False, help="replace the run's result or checkpoint")
    add("--eval_only", **switch, default=False, help="evaluate saved weights, without training")
    return parser
# fmt: on


def select_args(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments, by name."""
    return {name: getattr(args, name) for name in names}


def default_settings() -> dict[str, Any]:
    """The value of each flag where neither the command line nor a file gives one."""
    return {a.dest: a.default for a in get_parser()._actions if a.dest != "help"}


def explicit_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that a command line gives, and their values."""
    nothing = argparse.Namespace(**dict.fromkeys(action.dest for action in parser._actions))
    values = vars(parser.parse_args(argv, nothing))
    return {key: value for key, value in values.items() if value is not None}


def load_yaml_config(
    parser: argparse.ArgumentParser, path: Path, explicit: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings in a YAML file, which are read as the flags that they are.

    A setting may be a mapping from methods to values. One that the command line overrides, such as
    the path of a folder that has moved, need not be valid.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # yaml lets errors of many kinds through
        parser.error(f"argument --config: {path} cannot be read as YAML: {error}")
    if not isinstance(entries, dict):
        parser.error(f"argument --config: {path} must hold lines of the form `key: value`")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    method = explicit.get("method") or entries.get("method") or actions["method"].default
    settings = {}
    for key, value in entries.items():
        if key not in actions:
            parser.error(f"{path}: unknown key {key!r}; valid: {', '.join(sorted(actions))}")
        if isinstance(value, dict) and value.keys() <= set(METHODS):
            value = value.get(method)
        if value is None:
            continue
        try:
            settings |= explicit_args(parser, to_flag(actions[key], value))
        except ValueError as error:
            if key not in explicit:
                parser.error(f"{path}: {error}")
    return settings


def to_flag(action: argparse.Action, value: Any) -> list[str]:
    """A value of a YAML file as the arguments of a command line."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"key {action.dest!r}: must be true or false, not {value!r}")
        return [f"--{action.dest}" if value else f"--no-{action.dest}"]
    if isinstance(value, list):
        return [f"--{action.dest}", *map(str, value)]
    return [f"--{action.dest}={value}"]


def validate_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse arguments that exclude each other; a test-only dataset is not trained on."""
    if get_dataset_info(args.dataset).test_only and not args.eval_only:
        if args.n_iters and "n_iters" in args.overrides:
            parser.error(
                f"{args.dataset} is for testing only: train on imagenet and give --test_on "
                f"{args.dataset}, or --n_iters 0 for its zero-shot accuracy"
            )
        args.n_iters = 0
    if args.final_model == "best_val" and not args.eval_every:
        parser.error("argument --final_model: best_val needs --eval_every N")
    if args.method != "so":
        for key, default in ABLATION_DEFAULTS.items():
            if getattr(args, key) != default:
                parser.error(f"argument --{key}: belongs to --method so, not to {args.method}")
    for key in ("crop_scale", "crop_ratio"):
        if getattr(args, key)[0] > getattr(args, key)[1]:
            parser.error(f"argument --{key}: MIN is above MAX: {getattr(args, key)}")
    if not args.filename or Path(args.filename).name != args.filename:
        parser.error(f"argument --filename: must be a name without folders, not {args.filename!r}")


class OneLineErrorParser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


class _MainParser(argparse.ArgumentParser):
    """An ArgumentParser that raises errors: of several processes, one prints them (runs.cli)."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


# Parser types


def bounded_number(
    kind: type, low: float, high: float = MAX_NUMBER, exclusive: str = ""
) -> Callable[[str], Any]:
    """A parser type: an int or float from low to high; `exclusive` names a bound left out."""
    less = ["<" if exclusive == bound else "<=" for bound in ("low", "high")]
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high or value == {"low": low, "high": high}.get(exclusive):
            raise argparse.ArgumentTypeError(
                f"must be {noun} x with {low:g} {less[0]} x {less[1]} {high:g}, not {text!r}"
            )
        return value

    return parse


def name_or_path(check: Callable[[str], object]) -> Callable[[str], str]:
    """A parser type: a name or path that the function does not refuse, with ~ expanded."""

    def parse(text: str) -> str:
        try:
            check(os.path.expanduser(text))
        except (ValueError, FileNotFoundError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return os.path.expanduser(text)

    return parse


def path_arg(text: str) -> Path:
    """A parser type: a path, with ~ expanded."""
    return Path(os.path.expanduser(text))


backbone_arg = name_or_path(clip.validate_name)
dataset_arg = name_or_path(get_dataset_info)


def logit_scale_arg(text: str) -> float | str:
    """A parser type: a positive number, or "checkpoint"."""
    return text if text == "checkpoint" else bounded_number(float, 0, exclusive="low")(text)
