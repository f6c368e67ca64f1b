"""What CLIP's preprocessing makes of images, whatever their mode."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import clip


def test_preprocessing_resizes_crops_and_normalises():
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:, 20:100] = (10, 120, 250)  # the centre square, and nothing else
    tensor = clip.make_preprocess(40)(Image.fromarray(pixels))
    expected = (torch.tensor([10, 120, 250]) / 255 - torch.tensor(clip.MEAN)) / torch.tensor(
        clip.STD
    )
    assert tensor.shape == (3, 40, 40)
    torch.testing.assert_close(tensor[:, 20, 20], expected)
    torch.testing.assert_close(tensor[:, :, 5:35], expected[:, None, None].expand(3, 40, 30))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "PA", "I;16"]
)
def test_images_of_every_mode_become_rgb(mode):
    assert clip.make_preprocess(32)(Image.new(mode, (50, 40))).shape == (3, 32, 32)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert np.asarray(clip.to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]
    small = Image.fromarray(np.array([[0, 100, 255]], np.int32))  # eight bits in a wider type
    assert np.asarray(clip.to_rgb(small))[0, :, 0].tolist() == [0, 100, 255]


def test_a_palette_with_transparency_keeps_its_colours():
    image = Image.new("RGB", (4, 4), (10, 20, 30)).quantize(2)
    image.info["transparency"] = b"\x00\x80"
    file = io.BytesIO()
    image.save(file, "PNG")
    assert clip.to_rgb(Image.open(file)).getpixel((0, 0)) == (10, 20, 30)
