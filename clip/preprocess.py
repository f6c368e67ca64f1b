"""Turn images of any size and mode into CLIP's input."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

# Of the images that OpenAI trained on, RGB in [0, 1].
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
OPENAI_RESIZE = ("shortest", "bicubic")


def image_transform(
    input_resolution: int,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    resize: tuple[str, str] = OPENAI_RESIZE,
) -> transforms.Compose:
    """CLIP's preprocessing of PIL images to float32 tensors (3, R, R).

    Args:
        input_resolution: Side R of the model's square input, in pixels.
        mean, std: Normalization of red, green and blue in [0, 1].
        resize: Mode and interpolation. The mode "shortest" crops the center, "squash" distorts any
            image to a square, and "longest" pads it to one with black, as in open_clip.
    """
    side, mode, interpolation = input_resolution, resize[0], InterpolationMode(resize[1])
    if mode == "squash":
        steps = [transforms.Resize((side, side), interpolation)]
    elif mode == "longest":
        steps = [partial(resize_and_pad, side=side, interpolation=interpolation)]
    else:
        steps = [transforms.Resize(side, interpolation), transforms.CenterCrop(side)]
    to_input = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose([convert_image_to_rgb, *steps, *to_input])


def resize_and_pad(image: Image.Image, side: int, interpolation: InterpolationMode) -> Image.Image:
    """Resize the long side to `side` pixels and pad the short one with black on both sides."""
    scale = side / max(image.size)
    width, height = (max(round(n * scale), 1) for n in image.size)
    image = TF.resize(image, [height, width], interpolation)
    left, top = (side - width) // 2, (side - height) // 2
    return TF.pad(image, [left, top, side - width - left, side - height - top])


def normalize(
    images: Tensor, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD
) -> Tensor:
    """The last two steps of `image_transform` for a batch of uint8 images (B, 3, R, R)."""
    mean, std = (torch.tensor(x).view(3, 1, 1).to(images.device) for x in (mean, std))
    return (images.float() / 255 - mean) / std


def convert_image_to_rgb(
    image: Image.Image, gray_range: tuple[float, float] | None = None
) -> Image.Image:
    """Convert an image of any mode to RGB, without transparency; see `scale_gray`."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = scale_gray(image, gray_range)
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def scale_gray(image: Image.Image, gray_range: tuple[float, float] | None = None) -> Image.Image:
    """Scale gray values of more than eight bits to [0, 255]; Pillow's `convert` would clip them.

    Args:
        image: Of mode I, I;16 or F.
        gray_range: The values that become black and white. None: the least of [0, 1] (floating
            point only), [0, 255] and [0, 65535] with the image's values in it, or their own range.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F" and gray_range and gray_range[0] >= 0:
        gray_range = None  # which is of the integers in the same data set
    low, high = gray_range or (values.min(initial=0), values.max(initial=0))
    if not np.isfinite(values).all():
        raise ValueError("some of its gray values are not finite: save it with eight bits")
    if not gray_range and low >= 0:
        limits = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
        high = next((limit for limit in limits if high <= limit), high)
    values = (values - low) / max(high - low, 1) * 255
    return Image.fromarray((values.clip(0, 255) + 0.5).astype(np.uint8))
