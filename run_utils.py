"""What a run is told, and how it ends: flags and YAML, one sentence for an error.

A YAML file's entries are checked by the parser types of the flags, so both are checked alike.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

import clip
from datasets import DATASETS, SUBSAMPLES, get_dataset_info, validate_dataset_name
from optimizers.ablations import GRAD_SUPPORTS, MOMENT_SUPPORTS, MOMENTS
from optimizers.build import ABLATION_DEFAULTS, METHODS, POSITIONS
from runs.distributed import is_first_to_report_error
from runs.environment import REPO_ROOT, get_default_device
from utils import did_you_mean, one_line

MAX_INT = 10**18  # whole number that a setting may have
SPLIT_TITLES = {"test": "test", "val": "validation"}  # images that accuracies are measured on
DEMO = {"dataset": "digits", "backbone": "ViT-Tiny/8"}  # what `python main.py` stands for
DEMO_CONFIG = REPO_ROOT / "configs" / "digits.yaml"
DEMO_LR = {"so": 5e-3, "lora": 1e-2, "adam": 1e-4}  # chosen in docs/digits/rates/table.md


class OneLineErrorParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        sentence = one_line(f"{self.prog}: error: {message}") + "\n"
        self.exit(2, sentence if is_first_to_report_error() else None)


def one_of(kind: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A parser type: one of the valid names, or an error with the nearest and all of them."""

    def parse(name: str) -> str:
        if name in valid:
            return name
        raise argparse.ArgumentTypeError(
            f"unknown {kind} {name!r}{did_you_mean(name, valid)}; valid: {', '.join(valid)}"
        )

    return parse


def bounded_number(
    kind: type, low: float, high: float = math.inf, open_: str = ""
) -> Callable[[str], Any]:
    """A parser type: an int or float from low to high, bounds named in `open_` excluded.

    Whole numbers end at LARGEST: torch does not take far larger ones.
    """
    high = min(high, MAX_INT) if kind is int else high
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
        clip.validate_name(name)
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error).replace("unknown model", "unknown backbone")  # as the flag calls it
        raise argparse.ArgumentTypeError(sentence) from None
    return name


def dataset(name: str) -> str:
    """A parser type: a name of the table, or the path of images of one's own."""
    try:
        validate_dataset_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def logit_scale(text: str) -> float | str:
    """A parser type: a positive number, or "checkpoint"."""
    return text if text == "checkpoint" else bounded_number(float, 0, open_="low")(text)


