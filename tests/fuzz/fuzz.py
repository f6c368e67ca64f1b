"""Hostile inputs for everything that reads something: each must end well, or in one sentence.

    python tests/fuzz/fuzz.py --inputs 10000 --seed 1
    python tests/fuzz/fuzz.py --seed 1 --only yaml --case 17   # one input again

A target makes one input from a random generator and gives it to the real entry point. That must
succeed, or refuse with one sentence, which on the command line comes with status 2. Everything
else is a finding: a traceback, a crash, a hang, a warning on standard error, a write outside of
the case's folder, a changed file beside it, an unpickled object, a program started.

Inputs run in forked workers, so that a crash or a hang costs one of them. All randomness of an
input comes from (seed, target, case).
"""

import argparse
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import delta  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from clip_helpers import TINY_VIT, random_state_dict  # noqa: E402
from dataset_helpers import LAYOUTS, make_dataset  # noqa: E402
from PIL import Image  # noqa: E402

import clip  # noqa: E402
import datasets.__main__ as doctor  # noqa: E402
import main  # noqa: E402
import run_utils  # noqa: E402
from datasets import build_dataset  # noqa: E402
from datasets.transforms import read_image  # noqa: E402
from optimizers.SparseOptimizer import SO  # noqa: E402
from runs import cli, output_dir  # noqa: E402

LIMIT = 20  # seconds for an input
BATCH = 200  # inputs of one worker
MEMORY = 4 << 30  # bytes that a worker may take on top of what it starts with
SENTENCE = 4000  # characters of the longest
# What may stand on standard error beside the sentence: progress and notes.
ASIDES = re.compile(
    r"note: |.*; using a split made from the raw data|[\w/ -]+: \d+(/\d+)? \w+, [\d.]+ \w+/s"
    r"|\w*(LZW|ZIP|Fax\d|JPEG|PackBits|TIFF)\w*: |tempfile\.tif: "  # libtiff's
)
SUCCESS, REFUSED = "success", "refused"


class Finding(Exception):
    """What an input must not do."""


class Room:
    """Where one input lives: `here`, its own folder and the working directory, and `shared`."""

    def __init__(self, shared: Path) -> None:
        self.shared, self.here, self.data = shared, shared.parent / "case", shared / "data"

    def file(self, name: str, data: bytes) -> Path:
        """Write an input file."""
        (self.here / name).write_bytes(data)
        return self.here / name


def sentence(text: str) -> str:
    """Check that a text is one sentence."""
    good = text.isprintable() and "Traceback" not in text and 3 <= len(text.split())
    if not good or len(text) > SENTENCE:
        raise Finding(f"not one sentence of printable letters: {text[:1000]!r}")
    return REFUSED


def refusable(call: Callable[[], Any], *kinds: type[Exception]) -> tuple[str, Any]:
    """Call a function: what came of it, and what it returned. Its errors must have a sentence."""
    try:
        return SUCCESS, call()
    except (ValueError, FileNotFoundError, *kinds) as error:
        return sentence(str(error)), None


def ended(status: Any, said: str, good: tuple[int, ...] = (0,)) -> str:
    """Check a command's status and what it left on standard error."""
    lines = [x for x in said.split("\n") if x and not ASIDES.match(x)]
    succeeded = status in (*good, None)
    if len(lines) != (0 if succeeded else 1) or not (succeeded or status == 2):
        raise Finding(f"status {status!r} and standard error {said[:3000]!r}")
    return SUCCESS if succeeded else sentence(lines[0])


def command(call: Callable[[], Any], good: tuple[int, ...] = (0,)) -> str:
    """Run a command's main function; see `ended`."""
    hush()
    try:
        status = call()
    except SystemExit as end:
        status = end.code
    return ended(status, captured(), good)


def run_main(argv: list) -> str:
    """Run main.py in this process."""
    argv = [str(arg) for arg in argv]
    return command(lambda: cli.run_cli(lambda: main.main(argv)))


