"""From items to batches. Threads make them ahead, and live as long as the run.

What a training image looks like depends on (seed, epoch, position in the epoch) alone, not on how
many threads there are.
"""

import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image
from torchvision.transforms import Compose

import clip
from datasets.base import Datum
from datasets.transforms import MAX_PIXELS, Batch, collate, read_image, train_transform

__all__ = ["ImageCache", "ImageLoader", "shuffled"]

T = TypeVar("T")


class ImageCache:
    """Keeps decoded images, first come first kept, up to a budget of memory.

    Args:
        megabytes: The budget, over all kinds of images kept.
    """

    def __init__(self, megabytes: float) -> None:
        self.left = megabytes * 2**20
        self.kept: dict[object, object] = {}
        self.lock = threading.Lock()

    def get(self, key: object, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The image kept under the key, or the one `make` returns, kept if its bytes still fit."""
        if key in self.kept:
            return self.kept[key]
        value = make()
        with self.lock:
            if key not in self.kept and size(value) <= self.left:
                self.left -= size(value)
                self.kept[key] = value
        return value


class ImageLoader:
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
        # CLIP's resize and crop, without tensor and normalisation
        self.geometry = Compose(clip.image_transform(resolution).transforms[:-2])

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
        """Yield shuffled, augmented batches for ever, and whether each ends an epoch.

        Images are those of this process's share of the batch, labels those of the whole batch.

        Args:
            items: The images to shuffle; the last batch of an epoch has the remaining ones.
            batch_size: Images per batch.
            seed: Seed of order and augmentation.
            scale: Least and largest area of the crop, as shares of the image.
            ratio: Least and largest width / height of the crop.
            flip: Mirror each image with probability 1/2.
            start: Number of batches to leave out at the beginning.
            local_slice: This process's part of a batch of so many images; all by default.
        """
        change = partial(
            train_transform, resolution=self.resolution, scale=scale, ratio=ratio, flip=flip
        )
        order = shuffled(len(items), batch_size, seed, start)
        return self._ahead(
            partial(self._train_batch, items, seed, change, local_slice, *at) for at in order
        )

    def test_batches(self, items: Sequence[Datum], batch_size: int) -> Iterator[Batch]:
        """Yield the items in their order, preprocessed as CLIP's own images are."""
        starts = range(0, max(len(items), 1), batch_size)  # an empty share is an empty batch
        return self._ahead(partial(self._test_batch, items[at : at + batch_size]) for at in starts)

    def _train_batch(
        self,
        items: Sequence[Datum],
        seed: int,
        change: Callable,
        local_slice: Callable[[int], slice],
        epoch: int,
        chosen: dict[int, int],
    ) -> tuple[Batch, bool]:
        """The batch of the items chosen by position in the epoch, and whether it ends that."""
        places = list(chosen.items())
        images = [
            change(self._decoded(items[index].impath), rng=random.Random(f"{seed} {epoch} {at}"))
            for at, index in places[local_slice(len(places))]
        ]
        labels = [items[index].label for index in chosen.values()]
        batch = collate(images, labels, self.resolution)
        return batch, len(items) - 1 in chosen

    def _test_batch(self, items: Sequence[Datum]) -> Batch:
        """The batch of these items."""
        images = [self._input(item.impath) for item in items]
        return collate(images, [item.label for item in items], self.resolution)

    def _decoded(self, path: str) -> Image.Image:
        """The whole image in RGB."""
        return self.cache.get(path, lambda: read_image(path), lambda i: 3 * i.width * i.height)

    def _input(self, path: str) -> np.ndarray:
        """The image resized and cropped as CLIP does, (R, R, 3) uint8."""
        return self.cache.get(("input", path), partial(self._resized, path), lambda a: a.nbytes)

    def _resized(self, path: str) -> np.ndarray:
        """The same, made from the file."""
        image = read_image(path)
        if max(image.size) / min(image.size) * self.resolution**2 > MAX_PIXELS:
            raise ValueError(
                f"the image {path} is too thin ({image.width}x{image.height} pixels): replace it"
            )
        return np.array(self.geometry(image))

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


def shuffled(
    count: int, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, dict[int, int]]]:
    """Yield the order of the images for ever, batch by batch.

    Args:
        count: Number of images in an epoch.
        batch_size: Images per batch.
        seed: Seed of the order, which is another in each epoch.
        start: Number of batches to leave out at the beginning.

    Yields:
        The batch's epoch, and the index of the image at each of its positions in that.
    """
    epoch, skipped = divmod(start, math.ceil(count / batch_size))
    while True:
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        places = list(enumerate(order))
        for first in range(skipped * batch_size, count, batch_size):
            yield epoch, dict(places[first : first + batch_size])
        epoch, skipped = epoch + 1, 0
