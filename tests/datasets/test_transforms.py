"""Image files of every kind: read as CLIP's own preprocessing would, or refused by name."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets import Datum
from datasets.loader import ImageLoader
from datasets.transforms import read_image


def picture(mode="RGB", size=(30, 20), seed=0):
    """A picture of noise in some mode of Pillow's."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    if mode == "P":
        return image.quantize(16)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise[..., 1]))
    return image.convert(mode)


def save(form, mode="RGB", cut=None, **options):
    """A writer of a picture, perhaps of its first bytes alone."""

    def write(path):
        picture(mode, (200, 200) if cut else (30, 20)).save(path, form, **options)
        path.write_bytes(path.read_bytes()[:cut])

    return write


def text(content):
    return lambda path: path.write_text(content)


def png(width, height):
    """A writer of a black and white PNG of any size, most of its rows missing."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows)


def several(form):
    more = [picture(seed=1), picture(seed=2)]
    return save(form, save_all=True, append_images=more)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture().save(path, "JPEG", exif=exif)


def multi_spectral(path):
    """The header of a TIFF of 13 bands of 64x64 pixels, and their pixels."""
    tags = {256: 64, 257: 64, 258: 16, 259: 1, 262: 1, 273: 200, 277: 13, 278: 64, 279: 106496}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    path.write_bytes(head.ljust(200, b"\0") + bytes(106496))


READ = {
    "CMYK": save("JPEG", "CMYK"),
    "grey": save("JPEG", "L"),
    "black and white": save("PNG", "1"),
    "grey with transparency": save("PNG", "LA"),
    "transparency": save("PNG", "RGBA"),
    "palette": save("PNG", "P"),
    "palette with one transparent": save("PNG", "P", transparency=3),
    "palette with transparency": save("PNG", "P", transparency=bytes(range(0, 256, 16))),
    "rotated": rotated,
    "GIF": save("GIF", "P"),
    "animated GIF": several("GIF"),
    "animated WebP": several("WEBP"),
    "pages": several("TIFF"),
    "BMP": save("BMP"),
    "PGM": save("PPM", "L"),
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
    item = Datum(str(path), 0, "x")
    loader = ImageLoader(16, workers=1)
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


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED = {
    "nothing": (text(""), r"cannot be read \(none of JPEG"),
    "text": (text("a text"), r"cannot be read \(none of JPEG"),
    "PostScript": (text(POSTSCRIPT), "none of JPEG"),  # Pillow would run Ghostscript
    "icon": (lambda path: picture().save(path, "ICO"), "none of JPEG"),
    "folder": (lambda path: path.mkdir(), "it is not a regular file"),
    "pipe": (os.mkfifo, "it is not a regular file"),
    "a bit large": (png(10_000, 9_000), "pixels"),
    "large": (png(20_000, 10_000), "pixels"),
    "huge": (png(2**31 - 1, 2**31 - 1), "pixels"),
    "no pixels": (png(0, 0), ""),
    "half a JPEG": (save("JPEG", cut=-20_000), "truncated"),
    "half a PNG": (save("PNG", cut=-50_000), "truncated"),
    "half a TIFF": (save("TIFF", cut=-50_000), ""),
    "half a GIF": (save("GIF", cut=-20_000), ""),
    "half a WebP": (save("WEBP", cut=-20_000), ""),
    "half a BMP": (save("BMP", cut=-50_000), "truncated"),
    "many bands": (multi_spectral, "13 bands.*multi-spectral download; .* EuroSAT_RGB.zip"),
    "pointer": (text("version https://git-lfs.github.com/spec/v1\noid x"), "is a Git LFS pointer"),
    "page": (text("<!DOCTYPE html><html>403 Forbidden</html>"), "is a web page, not the file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_a_picture_is_refused_by_name(tmp_path, kind):
    write, words = REFUSED[kind]
    path = tmp_path / "an image.jpg"
    write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # not to depend on it
        with pytest.raises(ValueError, match=rf"the image {path} .*{words}") as caught:
            read_image(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="an image.jpg"):
        next(ImageLoader(16, workers=2).train_batches([Datum(str(path), 0, "x")], 1, seed=0))


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jpg is missing: put it back"):
        read_image(tmp_path / "gone.jpg")


def test_each_flipped_bit_of_a_header_is_read_or_refused(tmp_path):
    path = tmp_path / "image.jpg"
    warnings.simplefilter("ignore")
    for form in ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"):
        picture("P" if form == "GIF" else "RGB", (8, 8)).save(path, form)
        whole = path.read_bytes()
        for position in range(0, min(len(whole), 60), 2):
            content = bytearray(whole)
            content[position] ^= 1 << position % 8
            path.write_bytes(content)
            try:
                assert read_image(path).mode == "RGB"
            except ValueError as error:
                assert str(path) in str(error)