def hush() -> None:
    """Forget what came on standard output and standard error."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)


def captured() -> str:
    """What came on standard error since the case began."""
    sys.stderr.flush()
    os.lseek(2, 0, os.SEEK_SET)
    with open(os.dup(2), "rb") as file:
        return file.read().decode(errors="replace")


def spoil(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, splice or overwrite bytes, often near an end, where headers lie."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        size = len(data)
        near = rng.randrange(min(size, rng.choice((16, 256, 4096))) + 1)
        at = rng.choice((near, size - near, rng.randrange(size + 1)))
        length = min(size - at, rng.choice((1, 4, 64, 65536)))
        other = rng.randrange(size + 1)
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + 1])
        fill = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        new = rng.choice((flipped, flipped, fill, data[other : other + length]))
        data = data[:at] + new + data[rng.choice((at + len(new), at + length, at, size)) :]
    return data


NUMBERS = [0, 1, -1, 2, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308]
NUMBERS += [float("nan"), float("inf"), -float("inf"), True, False]
TEXTS = [
    "", " ", "-", "--", "..", "../../outside.jpg", "/etc/passwd", "a/../../b", "~", "~nosuchuser/x",
    "\0", "a\nb", "\x1b[31m", "\ud800", "\udcff", "é", "日本語", "\u202e", "{}", "{0.x}", "%s",
    "$(touch pwned)", "`id`", "'", '"', "a" * 300, "a/" * 600, "nul", "true", "1", "C:\\x",
]  # fmt: skip
DEEP = "?deep?"  # what `as_json` replaces by brackets within brackets


def value(rng: random.Random, depth: int = 0) -> Any:
    """Some JSON value."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return text(rng)
    if kind == 4:
        return rng.choice((None, DEEP))
    size = rng.choice((0, 1, 3))
    if kind < 7:
        return [value(rng, depth + 1) for _ in range(size)]
    return {text(rng): value(rng, depth + 1) for _ in range(size)}


def text(rng: random.Random) -> str:
    """Some text, likely a hostile one."""
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    ranges = ((32, 127), (0, 32), (0xA0, 0x250), (0x300, 0x370), (0x3040, 0x30FF), (0xD800, 0xE000))
    low, high = rng.choice((*ranges, (0x1F300, 0x1F700), (0, 0x110000)))
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.choice((1, 5, 40))))


STATES: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t + 1000, lambda t: t - 1000, lambda t: t[:-1], lambda t: t[None], lambda t: t.long(),
    lambda t: t.double(), lambda t: torch.zeros_like(t), lambda t: t * float("nan"), lambda t: t[0],
    lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: None, lambda t: t.tolist(),
]  # fmt: skip


def spoil_state(rng: random.Random, state: Any) -> Any:
    """Replace, drop or change something at a random depth of JSON or of a state dict."""
    if isinstance(state, torch.Tensor):
        return rng.choice(STATES)(state if state.dim() else state[None])
    if not isinstance(state, (dict, list)) or not state or rng.random() < 0.05:
        new = value(rng)  # larger numbers torch itself refuses
        return 0 if isinstance(new, (int, float)) and abs(new) > 2**62 else new
    state = state.copy()
    key = rng.choice(list(state)) if isinstance(state, dict) else rng.randrange(len(state))
    new = spoil_state(rng, state.pop(key))
    if rng.random() < 0.8:
        state.insert(key, new) if isinstance(state, list) else state.update({key: new})
    return state


