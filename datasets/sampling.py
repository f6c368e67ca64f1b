"""The few-shot draw, and the order in which it uses Python's global `random`."""

import random

from datasets.base import Entry, Split


def draw_shots(split: Split, shots: int, together: bool = False) -> tuple[list[Entry], list[Entry]]:
    """Draw the few training and validation images with Python's global `random`.

    The order of draws is that of CLIP-LoRA's loaders, which SO's authors use as well, so that one
    seed gives one set of images everywhere: validation (min(shots, 4) a class) before training; in
    each, the classes in order of first appearance; in each class one `random.sample` of its images
    as they are listed, or one `random.choices` where there are fewer than wanted. With `together`
    (ImageNet) one `random.sample` of shots + min(shots, 4) training images a class instead:
    training images first, validation behind them. Nothing else here uses the global generator.

    Args:
        split: What to draw from.
        shots: Training images per class.
        together: Draw validation images from the training images, too.

    Returns:
        Training and validation entries.

    Raises:
        ValueError: `together`, and a class has too few images.
    """
    few = min(shots, 4)
    if not together:
        val = [entry for items in _by_class(split.val) for entry in _draw(items, few)]
        return [entry for items in _by_class(split.train) for entry in _draw(items, shots)], val
    groups = _by_class(split.train)
    for items in groups:
        if len(items) < shots + few:
            raise ValueError(
                f"class {items[0][2]!r} has {len(items)} training images, but {shots} shots take "
                f"{shots + few} ({few} of them for validation): lower --shots or complete the class"
            )
    drawn = [random.sample(items, shots + few) for items in groups]
    train = [entry for items in drawn for entry in items[:shots]]
    return train, [entry for items in drawn for entry in items[shots:]]


def _by_class(entries: list[Entry]) -> list[list[Entry]]:
    """Entries of each class, the classes in order of first appearance."""
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry[1], []).append(entry)
    return list(groups.values())


def _draw(items: list[Entry], count: int) -> list[Entry]:
    """One draw of one class."""
    return random.sample(items, count) if len(items) >= count else random.choices(items, k=count)
