"""What a run is told, and how it ends: flags and YAML, one sentence for an error.

A YAML file's entries are checked by the parser types of the flags, so both are checked alike.
"""

import argparse
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from datasets import DATASETS, find_spec
from flags import Parser, make_parser
from machine import HERE
from optimizers.methods import SUPPORTS
from processes import Left, may_complain
from utils import Interrupted, explain, nearest, one_line

EMBEDDED = {"dataset": "digits", "backbone": "ViT-Tiny/8"}  # what `python main.py` stands for
EMBEDDED_CONFIG = HERE / "configs" / "digits.yaml"
EMBEDDED_LR = {"so": 5e-3, "lora": 1e-2, "adam": 1e-4}  # chosen in docs/digits/rates/table.md


class Config(argparse.Namespace):
    """A resolved configuration: one attribute for each setting, named as its flag.

    `baseline` is what the settings would be without the command line's flags. It is kept beside
    the settings, not among them, so that `vars`, and with it no file, has it.
    """

    __slots__ = ("baseline",)

    def pick(self, *names: str) -> dict[str, Any]:
        """Some of the settings, by name."""
        return {name: getattr(self, name) for name in names}


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Resolve the configuration: flags win over the YAML file, which wins over the defaults.

    Where flags name neither data, nor a backbone, nor a file of their own, the task is the
    embedded one (EMBEDDED) with the settings of configs/digits.yaml.

    Args:
        argv: The arguments; those of the process when None.

    Raises:
        SystemExit: With status 2, after one sentence, where something cannot be understood.
    """
    parser = make_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    given = given_flags(parser, list(actions), argv)
    named = given.get("config")
    task = {"dataset": given.get("dataset"), "backbone": given.get("backbone")}
    if task["dataset"] is None and named is None and "root_path" in given:
        task["dataset"] = "dtd"
    embedded = all(task[key] in (None, value) for key, value in EMBEDDED.items())
    embedded &= named is None or Path(named).resolve() == EMBEDDED_CONFIG
    file = str(EMBEDDED_CONFIG) if embedded and named is None else named

    baseline = default_settings()
    baseline |= read_settings(parser, actions, Path(file)) if file else {}
    if embedded:
        baseline["lr"] = EMBEDDED_LR[given.get("method", baseline["method"])]
    config = Config(**baseline | given)
    config.config, config.baseline = file, baseline | {"config": None if named else file}
    if "save_path" in given and "save_weights" not in given:
        config.save_weights = True
    if config.dataset is None and config.root_path is not None:
        config.dataset = "dtd"
    check_together(parser, config)
    return config


def default_settings() -> dict[str, Any]:
    """All settings as they are where neither a flag nor a file says otherwise."""
    return {a.dest: a.default for a in make_parser()._actions if a.dest != "help"}


def given_flags(parser: Parser, names: Sequence[str], argv: Sequence[str] | None) -> dict[str, Any]:
    """The settings that a command line names, and their values."""
    nothing = argparse.Namespace(**dict.fromkeys(names))  # in place of the parser's defaults
    values, unknown = parser.parse_known_args(argv, nothing)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        hint = nearest(unknown[0].split("=")[0], flags)
        parser.error(f"unknown argument {unknown[0]!r}{hint}; --help lists all")
    for key, value in vars(values).items():
        if value == []:  # argparse of Python 3.11 and older takes "--" out of --key=--
            parser.error(f"argument --{key}: expected a value")
    return {key: value for key, value in vars(values).items() if value is not None}


def check_together(parser: Parser, config: Config) -> None:
    """Refuse settings of which each is possible, but not all together."""
    if config.dataset is None:
        parser.error(f"name a task with --dataset; valid: {', '.join(DATASETS)}")
    if find_spec(config.dataset).test_only and not config.eval_only:
        if config.n_iters not in (0, config.baseline["n_iters"]):
            parser.error(
                f"{config.dataset} is for testing alone: train on imagenet and give --test_on "
                f"{config.dataset}, or --n_iters 0 for its zero-shot accuracy"
            )
        config.n_iters = 0
    if config.select == "val" and not config.eval_every:
        parser.error("argument --select: val needs --eval_every N, iterations between two looks")
    if config.method != "so":
        for key, usual in SUPPORTS.items():
            if getattr(config, key) != usual:
                parser.error(f"argument --{key}: belongs to --method so, not to {config.method}")
    for key in ("crop_scale", "crop_ratio"):
        if getattr(config, key)[0] > getattr(config, key)[1]:
            parser.error(f"argument --{key}: MIN is above MAX: {getattr(config, key)}")
    if not config.filename or Path(config.filename).name != config.filename:
        parser.error(
            f"argument --filename: must be a name without folders, not {config.filename!r}"
        )


class PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, of which few lines can make more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which no setting needs")
        return super().compose_node(parent, index)


def read_settings(
    parser: Parser, actions: Mapping[str, argparse.Action], path: Path
) -> dict[str, Any]:
    """The settings in a YAML file, checked as those of the command line are.

    Raises:
        SystemExit: With status 2, after one sentence that names the file.
    """
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
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
            hint = nearest(str(key), valid)
            parser.error(f"{path}: unknown key {key!r}{hint}; valid: {', '.join(valid)}")
        if value is None:
            continue
        try:
            settings[key] = as_setting(actions[key], value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            parser.error(f"{path}: key {key!r}: {error}")
    return settings


def as_setting(action: argparse.Action, value: Any) -> Any:
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


# Endings


def exit_status(main: Callable[[], None]) -> int:
    """Run main; turn what the user can mend into one sentence and status 2.

    The environment variable SO_TRACEBACK brings the traceback back.
    """
    # Pillow's complaints about an image's metadata do not matter here.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.formatwarning = lambda message, *_, **__: one_line(f"note: {message}") + "\n"
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that it lacks
    try:
        main()
        return 0
    except (KeyboardInterrupt, Interrupted) as stop:
        number, kept = getattr(stop, "number", signal.SIGINT), getattr(stop, "kept", "")
        cause = signal.Signals(number).name
        if lost := isinstance(stop, Left):
            if os.environ.get("SO_TRACEBACK"):
                raise
            cause = "the loss of another process"
        if may_complain(together=True):
            print(f"\nmain.py: ended by {cause}{kept and f'; {kept}'}", file=sys.stderr)
        return 2 if lost else 128 + number
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        full = full or "can't allocate memory" in str(error)  # torch's, on a CPU
        if os.environ.get("SO_TRACEBACK") or (isinstance(error, RuntimeError) and not full):
            raise
        sentence = explain(error)
        if full:
            reason = sentence.partition("\n")[0] or "out of memory"
            sentence = f"{reason}: lower --batch_size, or use --accumulate or --precision bf16"
        if may_complain():
            print(one_line(f"main.py: error: {sentence}"), file=sys.stderr)
        return 2