def as_json(rng: random.Random, data: Any) -> bytes:
    """JSON, which may be too deep, in another encoding, or spoilt again."""
    depth = rng.choice((200, rng.randrange(900, 1000), 100_000))
    written = json.dumps(data).replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    encoded = written.encode(rng.choice(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-32"]))
    return spoil(rng, encoded) if rng.random() < 0.2 else encoded


def options(room: Room) -> list[str]:
    """A short run."""
    argv = ["--n_iters", "1", "--shots", "1", "--num_workers", "0", "--threads", "1"]
    argv += ["--dataset", "digits", "--backbone", "ViT-Tiny/8"]
    return [*argv, "--root_path", str(room.data), "--save_path", "out"]


GOOD = {  # values that a flag may well have; those that would take long are not among them
    "dataset": ["digits", "digits", "digits", "eurosat", "imagenet"],
    "backbone": ["ViT-Tiny/8", "ViT-Tiny/8", "RN50", "~nosuchuser/x", "."], "shots": ["1", "2"],
    "seed": ["0", "7", str(2**32), str(2**64 - 1)], "n_iters": ["1", "2"], "rank": ["1", "3"],
    "device": ["cpu", "cpu", "cpu:0", "cpu:3", "cuda", "cuda:7", "meta", "mps", "hpu", "xla"],
    "threads": ["1"], "num_workers": ["0", "1", "2"], "encoder": ["text", "vision"],
    "position": ["top", "bottom", "half-up"], "method": ["so", "lora", "adam"],
    "precision": ["bf16", "fp16"], "s": ["0", "0.5", "0.999999"], "final_model": ["last_step", "best_val"],  # noqa: E501
    "early_stop_loss": ["-1", "99"], "eval_split": ["val"],
    "subsample": ["base", "new"], "test_on": ["digits", "eurosat"],
}  # fmt: skip
WEIRD = ["=", "a=b", "1e-400", "0x10", "٣", "１", "1 ", "[1]", "{a: 1}", "9" * 5000]
WEIRD += [*map(str, NUMBERS), *(text for text in TEXTS if "\0" not in text)]
SLOW = dict.fromkeys(("n_iters", "shots", "batch_size", "rank", "num_workers"), ("1000000",))
SLOW |= {"threads": ("2", "7", "٣")}  # on busy cores more than one is many times slower


def flags(rng: random.Random, room: Room) -> str:
    """A command line."""
    argv = options(room)
    actions = run_utils.get_parser()._actions
    for _ in range(rng.randint(1, 6)):
        action = rng.choice(actions)
        option = rng.choice(action.option_strings)
        if action.dest == "compile":
            option = "--no-compile"
        count = {None: 1, "+": 2}.get(action.nargs, action.nargs)
        count = rng.choice((0, 1, 3)) if rng.random() < 0.05 else count
        weird = [word for word in WEIRD if word not in SLOW.get(action.dest, ())]
        usual = GOOD.get(action.dest, ["1", "0.5", "2"])
        given = [rng.choice(usual if rng.random() < 0.6 else weird) for _ in range(count)]
        argv += [f"{option}={given[0]}"] if given and rng.random() < 0.3 else [option, *given]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv)), rng.choice((*WEIRD, "--datset", "--", "-h")))
    if rng.random() < 0.2:
        shutil.copytree(room.shared / "finished", room.here / "out")
    return run_main(argv)


SCALARS = [
    "1", "-1", "1e-3", "1e400", "0o777", "1:30:00", ".nan", ".inf", "~", "true", "off", "'1'", "''",
    "[1, 2]", "[0.5, 1]", "[[1]]", "{a: 1}", "2001-01-01", "2001-99-99", "!!binary aGk=", "!!int x",
    "!!float x", "!!bool x", "!!set {a}", "!!python/object/apply:os.system ['touch pwned']", "!foo",
    "&a [*a]", "&a {x: *a}", "*nope", "|\n  text\n  more", "\"\\0\"", "\"\\ud800\"", "- 1", "@",
    "\"\\e[31m\"", "\"a\\nb\"", "? x", "\t1", "é", "so", "lora", "digits", "9" * 5000, "[" * 3000,
]  # fmt: skip


def document(rng: random.Random) -> bytes:
    """A YAML file."""
    keys = [action.dest for action in run_utils.get_parser()._actions]
    kind = rng.randrange(5)
    if kind < 2:
        lines = [f"{rng.choice(keys)}: {rng.choice(SCALARS)}" for _ in range(rng.randint(1, 4))]
        return "\n".join(lines).encode()
    if kind == 2:
        data = {rng.choice(keys): value(rng) for _ in range(rng.randint(1, 4))}
        return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    if kind == 3:
        return as_json(rng, {rng.choice(keys): value(rng)})
    return spoil(rng, rng.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_bytes())


def settings(rng: random.Random, room: Room) -> str:
    """A file of settings."""
    file = room.file("my settings.yaml", document(rng))
    argv = ["--config", file, *options(room), "--no-compile", "--rank", 2, "--batch_size", 9]
    return run_main(argv)


def dataset(rng: random.Random, room: Room, name: str, root: Path) -> str:
    """Read a dataset: by its function, or by the doctor."""
    if rng.random() < 0.3:
        argv = ["--root_path", str(root), "--dataset", name, *["--decode"] * rng.randrange(2)]
        return command(lambda: doctor.main(argv), good=(0, 1))
    hush()
    outcome, found = refusable(lambda: build_dataset(name, root, rng.choice((1, 3))))
    for item in (*found.train_x, *found.val, *found.test) if found else ():
        if item.label < 0 or found.classnames[item.label] != item.classname:
            raise Finding(f"label {item.label} is not {item.classname!r}")
    ended(0, captured())
    return outcome


