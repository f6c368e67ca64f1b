"""From items to batches: read, crop, flip, stack. Threads do it, and live as long as the run.

Batches are uint8, a quarter of what float images weigh on their way to a GPU; `normalise` makes
them CLIP's input there. What a training image looks like depends on (seed, epoch, position in the
epoch) alone, not on how many threads there are.
"""

import math
import os
import random
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import Compose

import clip
from datasets.base import Item

# By content, whatever a file is called. Pillow knows more, of which EPS would run Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**30 // 4 // 3  # of an image, and of what it is resized to before the crop
# At this size Pillow would warn and go on.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]  # images (B, 3, R, R) uint8, labels (B,) int64


class ImageCache:
    """Keeps what was decoded, first come first kept, up to a budget of memory.

    Args:
        megabytes: The budget, over all kinds of things kept.
    """

    def __init__(self, megabytes: float) -> None:
        self.left = megabytes * 2**20
        self.kept: dict[object, object] = {}
        self.lock = threading.Lock()

    def get(self, key: object, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """What is kept under the key, or what `make` returns, kept if its size in bytes fits."""
        if key in self.kept:
            return self.kept[key]
        value = make()
        with self.lock:
            if key not in self.kept and size(value) <= self.left:
                self.left -= size(value)
                self.kept[key] = value
        return value


class Loader:
    """Makes batches of images for one run.

    Args:
        resolution: Side R of the model's square input, in pixels.
        workers: Threads that prepare batches ahead; 0 prepares them where they are used.
        cache_mb: Memory for decoded images, in MB.
    """

    def __init__(self, resolution: int, workers: int = 0, cache_mb: float = 0) -> None:
        self.resolution = resolution
        self.workers = workers
        self.cache = ImageCache(cache_mb)
        self.pool = ThreadPoolExecutor(workers, "images") if workers else None
        self.to_input = clip.make_preprocess(resolution)

    def train_batches(
        self,
        items: Sequence[Item],
        batch_size: int,
        seed: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        start: int = 0,
    ) -> Iterator[tuple[Batch, bool]]:
        """Yield shuffled, augmented batches for ever, and whether each ends an epoch.

        Args:
            items: What to shuffle; the last batch of an epoch has what is left.
            batch_size: Images per batch.
            seed: Of order and augmentation.
            scale: Least and largest area of the crop, as shares of the image.
            ratio: Least and largest width / height of the crop.
            flip: Whether every other image is mirrored.
            start: Batches to leave out at the beginning.
        """

        def image(item: Item, epoch: int, position: int) -> np.ndarray:
            rng = random.Random(f"{seed} {epoch} {position}")
            return augment(self._decoded(item.impath), self.resolution, rng, scale, ratio, flip)

        def batch(epoch: int, order: list[int], first: int) -> tuple[Batch, bool]:
            chosen = range(first, min(first + batch_size, len(order)))
            images = [image(items[order[position]], epoch, position) for position in chosen]
            labels = [items[order[position]].label for position in chosen]
            return stack(images, labels), chosen.stop == len(order)

        def jobs() -> Iterator[Callable[[], tuple[Batch, bool]]]:
            epoch, skipped = divmod(start, math.ceil(len(items) / batch_size))
            while True:
                order = list(range(len(items)))
                random.Random(f"{seed} {epoch}").shuffle(order)
                for first in range(skipped * batch_size, len(order), batch_size):
                    yield lambda at=(epoch, order, first): batch(*at)
                epoch, skipped = epoch + 1, 0

        return self._ahead(jobs())

    def test_batches(self, items: Sequence[Item], batch_size: int) -> Iterator[Batch]:
        """Yield the items in their order, preprocessed as CLIP's own images are."""

        def batch(chosen: Sequence[Item]) -> Batch:
            return stack([self._input(item.impath) for item in chosen], [i.label for i in chosen])

        starts = range(0, len(items), batch_size)
        return self._ahead(lambda at=at: batch(items[at : at + batch_size]) for at in starts)

    def _decoded(self, path: str) -> Image.Image:
        """The whole image in RGB."""
        return self.cache.get(path, lambda: read_image(path), lambda i: 3 * i.width * i.height)

    def _input(self, path: str) -> np.ndarray:
        """The image resized and cropped as CLIP does, (R, R, 3) uint8."""
        geometry = Compose(self.to_input.transforms[:-2])  # without tensor and normalisation

        def make() -> np.ndarray:
            image = read_image(path)
            shape = max(image.size) / min(image.size)
            if shape * self.resolution**2 > MAX_PIXELS:
                raise ValueError(
                    f"the image {path} is too thin ({image.width}x{image.height} pixels): "
                    "replace it"
                )
            return np.array(geometry(image))

        return self.cache.get(("input", path), make, lambda array: array.nbytes)

    def _ahead(self, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
        """Run jobs in order, the next few of them in threads while the caller works.

        What a job raises is raised when its batch is due, whatever the number of threads, and
        the jobs behind it are dropped.
        """
        if not self.pool:
            for job in jobs:
                yield job()
            return
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(self._submit(job))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        """Give a job to the threads."""
        try:
            return self.pool.submit(job)
        except RuntimeError as error:  # the system's limit on threads
            raise OSError(
                f"a thread that prepares images cannot be started ({error}): lower --num_workers"
            ) from error


def read_image(path: str | os.PathLike) -> Image.Image:
    """Decode an image file wholly, into RGB: the first picture where there are several.

    As in CLIP's own preprocessing, the turn that a camera noted in EXIF data is not made.

    Raises:
        FileNotFoundError: It is missing; the message names it.
        ValueError: It cannot be read; the message names it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")  # opening a pipe would wait for ever
        with Image.open(path, formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            image.load()
            return clip.to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the image {path} is missing: put it back") from error
    except Exception as error:  # a damaged file makes Pillow fail in any way
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ValueError(f"the image {path} cannot be read ({reason}): replace it") from error


def augment(
    image: Image.Image,
    resolution: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> np.ndarray:
    """Crop at random, resize bicubically, mirror every other image: (R, R, 3) uint8."""
    image = image.crop(random_box(image.width, image.height, rng, scale, ratio))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def random_box(
    width: int,
    height: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a crop of random area and shape: (left, top, right, bottom).

    The distribution is that of torchvision's RandomResizedCrop: an area uniform in `scale`, a
    shape log-uniform in `ratio`, ten tries, then the largest centred box of an allowed shape.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * shape) or 1), min(height, round(width / shape) or 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def stack(images: Sequence[np.ndarray], labels: Sequence[int]) -> Batch:
    """Stack images (R, R, 3) to (B, 3, R, R), channels last in memory, and labels to (B,)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Bring a batch to the device, without waiting where that is possible."""
    if device.type == "cuda":
        batch = batch[0].pin_memory(), batch[1].pin_memory()
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


def normalise(
    images: Tensor, mean: Sequence[float] = clip.MEAN, std: Sequence[float] = clip.STD
) -> Tensor:
    """Turn uint8 images into CLIP's input: (B, 3, R, R) float32.

    Args:
        images: RGB.
        mean: of a model's training images, its `image_mean`.
        std: their standard deviation, its `image_std`.
    """
    mean = torch.tensor(mean, device="cpu").to(images.device, non_blocking=True)
    std = torch.tensor(std, device="cpu").to(images.device, non_blocking=True)
    return (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
