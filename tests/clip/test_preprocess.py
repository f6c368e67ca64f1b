"""What CLIP's preprocessing makes of images, whatever their mode."""

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from clip.preprocess import convert_image_to_rgb


def test_image_transform_resizes_crops_normalizes():
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:, 20:100] = (10, 120, 250)  # only the center square
    preprocess = clip.image_transform(40, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert preprocess(Image.fromarray(pixels))[0, 20, 20] == pytest.approx((10 / 255 - 0.5) / 0.2)
    tensor = clip.image_transform(40)(Image.fromarray(pixels))
    mean, std = torch.tensor(clip.OPENAI_MEAN), torch.tensor(clip.OPENAI_STD)
    expected = (torch.tensor([10, 120, 250]) / 255 - mean) / std
    assert tensor.shape == (3, 40, 40)
    torch.testing.assert_close(tensor[:, 20, 20], expected)
    torch.testing.assert_close(tensor[:, :, 5:35], expected[:, None, None].expand(3, 40, 30))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "PA", "I;16"]
)
def test_every_mode_becomes_rgb(mode):
    assert clip.image_transform(32)(Image.new(mode, (50, 40))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("dtype", "values", "gray"),
    [
        (np.uint16, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.int32, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.int32, [0, 100, 255], [0, 100, 255]),  # eight bits in a wider type
        (np.float32, [0, 0.5, 1], [0, 128, 255]),  # as scikit-image and tifffile write them
        (np.float32, [0, 100.4, 255], [0, 100, 255]),
        (np.float32, [0, 257, 65535], [0, 1, 255]),
        (np.float32, [-1000, 0, 1000], [0, 128, 255]),
    ],
)
def test_deep_gray_is_scaled(dtype, values, gray):
    image = Image.fromarray(np.array([values], dtype))
    # Floating-point images are left out of the range of integers in the same data set.
    for gray_range in (None, (0, 4095))[: 1 + (dtype == np.float32)]:
        assert np.asarray(convert_image_to_rgb(image, gray_range))[0, :, 0].tolist() == gray


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_values_are_refused(value):
    with pytest.raises(ValueError, match="gray values are not finite: save it with eight bits"):
        convert_image_to_rgb(Image.fromarray(np.array([[0, value]], np.float32)))