def split(rng: random.Random, room: Room) -> str:
    """A split file."""
    folder = room.here / "root" / "eurosat"
    folder.mkdir(parents=True)
    (folder / "2750").symlink_to(room.data / "eurosat" / "2750")
    data = json.loads((room.data / "eurosat" / "split_zhou_EuroSAT.json").read_bytes())
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = spoil_state(rng, data)
    kind = rng.choice(("zhou", "zhou", "so"))
    (folder / f"split_{kind}_EuroSAT.json").write_bytes(as_json(rng, data))
    return dataset(rng, room, "eurosat", room.here / "root")


def vandalise(rng: random.Random, root: Path, times: int) -> None:
    """Do something to files and folders below the root."""
    for _ in range(times):
        path, how = rng.choice(sorted(root.rglob("*")) or [root / "x"]), rng.randrange(8)
        data = path.read_bytes() if path.is_file() else b""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if how < 2:
            path.write_bytes(spoil(rng, data) if how else rng.randbytes(99))
        elif how == 2:
            path.mkdir()
        elif how == 3:
            path.symlink_to(rng.choice((path, "/", "..", "/dev/zero", "nowhere")))
        elif how == 4:
            os.mkfifo(path)
        elif how == 5:
            path.with_name(rng.choice(("a b.jpg", "é.jpg", "a\nb.jpg", ".hidden.jpg"))).touch()


def tree(rng: random.Random, room: Room) -> str:
    """A dataset's folder."""
    name, root = rng.choice(list(LAYOUTS)), room.here / "root"
    classes = 10 if name == "digits" else rng.choice((2, 3))
    make_dataset(name, root, rng.choice(("coop", "lora")), rng.random() < 0.3, classes, 4)
    vandalise(rng, root, rng.choice((1, 1, 2, 4)))
    return dataset(rng, room, name, root)


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX", "EPS", "PDF"]


def picture(rng: random.Random) -> bytes:
    """An image file, whole or spoilt."""
    side = rng.choice((1, 2, 9, 65)), rng.choice((1, 8, 40))
    image = Image.frombytes("RGB", side, rng.randbytes(3 * side[0] * side[1]))
    mode = rng.choice(MODES)
    image = image.convert("L").convert(mode) if mode in ("I;16", "I", "F") else image.convert(mode)
    file = io.BytesIO()
    try:
        image.save(file, rng.choice(FORMATS))
    except Exception:  # a format that has no such mode
        image.convert("RGB").save(file, rng.choice(("PNG", "JPEG", "TIFF", "GIF", "WEBP")))
    return spoil(rng, file.getvalue()) if rng.random() < 0.8 else file.getvalue()


def images(rng: random.Random, room: Room) -> str:
    """An image."""
    path = room.file(f"an image.{rng.choice(('jpg', 'tif', 'txt', ''))}", picture(rng))
    hush()
    outcome, image = refusable(lambda: read_image(path))
    if image is not None and (image.mode != "RGB" or not image.width * image.height):
        raise Finding(f"{path} became {image}")
    ended(0, captured())
    return outcome


def checkpoints() -> dict[str, bytes]:
    """Good checkpoints by file name; small, with space for a prompt."""
    state = random_state_dict({**TINY_VIT, "context_length": 48})
    files = {name: io.BytesIO() for name in ("zip.pt", "old.pt", "nested.pth")}
    torch.save(state, files["zip.pt"])
    torch.save(state, files["old.pt"], _use_new_zipfile_serialization=False)
    halves = {f"module.{key}": tensor.half() for key, tensor in state.items()}
    torch.save({"state_dict": halves}, files["nested.pth"])
    good = {name: file.getvalue() for name, file in files.items()}
    good["tensors.safetensors"] = safetensors.torch.save(state)
    return good | {"shipped.pt": (clip.loading.WEIGHTS_DIR / "ViT-Tiny-8.pt").read_bytes()}