# fmt: off
def get_parser() -> OneLineErrorParser:
    """All flags, with the defaults of the authors' command line."""
    parser = OneLineErrorParser(
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
    add("--fewshot_split", metavar="FILE.json",
        help="list of the training and validation images, instead of a draw: a run's fewshot.json")
    add("--subsample", type=one_of("subsample", SUBSAMPLES), default="all",
        help="classes of the task: all; base, the first half, tested on the new ones as well; or "
        "new, the other half")
    add("--shots", type=bounded_number(int, 1, 10**6), default=1, help="training images per class")
    add("--seed", type=bounded_number(int, 0), default=3,
        help="seed of the few shots and of everything random in the run")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", type=backbone, default="ViT-B/16",
        help="name of a CLIP, or path of a checkpoint")
    add("--activation", type=one_of("activation", ["quickgelu", "gelu"]),
        help="activation that the backbone's weights were trained with")
    add("--heads", type=bounded_number(int, 1, 1024), nargs=2, metavar=("VISION", "TEXT"),
        help="attention heads of the backbone's two towers")
    add("--encoder", type=one_of("encoder", ["text", "vision", "both"]), default="both",
        help="tower to adapt: text, vision or both")
    add("--position", type=one_of("position", list(POSITIONS)), default="all",
        help=f"layers to adapt: {', '.join(POSITIONS)}")
    add("--logit_scale", type=logit_scale, default=100.0,
        help="factor of cos(image, text), or `checkpoint` for the one that the weights carry")

    add = parser.add_argument_group("method").add_argument
    add("--method", type=one_of("method", METHODS), default="so",
        help="optimizer: so, adam on the same matrices, or lora on queries, keys and values")
    add("--s", "--sparsity", type=bounded_number(float, 0, 1, open_="high"), default=0.99995,
        help="sparsity kappa of so, the share of entries left out (its density is 1 - s)")
    add("--t", type=bounded_number(int, 1), default=5,
        help="T of so, iterations between two draws of the gradient support")
    add("--grad_support", type=one_of("support", GRAD_SUPPORTS), default=ABLATION_DEFAULTS["grad_support"],  # noqa: E501
        help="gradient support of so, for ablations: random, or by magnitude of the gradient")
    add("--moment_support", type=one_of("support", MOMENT_SUPPORTS),
        default=ABLATION_DEFAULTS["moment_support"],
        help="moment support of so, for ablations: by magnitude of the first moment, random, "
        "fixed, or reset to the gradient support at each draw")
    add("--moments", type=one_of("moments", MOMENTS), default=ABLATION_DEFAULTS["moments"],
        help="moments of so, for ablations: adam, per_entry (bias corrections by the steps since each "  # noqa: E501
        "entry was taken up), or none (signSGD)")
    add("--rank", type=bounded_number(int, 1), default=2, help="rank of lora's adapters")
    add("--wise", type=bounded_number(float, 0), default=1.0, metavar="ALPHA",
        help="factor of what was learned, in evaluations and saved weights: base + ALPHA * delta")

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=bounded_number(float, 0, open_="low"), default=2e-4,
        help="learning rate of the first iteration; a cosine takes it down to 1e-6")
    add("--n_iters", type=bounded_number(int, 0, 10**9), default=2000,
        help="iterations per shot; 0 measures the zero-shot accuracy alone")
    add("--early_stop_loss", type=bounded_number(float, -math.inf), default=0.01,
        help="stop after an epoch whose mean loss is below this; never, if negative")
    add("--batch_size", type=bounded_number(int, 1), default=32, help="images per iteration")
    add("--grad_accum_steps", type=bounded_number(int, 1), default=1,
        help="parts that each batch is split into and computed one after the other, to save memory")
    add("--crop_scale", type=bounded_number(float, 0, 1, open_="low"), nargs=2, default=[0.08, 1.0],
        metavar=("MIN", "MAX"), help="area of the random crop, as a share of the image")
    add("--crop_ratio", type=bounded_number(float, 0, open_="low"), nargs=2, default=[3 / 4, 4 / 3],
        metavar=("MIN", "MAX"), help="width / height of the random crop")
    add("--flip", **switch, default=True,
        help="mirror each training image with probability one half")
    add("--precision", type=one_of("precision", ["fp32", "bf16", "fp16"]), default="fp32",
        help="precision of the matrix products: fp32, bf16 or fp16; the weights stay in fp32")
    add("--class_batch_size", type=bounded_number(int, 0), default=0,
        help="classes whose prompts are encoded at once, to save memory at the cost of time; "
        "0 for all")
    add("--dense_grad", **switch, default=False,
        help="compute whole weight gradients, not only the entries that so reads")
    add("--compile", **switch, default=False,
        help="compile the towers with torch.compile; weight gradients are then computed whole")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=bounded_number(int, 0), default=0,
        help="iterations between two test accuracies in curve.csv; 0 for the last one alone")
    add("--eval_split", type=one_of("split", list(SPLIT_TITLES)), default="test",
        help="images that accuracies are measured on: test, or val for the few validation "
        "images, to choose settings by")
    add("--final_model", type=one_of("model", ["last_step", "best_val"]), default="last_step",
        help="weights to evaluate and save: those of the last step, or those with the best "
        "accuracy on the few validation images, measured every --eval_every iterations")

    add("--test_on", type=dataset, nargs="+", metavar="NAME",
        help="other datasets to test on when training has ended, or with a finished run's weights")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default=get_default_device(), help="device, such as cuda, cuda:1, mps or cpu")
    add("--num_workers", type=bounded_number(int, 0, 1024), default=min(8, cores),
        help="threads that prepare images")
    add("--threads", type=bounded_number(int, 1, 1024), help="threads that torch computes with on a CPU")  # noqa: E501
    add("--cache_mb", type=bounded_number(int, 0), default=2048, help="memory for decoded images, in MB")  # noqa: E501

    add = parser.add_argument_group("files").add_argument
    add("--config", help="YAML file of settings; flags win over it")
    add("--save_path", default="results",
        help="folder of all results; given, it implies --save_weights")
    add("--filename", default="weights", help="name of the weights file, without its suffix")
    add("--save_weights", **switch, default=False, help="keep the adapted matrices")
    add("--checkpoint_every", type=bounded_number(int, 0), default=500,
        help="iterations between two checkpoints; 0 for those on SIGINT and SIGTERM alone")
    add("--resume", **switch, default=False, help="go on from the checkpoint, if there is one")
    add("--overwrite", **switch, default=False,
        help="replace a result or checkpoint that is in the run's folder")
    add("--eval_only", **switch, default=False, help="evaluate saved weights, without training")
    return parser
# fmt: on


class Config(argparse.Namespace):
    """A resolved configuration: one attribute for each setting, named as its flag.

    `baseline` is what the settings would be without the command line's flags. It is kept beside
    the settings, not among them, so that `vars`, and with it no file, has it.
    """

    __slots__ = ("baseline",)

    def pick(self, *names: str) -> dict[str, Any]:
        """Some of the settings, by name."""
        return {name: getattr(self, name) for name in names}


