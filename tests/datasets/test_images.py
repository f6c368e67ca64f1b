"""Image files of every kind: read as CLIP's own preprocessing would, or refused by name."""

import gc
import io
import os
import random
import re
import struct
import threading
import time
import warnings
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from dataset_helpers import make_dataset
from PIL import Image

import datasets.loader
import main
import run_utils
from datasets import Item
from datasets.__main__ import main as doctor
from datasets.images import MAX_PIXELS, augment, random_box, read_image
from datasets.loader import Loader


def picture(mode="RGB", size=(30, 20), seed=0):
    """A picture of noise in some mode of Pillow's."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    if mode == "P":
        return image.quantize(16)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise[..., 1]))
    return image.convert(mode)


def chunk(kind, content):
    """A chunk of a PNG file."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, height):
    """A black and white PNG of any size, most of its rows missing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture().save(path, "JPEG", exif=exif)


def transparent_palette(path):
    picture("P").save(path, "PNG", transparency=bytes(range(0, 256, 16)))


def several(form):
    def write(path):
        more = [picture(seed=1), picture(seed=2)]
        picture().save(path, form, save_all=True, append_images=more)

    return write


READ = {
    "CMYK": lambda path: picture("CMYK").save(path, "JPEG"),
    "grey": lambda path: picture("L").save(path, "JPEG"),
    "black and white": lambda path: picture("1").save(path, "PNG"),
    "grey with transparency": lambda path: picture("LA").save(path, "PNG"),
    "transparency": lambda path: picture("RGBA").save(path, "PNG"),
    "palette": lambda path: picture("P").save(path, "PNG"),
    "palette with one transparent": lambda path: picture("P").save(path, "PNG", transparency=3),
    "palette with transparency": transparent_palette,
    "float": lambda path: picture("F").save(path, "TIFF"),
    "rotated": rotated,
    "GIF": lambda path: picture("P").save(path, "GIF"),
    "animated GIF": several("GIF"),
    "animated WebP": several("WEBP"),
    "pages": several("TIFF"),
    "BMP": lambda path: picture().save(path, "BMP"),
    "PGM": lambda path: picture("L").save(path, "PPM"),
    "one pixel": lambda path: picture(size=(1, 1)).save(path, "PNG"),
    "one column": lambda path: picture(size=(1, 300)).save(path, "PNG"),
}


@pytest.mark.parametrize("kind", READ)
def test_a_picture_is_what_clip_would_see_whatever_its_extension(tmp_path, kind):
    path = tmp_path / "image.jpg"
    READ[kind](path)
    with Image.open(path) as image:
        image = image.convert("RGBA") if "transparency" in image.info else image
        assert np.array_equal(read_image(path), image.convert("RGB"))
    item = Item(str(path), 0, "x")
    loader = Loader(16, workers=1)
    ((images, _),) = loader.test_batches([item], 1)
    (training, _), _ = next(loader.train_batches([item], 1, seed=0))
    assert images.shape == training.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path, form):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    if form == "PPM":  # which older versions of Pillow read, but do not write
        (tmp_path / "x.png").write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / "x.png", form)
    assert np.asarray(read_image(tmp_path / "x.png"))[0, :, 1].tolist() == [0, 1, 128, 255]


def saved(form, cut):
    def write(path):
        picture(size=(200, 200)).save(path, form)
        path.write_bytes(path.read_bytes()[:cut])

    return write


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED = {
    "nothing": (lambda path: path.write_bytes(b""), "none of JPEG"),
    "text": (lambda path: path.write_bytes(b"a text"), "none of JPEG"),
    "PostScript": (lambda path: path.write_bytes(EPS), "none of JPEG"),  # would run Ghostscript
    "icon": (lambda path: picture().save(path, "ICO"), "none of JPEG"),
    "folder": (lambda path: path.mkdir(), "it is not a regular file"),
    "pipe": (os.mkfifo, "it is not a regular file"),
    "a bit large": (lambda path: path.write_bytes(png(10_000, 9_000)), "pixels"),
    "large": (lambda path: path.write_bytes(png(20_000, 10_000)), "pixels"),
    "huge": (lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1)), "pixels"),
    "no pixels": (lambda path: path.write_bytes(png(0, 0)), ""),
    "half a JPEG": (saved("JPEG", -20_000), "truncated"),
    "half a PNG": (saved("PNG", -50_000), "truncated"),
    "half a TIFF": (saved("TIFF", -50_000), ""),
    "half a GIF": (saved("GIF", -20_000), ""),
    "half a WebP": (saved("WEBP", -20_000), ""),
    "half a BMP": (saved("BMP", -50_000), "truncated"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_refused_by_name(tmp_path, kind):
    write, words = REFUSED[kind]
    path = tmp_path / "image.jpg"
    write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # not to depend on it
        with pytest.raises(ValueError, match=rf"the image {path} cannot be read \(.*{words}") as e:
            read_image(path)
    assert "\n" not in str(e.value)


def test_each_flipped_bit_of_a_header_is_read_or_refused(tmp_path):
    path = tmp_path / "image.jpg"
    warnings.simplefilter("ignore")
    for form in ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"):
        picture("P" if form == "GIF" else "RGB", (8, 8)).save(path, form)
        whole = path.read_bytes()
        for position in range(min(len(whole), 60)):
            content = bytearray(whole)
            content[position] ^= 1 << position % 8
            path.write_bytes(content)
            try:
                assert read_image(path).mode == "RGB"
            except ValueError as error:
                assert str(path) in str(error)


def test_an_image_too_thin_to_be_enlarged_is_named(tmp_path):
    path = tmp_path / "thread.png"
    picture("L", (1, 20_000)).save(path)
    with pytest.raises(ValueError, match="thread.png is too thin .1x20000 pixels."):
        next(Loader(100).test_batches([Item(str(path), 0, "x")], 1))
    assert 20_000 * 100**2 > MAX_PIXELS


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (9.0, 9.0), (0.1, 0.1)])
def test_the_smallest_images_have_crops(size, ratio):
    for seed in range(5):
        left, top, right, bottom = random_box(*size, random.Random(seed), (0.08, 1.0), ratio)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        cropped = augment(picture(size=size), 8, random.Random(seed), (0.08, 1.0), ratio, True)
        assert cropped.shape == (8, 8, 3)


# Failures while a run goes on


@pytest.fixture
def command(tmp_path):
    """Arguments of a run whose images are read anew each time, by threads."""
    make_dataset("eurosat", tmp_path)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), tmp_path / "tiny.pt")
    return [
        "--root_path", tmp_path, "--dataset", "eurosat", "--backbone", tmp_path / "tiny.pt",
        "--n_iters", 40, "--batch_size", 2, "--num_workers", 3, "--cache_mb", 0,
        "--save_path", tmp_path / "out",
    ]  # fmt: skip


def run(*argv):
    """main.py in this process: (status, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_utils.exit_status(lambda: main.main([str(arg) for arg in argv]))
    return status, err.getvalue()


def image_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "is missing: put it back"),
        (lambda path: path.write_bytes(path.read_bytes()[:400]), "cannot be read .*: replace it"),
        (lambda path: path.write_bytes(b""), "cannot be read .*: replace it"),
    ],
    ids=["deleted", "cut", "emptied"],
)
def test_an_image_spoilt_while_training_ends_the_run_with_its_name(
    command, monkeypatch, workers, spoil, words
):
    before = image_threads()
    seen, lock = {}, threading.Lock()

    def read(path):
        with lock:
            seen[path] = seen.get(path, 0) + 1
            if seen[path] == 5:  # long after the test images were read
                spoil(Path(path))
        return read_image(path)

    monkeypatch.setattr(datasets.loader, "read_image", read)
    status, err = run(*command, "--num_workers", workers)
    assert status == 2
    line = err.splitlines()[-1]
    assert re.fullmatch(rf"main.py: error: the image .*jpg {words}", line)
    gc.collect()
    deadline = time.monotonic() + 20
    while len(image_threads()) > len(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(image_threads()) == len(before)


def test_a_thread_that_runs_out_of_memory_names_the_image(command, monkeypatch):
    def no_memory(_):
        raise MemoryError

    monkeypatch.setattr("clip.to_rgb", no_memory)
    status, err = run(*command)
    assert status == 2 and re.search(r"the image .*jpg cannot be read \(MemoryError\)", err)


def test_threads_that_cannot_be_started_are_said_to_be_too_many(command, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("images"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    status, err = run(*command)
    assert status == 2 and "cannot be started (can't start new thread): lower --num_workers" in err


def test_the_doctor_names_what_a_run_would_refuse(tmp_path, capsys):
    make_dataset("eurosat", tmp_path)
    broken = tmp_path / "eurosat/2750/Forest/Forest_0001.jpg"
    broken.write_bytes(EPS)
    assert doctor(["--root_path", str(tmp_path), "--dataset", "eurosat", "--decode"]) == 1
    assert "Forest/Forest_0001.jpg in" in capsys.readouterr().out
