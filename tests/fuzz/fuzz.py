"""Random inputs for what is read: each must succeed, or be refused in one sentence.

    python tests/fuzz/fuzz.py --inputs 10000 --seed 1
    python tests/fuzz/fuzz.py --seed 1 --only yaml --case 17    # one input again

A target writes an input and returns the call that reads it: a command, which refuses with status 2,
or a function, which refuses with a ValueError or FileNotFoundError. Findings are other exceptions
and messages, and more than LIMIT seconds of processor time. A crash ends the fuzzer; a terminal
shows the input.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from clip_helpers import TINY_VIT, random_state_dict  # noqa: E402
from commands import call  # noqa: E402
from dataset_helpers import make_dataset  # noqa: E402
from PIL import Image  # noqa: E402

import clip  # noqa: E402
import main  # noqa: E402
from datasets import build_dataset  # noqa: E402
from datasets.transforms import read_image  # noqa: E402
from run_utils import get_parser  # noqa: E402
from runs import cli  # noqa: E402

LIMIT = 20  # seconds of processor time for an input
NOTE = re.compile(
    r"note: |.*; using a split made from the raw data|.*\d\w*/s(, .*)?$"
)  # or progress
Read = Callable[[], Any]  # reads an input; a command returns its status

# Random values

NUMBERS = [0, 1, -1, 2, 7, 10**6, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, True]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "", " ", "-", "--", "..", "../../outside.jpg", "/etc/passwd", "a/../b", "~nosuchuser/x", "\0",
    "a\nb", "\x1b[31m", "\ud800", "日本語", "{}", "{0.x}", "%s", "$(touch pwned)", "'", "a" * 300,
    "a/" * 600, "true", "1", "C:\\x",
]  # fmt: skip


def corrupt(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, insert or cut bytes, often near an end, where headers are."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        near = rng.randrange(min(len(data), rng.choice((16, 256, 4096))) + 1)
        start = rng.choice((near, len(data) - near, rng.randrange(len(data) + 1)))
        length = rng.choice((1, 4, 64, 65536))
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start : start + 1])
        new = rng.choice((flipped, flipped, bytes(length), b"\xff" * length, rng.randbytes(length)))
        data = data[:start] + new + data[rng.choice((start + len(new), start, len(data))) :]
    return data


def corrupt_state(rng: random.Random, state: Any) -> Any:
    """Replace, drop or change something at a random depth of JSON."""
    if not isinstance(state, (dict, list)) or not state or rng.random() < 0.05:
        return rng.choice((None, [], {}, [1, 2], {"a": 1}, *TEXTS, *NUMBERS))
    state = state.copy()
    key = rng.choice(list(state)) if isinstance(state, dict) else rng.randrange(len(state))
    new = corrupt_state(rng, state.pop(key))
    if rng.random() < 0.8:
        state.insert(key, new) if isinstance(state, list) else state.update({key: new})
    return state


def corrupt_zip(rng: random.Random, data: bytes) -> bytes:
    """Corrupt an entry of a zip file, most often its pickle; the checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        pickles = [name for name in old.namelist() if name.endswith(".pkl")]
        chosen = rng.choice(pickles if rng.random() < 0.8 else old.namelist())
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, corrupt(rng, content) if name == chosen else content)
    return file.getvalue()


# Targets, called in the input's folder

SHARED = Path("../shared")  # what all inputs share


def run_main(*flags: Any) -> Read:
    """A short run of main.py in the input's folder, with these flags, too."""
    argv = ["--dataset", "digits", "--root_path", SHARED / "data", "--backbone", "ViT-Tiny/8"]
    argv += ["--n_iters", 2, "--shots", 1, "--num_workers", 0, "--threads", 1, "--save_path", "out"]
    argv = [str(arg) for arg in (*argv, *flags)]
    return lambda: cli.run_cli(lambda: main.main(argv))


WORDS = {  # values that are no numbers, by flag
    "dataset": ["digits", "eurosat", "imagenet"], "backbone": ["ViT-Tiny/8", "RN50", "."],
    "device": ["cpu", "cpu:3", "cuda", "cuda:7", "meta"], "encoder": ["text", "vision"],
    "position": ["top", "bottom"], "method": ["so", "lora", "adam"], "subsample": ["base", "new"],
    "precision": ["bf16", "fp16"], "eval_split": ["val"], "final_model": ["last_step", "best_val"],
}  # fmt: skip
ODD = ["=", "a=b", "1e-400", "0x10", "٣", "1 ", "[1]", "{a: 1}", "9" * 5000, "-h", "--datset"]
ODD += [*map(str, NUMBERS), *(text for text in TEXTS if text not in ("\0", "\ud800"))]
SLOW = dict.fromkeys(("n_iters", "shots", "batch_size", "rank", "num_workers"), ("1000000",))
SLOW |= {"threads": ("2", "7", "٣")}  # more threads than free cores are many times slower


def flags(rng: random.Random) -> Read:
    """A command line."""
    argv = []
    actions = [action for action in get_parser()._actions if action.dest != "save_path"]
    for _ in range(rng.randint(1, 6)):
        action = rng.choice(actions)
        usual = WORDS.get(action.dest, ["1", "0.5", "2"])
        words = [*ODD, *usual * len(ODD)]
        words = [word for word in words if word not in SLOW.get(action.dest, ())]
        count = {None: 1, "+": 2}.get(action.nargs, action.nargs)
        argv += [rng.choice(action.option_strings), *rng.choices(words, k=count)]
    return run_main(*argv)


SCALARS = [
    "1", "-1", "1e-3", "1e400", "0o777", "1:30:00", ".nan", "~", "true", "'1'", "[0.5, 1]", "@",
    "{a: 1}", "&a [*a]", "2001-99-99", "!!int x", "!!python/object/apply:os.system ['touch x']",
    "|\n  two\n  lines", '"\\0"', '"\\ud800"', "- 1", "*no", "\t1", "é", "so", "9" * 5000,
]  # fmt: skip