def get_arguments(argv: Sequence[str] | None = None) -> Config:
    """Resolve the configuration: flags win over the YAML file, which wins over the defaults.

    Where flags name neither data, nor a backbone, nor a file of their own, the task is the
    embedded one (EMBEDDED) with the settings of configs/digits.yaml.

    Args:
        argv: The arguments; those of the process when None.

    Raises:
        SystemExit: With status 2, after one sentence, where something cannot be understood.
    """
    parser = get_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    given = explicit_args(parser, list(actions), argv)
    named = given.get("config")
    task = {"dataset": given.get("dataset"), "backbone": given.get("backbone")}
    if task["dataset"] is None and named is None and "root_path" in given:
        task["dataset"] = "dtd"
    embedded = all(task[key] in (None, value) for key, value in DEMO.items())
    embedded &= named is None or Path(named).resolve() == DEMO_CONFIG
    file = str(DEMO_CONFIG) if embedded and named is None else named

    baseline = default_settings()
    baseline |= load_yaml_config(parser, actions, Path(file)) if file else {}
    if embedded:
        baseline["lr"] = DEMO_LR[given.get("method", baseline["method"])]
    config = Config(**baseline | given)
    config.config, config.baseline = file, baseline | {"config": None if named else file}
    if "save_path" in given and "save_weights" not in given:
        config.save_weights = True
    if config.dataset is None and config.root_path is not None:
        config.dataset = "dtd"
    validate_args(parser, config)
    return config


def default_settings() -> dict[str, Any]:
    """All settings as they are where neither a flag nor a file says otherwise."""
    return {a.dest: a.default for a in get_parser()._actions if a.dest != "help"}


def explicit_args(
    parser: OneLineErrorParser, names: Sequence[str], argv: Sequence[str] | None
) -> dict[str, Any]:
    """The settings that a command line names, and their values."""
    nothing = argparse.Namespace(**dict.fromkeys(names))  # in place of the parser's defaults
    values, unknown = parser.parse_known_args(argv, nothing)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        hint = did_you_mean(unknown[0].split("=")[0], flags)
        parser.error(f"unknown argument {unknown[0]!r}{hint}; --help lists all")
    for key, value in vars(values).items():
        if value == []:  # argparse of Python 3.11 and older takes "--" out of --key=--
            parser.error(f"argument --{key}: expected a value")
    return {key: value for key, value in vars(values).items() if value is not None}


def validate_args(parser: OneLineErrorParser, config: Config) -> None:
    """Refuse settings of which each is possible, but not all together."""
    if config.dataset is None:
        parser.error(f"name a task with --dataset; valid: {', '.join(DATASETS)}")
    if get_dataset_info(config.dataset).test_only and not config.eval_only:
        if config.n_iters not in (0, config.baseline["n_iters"]):
            parser.error(
                f"{config.dataset} is for testing alone: train on imagenet and give --test_on "
                f"{config.dataset}, or --n_iters 0 for its zero-shot accuracy"
            )
        config.n_iters = 0
    if config.final_model == "best_val" and not config.eval_every:
        parser.error(
            "argument --final_model: best_val needs --eval_every N, iterations between two looks"
        )
    if config.method != "so":
        for key, usual in ABLATION_DEFAULTS.items():
            if getattr(config, key) != usual:
                parser.error(f"argument --{key}: belongs to --method so, not to {config.method}")
    for key in ("crop_scale", "crop_ratio"):
        if getattr(config, key)[0] > getattr(config, key)[1]:
            parser.error(f"argument --{key}: MIN is above MAX: {getattr(config, key)}")
    if not config.filename or Path(config.filename).name != config.filename:
        parser.error(
            f"argument --filename: must be a name without folders, not {config.filename!r}"
        )


class NoAliasSafeLoader(yaml.SafeLoader):
    """Reads YAML without aliases, of which few lines can make more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which no setting needs")
        return super().compose_node(parent, index)


def load_yaml_config(
    parser: OneLineErrorParser, actions: Mapping[str, argparse.Action], path: Path
) -> dict[str, Any]:
    """The settings in a YAML file, checked as those of the command line are.

    Raises:
        SystemExit: With status 2, after one sentence that names the file.
    """
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=NoAliasSafeLoader)
    except OSError as error:
        parser.error(f"argument --config: cannot read {path}: {error.strerror}")
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        parser.error(f"argument --config: {path} is not YAML: {error}")
    if not isinstance(entries, dict):
        parser.error(f"argument --config: {path} must hold lines of the form `key: value`")
    settings = {}
    valid = sorted(actions.keys() - {"config"})
    for key, value in entries.items():
        if key not in valid:
            hint = did_you_mean(str(key), valid)
            parser.error(f"{path}: unknown key {key!r}{hint}; valid: {', '.join(valid)}")
        if value is None:
            continue
        try:
            settings[key] = parse_yaml_value(actions[key], value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            parser.error(f"{path}: key {key!r}: {error}")
    return settings


def parse_yaml_value(action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file as the flag's own parser type has it.

    Raises:
        argparse.ArgumentTypeError, ValueError: It is of another kind, or out of range.
    """
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r}")
        return value
    parts = value if action.nargs and isinstance(value, list) else [value]
    if action.nargs == "+" and not parts:
        raise ValueError("must be a list of at least one value")
    if isinstance(action.nargs, int) and len(parts) != action.nargs:
        raise ValueError(f"must be a list of {action.nargs} values, not {value!r}")
    if any(isinstance(part, dict | list | bool) for part in parts):
        raise ValueError(f"cannot be {value!r}")
    parts = [(action.type or str)(str(part)) for part in parts]
    return parts if action.nargs else parts[0]
