"""From items to batches, which threads prepare ahead; the threads live as long as the run.

What a training image looks like depends only on seed, epoch and position in the epoch, not on the
number of threads. Batches are uint8, a quarter of the size of float images on their way to a GPU.
"""

import itertools
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose

from clip.preprocess import OPENAI_RESIZE, image_transform
from datasets.base import Datum
from datasets.transforms import Batch, random_resized_crop_params, read_image

T = TypeVar("T")


class ImageLoader:
    """Makes batches of images for one run.

    Args:
        resolution: Side R of the model's square input, in pixels.
        num_workers: Threads that prepare batches ahead; 0 prepares them where they are used.
        cache_mb: Memory for decoded images, in MB.
        resize: Of test images, the model's `image_resize`.
    """

    def __init__(
        self,
        resolution: int,
        num_workers: int = 0,
        cache_mb: float = 0,
        resize: tuple[str, str] = OPENAI_RESIZE,
    ) -> None:
        self.resolution = resolution
        self.num_workers = num_workers
        # Decoded images by "train" or "test" and path, first come first kept.
        self.images: dict[tuple[str, str], Image.Image] = {}
        self.bytes_left, self.lock = cache_mb * 2**20, threading.Lock()
        self.pool = ThreadPoolExecutor(num_workers, "images") if num_workers else None
        # the model's resize and crop, without tensor and normalization
        self.test_transform = Compose(image_transform(resolution, resize=resize).transforms[:-2])

    def train_batches(
        self,
        items: Sequence[Datum],
        batch_size: int,
        seed: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        start: int = 0,
        local_slice: Callable[[int], slice] = slice,
    ) -> Iterator[tuple[Batch, bool]]:
        """Yield shuffled, augmented batches for ever, and whether each is the last of its epoch.

        Args:
            items: The images to shuffle; the last batch of an epoch has the remaining ones.
            batch_size: Images per batch.
            seed: Seed of order and augmentation.
            scale: Least and largest area of the crop, as shares of the image.
            ratio: Least and largest width / height of the crop.
            flip: Mirror each image with probability 1/2.
            start: Number of batches to leave out at the beginning.
            local_slice: This process's images of a batch of so many; labels are those of all.
        """
        batches_per_epoch = math.ceil(len(items) / batch_size)
        orders: dict[int, list[Datum]] = {}  # by epoch, of the last two

        def make_batch(number: int) -> tuple[Batch, bool]:
            epoch, number = divmod(number, batches_per_epoch)
            order = orders.get(epoch)
            if order is None:
                order = list(items)
                random.Random(f"{seed} {epoch}").shuffle(order)
                orders[epoch] = order
                orders.pop(epoch - 2, None)
            positions = range(len(items))[number * batch_size :][:batch_size]
            local = positions[local_slice(len(positions))]
            pixels = np.empty((len(local), self.resolution, self.resolution, 3), np.uint8)
            for row, position in zip(pixels, local, strict=True):
                item, rng = order[position], random.Random(f"{seed} {epoch} {position}")
                image = self.images.get(("train", item.impath)) or self._read("train", item)
                image = image.crop(random_resized_crop_params(*image.size, rng, scale, ratio))
                image = image.resize((self.resolution,) * 2, Image.Resampling.BICUBIC)
                if flip and rng.random() < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                row[:] = image
            labels = torch.tensor([order[position].label for position in positions])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2), labels
            return batch, number + 1 == batches_per_epoch

        return self._prefetch(partial(make_batch, number) for number in itertools.count(start))

    def test_batches(self, items: Sequence[Datum], batch_size: int) -> Iterator[Batch]:
        """Yield the items in their order, preprocessed as the model's own images were."""

        def make_batch(start: int) -> Batch:
            chunk = items[start : start + batch_size]
            pixels = np.empty((len(chunk), self.resolution, self.resolution, 3), np.uint8)
            for row, item in zip(pixels, chunk, strict=True):
                row[:] = self.images.get(("test", item.impath)) or self._read("test", item)
            labels = torch.tensor([item.label for item in chunk], dtype=torch.int64)
            return torch.from_numpy(pixels).permute(0, 3, 1, 2), labels

        starts = range(0, max(len(items), 1), batch_size)  # an empty share is an empty batch
        return self._prefetch(partial(make_batch, start) for start in starts)

    def _read(self, kind: str, item: Datum) -> Image.Image:
        image = read_image(item.impath, item.gray_range)
        if kind == "test":
            image = self.test_transform(image)
        num_bytes = 4 * image.width * image.height  # Pillow stores RGB in four bytes
        with self.lock:
            if (kind, item.impath) not in self.images and num_bytes <= self.bytes_left:
                self.bytes_left -= num_bytes
                self.images[kind, item.impath] = image
        return image

    def _prefetch(self, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
        """Yield what jobs return, in order; threads run the next few while the caller works."""
        if not self.pool:
            yield from (job() for job in jobs)
            return
        futures = deque()
        try:
            for job in jobs:
                futures.append(self.pool.submit(job))
                if len(futures) > 2 * self.num_workers:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