def yaml_file(rng: random.Random) -> Read:
    """A configuration file."""
    keys = [action.dest for action in get_parser()._actions]
    lines = [f"{rng.choice(keys)}: {rng.choice(SCALARS)}" for _ in range(rng.randint(1, 4))]
    good = rng.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_bytes()
    data = "\n".join(lines).encode() if rng.random() < 0.6 else corrupt(rng, good)
    Path("my.yaml").write_bytes(data)
    return run_main("--config", "my.yaml", "--rank", 2, "--batch_size", 9)


def split_file(rng: random.Random) -> Read:
    """A split file of EuroSAT."""
    folder = Path("eurosat")
    folder.mkdir()
    (folder / "2750").symlink_to(Path("..", SHARED, "data/eurosat/2750"))
    data = json.loads((SHARED / "data/eurosat/split_zhou_EuroSAT.json").read_bytes())
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = corrupt_state(rng, data)
    written = json.dumps(data).encode(rng.choice(["utf-8"] * 20 + ["utf-8-sig", "utf-16"]))
    name = f"split_{rng.choice(('zhou', 'zhou', 'so'))}_EuroSAT.json"
    (folder / name).write_bytes(corrupt(rng, written) if rng.random() < 0.2 else written)
    return lambda: build_dataset("eurosat", ".", 1)


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "EPS"]


def image(rng: random.Random) -> Read:
    """An image."""
    width, height, file = rng.choice((1, 2, 9, 65)), rng.choice((1, 8, 40)), io.BytesIO()
    picture = Image.frombytes("L", (width, height), rng.randbytes(width * height))
    try:
        picture.convert(rng.choice(MODES)).save(file, rng.choice(FORMATS))
    except Exception:  # there is no such conversion, or the format has no such mode
        picture.save(file, "PNG")
    path = Path(f"an image.{rng.choice(('jpg', 'tif', 'txt', ''))}")
    path.write_bytes(corrupt(rng, file.getvalue()) if rng.random() < 0.8 else file.getvalue())
    return lambda: read_image(path)


def backbone(rng: random.Random) -> Read:
    """A checkpoint of a CLIP."""
    good = rng.choice(sorted((SHARED / "checkpoints").iterdir()))
    data = good.read_bytes()
    data = (corrupt_zip if data[:2] == b"PK" and rng.random() < 0.5 else corrupt)(rng, data)
    path = Path(rng.choice((good.name, good.name, "a.safetensors", "b.pt")))
    path.write_bytes(data)
    return run_main("--backbone", path) if rng.random() < 0.1 else lambda: clip.load(path, "cpu")


TARGETS: dict[str, Callable[[random.Random], Read]] = {
    "flags": flags, "yaml": yaml_file, "split": split_file, "image": image, "backbone": backbone,
}  # fmt: skip


def examine(target: str, seed: int, case: int) -> tuple[str, str]:
    """Read an input: the outcome (success, refused or finding), and what is wrong."""
    os.chdir("..")
    shutil.rmtree("input")
    os.mkdir("input")
    os.chdir("input")
    torch.manual_seed(case)
    read = TARGETS[target](random.Random(f"{seed} {target} {case}"))
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        status, _, err = call(lambda _: read())
    except (ValueError, FileNotFoundError) as error:
        status, err = 2, str(error)
    except BaseException:
        status, err = 1, traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    lines = [line for line in err.splitlines() if line and not NOTE.match(line)]
    sentence = len(lines) == 1 and lines[0].isprintable() and len(lines[0].split()) > 2
    refused = isinstance(status, int) and status != 0
    if not (status == 2 and sentence if refused else not lines):
        return "finding", f"status {status}: {err[-3000:]}"
    return ("refused" if refused else "success"), ""


def prepare(workspace: Path) -> None:
    """Make what inputs share: datasets and checkpoints."""
    for name in ("home", "input", "shared/checkpoints"):
        (workspace / name).mkdir(parents=True)
    os.chdir(workspace / "input")
    os.environ["HOME"] = f"{workspace}/home"
    make_dataset("digits", SHARED / "data", classes=10, per_class=4, size=(32, 32))
    make_dataset("eurosat", SHARED / "data", classes=3, per_class=8)
    state, folder = random_state_dict({**TINY_VIT, "context_length": 48}), SHARED / "checkpoints"
    torch.save(state, folder / "zip.pt")
    torch.save({"state_dict": state}, folder / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "tensors.safetensors")
    signal.signal(signal.SIGPROF, signal.default_int_handler)  # a Ctrl-C when time is up
    warnings.filterwarnings("ignore", "SO keeps fewer than ten entries")


def fuzz(argv: list[str] | None = None) -> int:
    """Run the command: read inputs, print the outcomes; the status is 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="number of inputs, all targets")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--case", type=int, help="one input of --only's target")
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(TARGETS)
    cases = range(-(-args.inputs // len(names))) if args.case is None else [args.case]
    findings = 0
    with tempfile.TemporaryDirectory(prefix="so-fuzz-") as workspace:
        prepare(Path(workspace).resolve())
        for name in names:
            outcomes: Counter[str] = Counter()
            for case in cases:
                if sys.stdout.isatty():
                    print(f"\r{name} {case} ", end="", flush=True)
                outcome, wrong = examine(name, args.seed, case)
                outcomes[outcome] += 1
                if wrong:
                    print(f"FINDING --seed {args.seed} --only {name} --case {case}\n{wrong}\n")
            print(f"{name}: {dict(outcomes)}", flush=True)
            findings += outcomes["finding"]
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(fuzz())
