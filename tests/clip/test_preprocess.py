"""What CLIP's preprocessing makes of images, whatever their mode."""

import io

import numpy as np
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from PIL import Image

import clip
from clip.zero_shot import ZeroShotClassifier


def test_preprocessing_resizes_crops_and_normalises():
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:, 20:100] = (10, 120, 250)  # the centre square, and nothing else
    preprocess = clip.image_transform(40, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert preprocess(Image.fromarray(pixels))[0, 20, 20] == pytest.approx((10 / 255 - 0.5) / 0.2)
    tensor = clip.image_transform(40)(Image.fromarray(pixels))
    expected = (torch.tensor([10, 120, 250]) / 255 - torch.tensor(clip.OPENAI_MEAN)) / torch.tensor(
        clip.OPENAI_STD
    )
    assert tensor.shape == (3, 40, 40)
    torch.testing.assert_close(tensor[:, 20, 20], expected)
    torch.testing.assert_close(tensor[:, :, 5:35], expected[:, None, None].expand(3, 40, 30))


@torch.no_grad()
def test_batches_are_normalised_as_their_model_says():
    model = clip.build_model(random_state_dict(TINY_VIT))
    model.image_mean, model.image_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    inputs = clip.image_transform(32, model.image_mean, model.image_std)(Image.fromarray(pixels))
    classifier = ZeroShotClassifier(model, model.tokenize(["a"])[None])
    features = classifier.encode_images(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    expected = torch.nn.functional.normalize(model.encode_image(inputs[None]), dim=-1)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "PA", "I;16"]
)
def test_images_of_every_mode_become_rgb(mode):
    assert clip.image_transform(32)(Image.new(mode, (50, 40))).shape == (3, 32, 32)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert np.asarray(clip.convert_image_to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]
    small = Image.fromarray(np.array([[0, 100, 255]], np.int32))  # eight bits in a wider type
    assert np.asarray(clip.convert_image_to_rgb(small))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        ([0, 0.5, 1], [0, 128, 255]),  # as scikit-image and tifffile write them
        ([0, 100.4, 255], [0, 100, 255]),
        ([0, 257, 65535], [0, 1, 255]),
    ],
)
def test_floating_point_is_scaled_by_the_range_that_it_is_in(values, grey, tmp_path):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tif")
    assert (
        np.asarray(clip.convert_image_to_rgb(Image.open(tmp_path / "x.tif")))[0, :, 0].tolist()
        == grey
    )


@pytest.mark.parametrize("values", [[-1, 1], [0, 1e6], [0, float("nan")], [0, float("inf")]])
def test_floating_point_in_no_such_range_is_refused(values):
    with pytest.raises(ValueError, match="grey values lie between .* save it with eight bits"):
        clip.convert_image_to_rgb(Image.fromarray(np.array([values], np.float32)))


def test_a_palette_with_transparency_keeps_its_colours():
    image = Image.new("RGB", (4, 4), (10, 20, 30)).quantize(2)
    image.info["transparency"] = b"\x00\x80"
    file = io.BytesIO()
    image.save(file, "PNG")
    assert clip.convert_image_to_rgb(Image.open(file)).getpixel((0, 0)) == (10, 20, 30)