def rezip(rng: random.Random, data: bytes) -> bytes:
    """A zip file of which one entry is spoilt, with right checksums, and all may be compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        new.compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        names = old.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        chosen = rng.choice(pickles if rng.random() < 0.8 else names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                name = rng.choice((name, name, name, "../" + name, name.upper()))
                content = spoil(rng, content)
            new.writestr(name, content)
    return file.getvalue()


def backbone(rng: random.Random, room: Room) -> str:
    """A checkpoint of a CLIP."""
    name, data = rng.choice(list(GOOD_FILES.items()))
    data = (rezip if data[:2] == b"PK" and rng.random() < 0.5 else spoil)(rng, data)
    path = room.file(rng.choice((name, name, "a.safetensors", "b.pt")), data)
    if rng.random() < 0.1:
        return run_main([*options(room), "--backbone", path])
    hush()
    outcome, _ = refusable(lambda: clip.load(path, "cpu"))
    ended(0, captured())
    return outcome


def weights(rng: random.Random, room: Room) -> str:
    """Saved weights: for --eval_only, or for scripts/delta.py."""
    shutil.copytree(room.shared / "finished", room.here / "out")
    (path,) = (room.here / "out").rglob("*.safetensors")
    path.write_bytes(spoil(rng, path.read_bytes()))
    if rng.random() < 0.3:
        return run_main([*options(room), "--eval_only"])
    argv = rng.choice((["inspect", str(path)], ["apply", str(path), "--out", "full.pt"]))
    return command(lambda: delta.main(argv))


def resumed(rng: random.Random, room: Room) -> str:
    """An interrupted run's checkpoint."""
    shutil.copytree(room.shared / "halted", room.here / "out")
    (path,) = (room.here / "out").rglob("checkpoint.pt")
    path.write_bytes(rng.choice((spoil, rezip))(rng, path.read_bytes()))
    return run_main([*options(room), *HALTED])


HALTED = ["--n_iters", "3", "--checkpoint_every", "1", "--resume"]


def prompts(rng: random.Random, room: Room) -> str:
    """Texts to tokenize."""
    tokens = clip.SimpleTokenizer.for_vocabulary(rng.choice((514, 49408)))
    texts = [text(rng) * rng.choice((1, 1, 1, 50)) for _ in range(rng.choice((1, 1, 3)))]
    texts = rng.choice((texts, texts, texts[0], value(rng)))
    length, cut = rng.choice((77, 77, 77, 2, 1, 0, -1)), rng.random() < 0.5
    outcome, rows = refusable(lambda: tokens(texts, length, cut))
    for row in rows.tolist() if rows is not None else ():
        if len(row) != length or row[0] != tokens.start or tokens.end not in row:
            raise Finding(f"{texts!r} became {row}")
        tokens.decode(row)
    return outcome


def reports(rng: random.Random, room: Room) -> str:
    """A folder of results."""
    (finished,) = (room.shared / "finished").rglob("result.json")
    for number in range(rng.choice((1, 2, 4))):
        result = json.loads(finished.read_bytes()) | {"seed": number}
        folder = room.here / "results" / rng.choice(("so", "é x")) / f"seed{number}"
        folder.mkdir(parents=True)
        for name in ("curve.csv", "config.yaml"):
            data = (finished.parent / name).read_bytes()
            (folder / name).write_bytes(spoil(rng, data) if rng.random() < 0.3 else data)
        for _ in range(rng.choice((0, 1, 1, 3))):
            result = spoil_state(rng, result)
        (folder / "result.json").write_bytes(as_json(rng, result))
    vandalise(rng, room.here / "results", rng.choice((0, 0, 0, 1, 3)))
    hush()
    try:
        status = report.main(["results", "--out", "my report"])
    except SystemExit as end:
        status = end.code
    lines = captured().split("\n")[:-1]
    if not all(line.startswith("report.py: ") and sentence(line) for line in lines):
        raise Finding(f"status {status} and standard error {lines}")
    if status != (2 if lines and "error: " in lines[-1] else 0):
        raise Finding(f"status {status} after {lines}")
    return REFUSED if status else SUCCESS


def optimizer(rng: random.Random, room: Room) -> str:
    """A state of SO to continue from."""
    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16))
    tensors = [torch.randn(*shape, dtype=dtype) for shape in ((5, 4), (9, 2, 3))]
    tensors = list(map(torch.nn.Parameter, tensors))
    groups = [{"params": tensors[:1]}, {"params": tensors[1:], "dense": rng.choice((True, False))}]
    made = SO(groups, density_ratio=rng.choice((0.1, 1.0)), T=2, seed=rng.choice((None, 7)))

    def train(steps: int) -> None:
        for _ in range(steps):
            for p in tensors:
                grad = torch.randn_like(p)
                p.grad = rng.choice((grad, grad, grad.to_sparse(), None))
            made.step()

    train(rng.randrange(5))
    state = made.state_dict()
    for _ in range(rng.choice((0, 1, 1, 3))):
        state = spoil_state(rng, state)
    outcome, _ = refusable(lambda: (made.load_state_dict(state), train(3)), TypeError)
    ended(0, captured())
    return outcome


