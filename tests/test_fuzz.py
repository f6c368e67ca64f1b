"""Random inputs for what is read: each must succeed, or be refused in one sentence.

A target writes an input into the working folder and returns the call that reads it: a command,
which refuses with status 2, or a function, which refuses with a ValueError or FileNotFoundError.
FUZZ_CASES=1000 in the environment tries more inputs of each target.
"""

import io
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call_main
from dataset_helpers import make_dataset
from PIL import Image

import clip
from datasets.transforms import read_image
from run_utils import get_parser

CASES = int(os.environ.get("FUZZ_CASES", 20))  # inputs of each target
NOTE = re.compile(r"note: |.*\d\w*/s(, .*)?$")
ODD = [
    "", " ", "-", "--", "..", "../../outside.jpg", "/etc/passwd", "a/../b", "~nosuchuser/x", "a\nb",
    "\x1b[31m", "日本語", "{}", "{0.x}", "%s", "$(touch pwned)", "'", "a" * 300, "a/" * 600, "true",
    "C:\\x", "=", "a=b", "0x10", "٣", "[1]", "9" * 5000, "-h", "--datset", "0", "-1", "1000000",
    str(2**63), str(10**400), "-0.0", "1e308", "nan", "inf",
]  # fmt: skip


def corrupt(rng, data):
    """Flip, overwrite, insert or cut bytes, often near an end, where headers are."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        near = rng.randrange(min(len(data), rng.choice((16, 256, 4096))) + 1)
        start = rng.choice((near, len(data) - near, rng.randrange(len(data) + 1)))
        length = rng.choice((1, 4, 64, 65536))
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start : start + 1])
        new = rng.choice((flipped, flipped, bytes(length), b"\xff" * length, rng.randbytes(length)))
        data = data[:start] + new + data[rng.choice((start + len(new), start, len(data))) :]
    return data


def corrupt_zip(rng, data):
    """Corrupt a pickle in a zip file; the checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, corrupt(rng, content) if name.endswith(".pkl") else content)
    return file.getvalue()


# Targets


def flags(rng, shared):
    """A command line."""
    slow = dict.fromkeys(("n_iters", "shots", "batch_size", "rank", "num_workers"), ("1000000",))
    slow |= {"threads": ("2", "٣")}  # more threads than free cores are many times slower
    argv = ["--dataset", "digits", "--root_path", shared / "data", "--backbone", "ViT-Tiny/8"]
    argv += ["--n_iters", 2, "--shots", 1, "--num_workers", 0, "--threads", 1, "--save_path", "out"]
    actions = [action for action in get_parser()._actions if action.dest != "save_path"]
    for _ in range(rng.randint(1, 6)):
        action = rng.choice(actions)
        usual = action.choices or ["1", "0.5", "2", "digits", "eurosat", "ViT-Tiny/8", "cpu", "."]
        words = [*ODD, *usual] if rng.random() < 0.5 else usual
        words = [word for word in words if word not in slow.get(action.dest, ())]
        count = {None: 1, "+": 2}.get(action.nargs, action.nargs)
        argv += [rng.choice(action.option_strings), *rng.choices(words, k=count)]
    return lambda: call_main(*argv)


def image(rng, shared):
    """An image."""
    width, height, file = rng.choice((1, 2, 9, 65)), rng.choice((1, 8, 40)), io.BytesIO()
    picture = Image.frombytes("L", (width, height), rng.randbytes(width * height))
    modes = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"]
    formats = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "EPS"]
    try:
        picture.convert(rng.choice(modes)).save(file, rng.choice(formats))
    except Exception:  # there is no such conversion, or the format has no such mode
        picture.save(file, "PNG")
    path = Path(f"an image.{rng.choice(('jpg', 'tif', 'txt', ''))}")
    path.write_bytes(corrupt(rng, file.getvalue()) if rng.random() < 0.8 else file.getvalue())
    return lambda: read_image(path)


def backbone(rng, shared):
    """A checkpoint of a CLIP."""
    good = rng.choice(sorted((shared / "checkpoints").iterdir()))
    data = good.read_bytes()
    data = (corrupt_zip if data[:2] == b"PK" and rng.random() < 0.5 else corrupt)(rng, data)
    path = Path(rng.choice((good.name, good.name, "a.safetensors", "b.pt")))
    path.write_bytes(data)
    return lambda: clip.load(path, "cpu")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of what all inputs share: digits and checkpoints."""
    shared = tmp_path_factory.mktemp("shared")
    make_dataset("digits", shared / "data", classes=10, per_class=4, size=(32, 32))
    state, folder = random_state_dict({**TINY_VIT, "context_length": 48}), shared / "checkpoints"
    folder.mkdir()
    torch.save(state, folder / "zip.pt")
    torch.save({"state_dict": state}, folder / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "tensors.safetensors")
    return shared


@pytest.mark.filterwarnings("ignore")  # Pillow's and torch's
@pytest.mark.parametrize("target", [flags, image, backbone])
def test_random_inputs_are_read_or_refused(target, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        monkeypatch.chdir(folder)
        read = target(random.Random(f"{target.__name__} {case}"), shared)
        status, err = 0, ""
        try:
            if isinstance(result := read(), tuple):
                status, _, err = result
        except (ValueError, FileNotFoundError) as error:
            status, err = 2, str(error)
        lines = [line for line in err.splitlines() if line and not NOTE.match(line)]
        assert status in (0, 2) and len(lines) == status // 2, (case, err)
        assert "".join(lines).isprintable(), (case, err)