TARGETS: dict[str, tuple[Callable[[random.Random, Room], str], int]] = {  # and their shares
    "flags": (flags, 3), "yaml": (settings, 3), "split": (split, 3), "tree": (tree, 3),
    "image": (images, 4), "backbone": (backbone, 4), "weights": (weights, 3),
    "checkpoint": (resumed, 2), "prompt": (prompts, 2), "report": (reports, 2),
    "optimizer": (optimizer, 4),
}  # fmt: skip
CACHES = (".git", ".venv", "__pycache__", ".ruff_cache", ".pytest_cache")


def listing(folder: Path) -> dict[str, Any]:
    """Size and time of all files below a folder, and what results say; caches left out."""
    found = {}
    for path, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in CACHES]
        for name in files:
            there = os.path.join(path, name)
            stat = os.lstat(there)
            content = Path(there).read_bytes() if name == "result.json" else None
            found[there] = stat.st_size, stat.st_mtime_ns, content
    return found


# Which arguments of an audited event name what is written; and what may not happen at all.
WRITES = dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"), (0,))
WRITES |= {"os.utime": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,)}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
STARTS += ("pickle.find_class",)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(room: Room, faults: list[str]) -> None:
    """Note each write outside of the case's folder and each program started; allow no network."""
    cache = room.shared / "home/.cache/clip"  # where downloads go
    places = room.here, room.shared.parent / "tmp", cache, "/dev", "/proc"
    tops = tuple(f"{place}{os.sep}" for place in places)
    active = False

    def allowed(event: str, args: tuple) -> bool:
        if event in STARTS:
            return False
        paths = [args[i] for i in WRITES.get(event, ())]
        if event == "open" and isinstance(args[2], int) and args[2] & WRITE_FLAGS:
            paths = [args[0]]
        for path in paths:
            if isinstance(path, (str, bytes)):
                top, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                real = os.path.join(os.path.realpath(top), name)
                real = os.path.realpath(real) if event == "open" else real
                if not (real + os.sep).startswith(tops):
                    return False
        return True

    def hook(event: str, args: tuple) -> None:
        nonlocal active
        if active or room.idle:
            return
        if event.startswith("socket.") and event != "socket.__new__":
            raise OSError("the fuzzer has no network")
        active = True
        try:
            if not allowed(event, args):
                faults.append(f"{event} {args!r:.300}")
                if event not in STARTS:
                    raise PermissionError(13, "the fuzzer forbids this", str(args[0]))
        finally:
            active = False

    sys.addaudithook(hook)


def examine(room: Room, name: str, seed: int, case: int, faults: list[str]) -> tuple[str, str]:
    """Run one input: its outcome, and what is wrong with it."""
    hush()
    shutil.rmtree(room.here, ignore_errors=True)
    room.here.mkdir()
    os.chdir(room.here)
    rng = random.Random(f"{seed} {name} {case}")
    random.seed(case)
    np.random.seed(case)
    torch.manual_seed(case)
    torch.set_num_threads(1)
    before = listing(room.shared) | listing(ROOT)
    faults.clear()
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=room.crash)
    room.idle = False
    outcome, wrong = "finding", ""
    try:
        outcome = TARGETS[name][0](rng, room)
    except Finding as error:
        wrong = str(error)
    except BaseException:
        wrong = traceback.format_exc()
    room.idle = True
    faulthandler.cancel_dump_traceback_later()
    after = listing(room.shared) | listing(ROOT)
    changed = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    wrong = "\n".join(filter(None, (wrong, *faults, *(f"changed: {path}" for path in changed))))
    return ("finding" if wrong else outcome), wrong


def work(shared: Path, jobs: list[tuple[str, int]], seed: int, pipe: int, crash: Path) -> None:
    """A worker: run inputs, and write a line of JSON about each into the pipe."""
    room, faults = Room(shared), []
    room.idle, room.crash = True, open(crash, "w")
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(shared.parent / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    faulthandler.enable(room.crash)
    warnings.filterwarnings("always", append=True)
    # Not as a note, which is what main.py makes of them: here each one is a finding.
    warnings.filterwarnings("ignore", "SO keeps fewer than ten entries")
    # On two lines, which no note of main.py's has.
    warnings.showwarning = lambda message, *_, **__: print(f"warning\n{message}", file=sys.stderr)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    output_dir.get_git_sha = lambda: None
    guard(room, faults)
    with open(pipe, "w") as lines:
        for name, case in jobs:
            outcome, wrong = examine(room, name, seed, case, faults)
            print(json.dumps((outcome, wrong)), file=lines, flush=True)


def run(shared: Path, jobs: list[tuple[str, int]], seed: int) -> list[tuple[str, str]]:
    """Give inputs to a worker, a new one where it dies: the outcome of each."""
    results: list[tuple[str, str]] = []
    crash = shared.parent / "crash"
    while len(results) < len(jobs):
        rest = jobs[len(results) :]
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            try:
                work(shared, rest, seed, write, crash)
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as lines:
            done = [tuple(json.loads(line)) for line in lines]
        results += done
        _, status = os.waitpid(child, 0)
        if len(done) < len(rest):
            text = crash.read_text(errors="replace")
            results.append(("finding", f"the worker died, status {status}\n{text}"))
    return results


def prepare(workspace: Path) -> Path:
    """Make what inputs share: a home, two datasets, a finished run with its weights."""
    shared = workspace / "shared"
    for folder in (shared / "home", workspace / "tmp"):
        folder.mkdir(parents=True)
    os.environ.update(HOME=str(shared / "home"), TMPDIR=str(workspace / "tmp"), MPLBACKEND="Agg")
    os.environ["MPLCONFIGDIR"] = str(workspace / "tmp")
    for name in ("XDG_CACHE_HOME", "CLIP_BPE_PATH", "SO_TRACEBACK"):
        os.environ.pop(name, None)
    tempfile.tempdir = None
    make_dataset("digits", shared / "data", classes=10, per_class=4, size=(32, 32))
    make_dataset("eurosat", shared / "data", classes=3, per_class=8)
    make_dataset("digits", shared / "home/.cache/so", classes=10, per_class=4, size=(32, 32))
    GOOD_FILES.update(checkpoints())
    room = Room(shared)
    argv = [*options(room), "--save_path", str(shared / "finished")]
    with open(os.devnull, "w") as null, redirect_stdout(null):
        cli.run_cli(lambda: main.main(argv))
        write_result, output_dir.save_result = output_dir.save_result, None  # ends in a TypeError
        with suppress(TypeError):
            main.main([*options(room), *HALTED, "--save_path", str(shared / "halted")])
        output_dir.save_result = write_result
    clip.tokenize("a")  # reads the merges once
    import matplotlib.font_manager  # noqa: F401 # makes its list of fonts once
    import scipy.io  # noqa: F401
    import sklearn.datasets  # noqa: F401

    return shared


GOOD_FILES: dict[str, bytes] = {}


def command_line(argv: list[str] | None = None) -> int:
    """Run inputs, print what came of them; status 1 where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="number of inputs, all targets")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument("--only", choices=TARGETS, help="one target")
    parser.add_argument("--case", type=int, help="one input of --only's target")
    args = parser.parse_args(argv)
    names = [name for name in TARGETS if args.only in (None, name)]
    shares = {name: TARGETS[name][1] for name in names}
    counts = {name: -(-args.inputs * n // sum(shares.values())) for name, n in shares.items()}
    findings = 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="so-fuzz-", ignore_cleanup_errors=True) as workspace:
        shared = prepare(Path(workspace).resolve())
        print(f"{'target':12}{'inputs':>8}{'success':>9}{'refused':>9}{'findings':>9}")
        for name in names:
            cases = range(counts[name]) if args.case is None else [args.case]
            jobs = [(name, case) for case in cases]
            results = []
            for at in range(0, len(jobs), BATCH):
                results += run(shared, jobs[at : at + BATCH], args.seed)
            tally = [sum(kind == k for kind, _ in results) for k in (SUCCESS, REFUSED, "finding")]
            print(f"{name:12}{len(jobs):8}" + "".join(f"{n:9}" for n in tally), flush=True)
            for (_, case), (kind, wrong) in zip(jobs, results, strict=True):
                if kind == "finding":
                    findings += 1
                    again = f"tests/fuzz/fuzz.py --seed {args.seed} --only {name} --case {case}"
                    print(f"FINDING {again}\n{wrong}\n", flush=True)
    print(f"{findings} findings" if findings != 1 else "1 finding")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(command_line())
