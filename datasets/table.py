"""The table of datasets, and `build_dataset`, which makes the few-shot task of a row."""

import difflib
import hashlib
import json
import os
import random
from functools import partial

from datasets import digits
from datasets.base import (
    PARTS,
    TEMPLATE,
    DatasetSpec,
    Entry,
    FewShotDataset,
    Item,
    Split,
    find_source,
)
from datasets.fgvc import read_fgvc
from datasets.imagenet import read_imagenet
from datasets.raw import (
    CALTECH_IGNORED,
    CALTECH_NAMES,
    EUROSAT_NAMES,
    read_cars,
    read_class_folders,
    read_flowers,
    read_pets,
    read_sun397,
    read_ucf101,
)
from datasets.sampling import draw_shots
from datasets.splits import read_split

DATASETS: dict[str, DatasetSpec] = {
    "imagenet": DatasetSpec(
        title="ImageNet",
        folders=("imagenet/images", "imagenet"),
        images=".",
        split=None,
        read=read_imagenet,
        classes=1000,
        counts=(1281167, None, 50000),
        url="https://www.image-net.org/",
        links=("train", "val"),
        together=True,
    ),
    "sun397": DatasetSpec(
        title="SUN397",
        folders=("sun397", "SUN397"),
        images="SUN397",
        split="split_zhou_SUN397.json",
        read=read_sun397,
        classes=397,
        counts=(15880, 3970, 19850),
        url="https://vision.princeton.edu/projects/2010/SUN/",
    ),
    "fgvc": DatasetSpec(
        title="FGVC-Aircraft",
        folders=("fgvc_aircraft", "fgvc_aircraft/data", "fgvc-aircraft-2013b/data"),
        images="images",
        split=None,
        read=read_fgvc,
        classes=100,
        counts=(3334, 3333, 3333),
        url="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    "eurosat": DatasetSpec(
        title="EuroSAT",
        folders=("eurosat",),
        images="2750",
        split="split_zhou_EuroSAT.json",
        read=partial(read_class_folders, names=EUROSAT_NAMES),
        classes=10,
        counts=(13500, 5400, 8100),
        url="https://github.com/phelber/EuroSAT",
    ),
    "stanford_cars": DatasetSpec(
        title="Stanford Cars",
        folders=("stanford_cars", "StanfordCars"),
        images=".",
        split="split_zhou_StanfordCars.json",
        read=read_cars,
        classes=196,
        counts=(6509, 1635, 8041),
        url="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        links=("cars_train", "cars_test"),
    ),
    "food101": DatasetSpec(
        title="Food-101",
        folders=("food-101", "Food101"),
        images="images",
        split="split_zhou_Food101.json",
        read=read_class_folders,
        classes=101,
        counts=(50500, 20200, 30300),
        url="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "oxford_pets": DatasetSpec(
        title="Oxford-IIIT Pets",
        folders=("oxford_pets", "OxfordPets"),
        images="images",
        split="split_zhou_OxfordPets.json",
        read=read_pets,
        classes=37,
        counts=(2944, 736, 3669),
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "oxford_flowers": DatasetSpec(
        title="Flowers-102",
        folders=("oxford_flowers", "Flower102"),
        images="jpg",
        split="split_zhou_OxfordFlowers.json",
        read=read_flowers,
        classes=102,
        counts=(4093, 1633, 2463),
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "caltech101": DatasetSpec(
        title="Caltech-101",
        folders=("caltech-101", "Caltech101"),
        images="101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        read=partial(read_class_folders, names=CALTECH_NAMES, ignored=CALTECH_IGNORED),
        classes=100,
        counts=(4128, 1649, 2465),
        url="https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "dtd": DatasetSpec(
        title="DTD",
        folders=("dtd", "DTD"),
        images="images",
        split="split_zhou_DescribableTextures.json",
        read=read_class_folders,
        classes=47,
        counts=(2820, 1128, 1692),
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    "ucf101": DatasetSpec(
        title="UCF101",
        folders=("ucf101", "UCF101"),
        images="UCF-101-midframes",
        split="split_zhou_UCF101.json",
        read=read_ucf101,
        classes=101,
        counts=(7639, 1898, 3783),
        url="https://www.crcv.ucf.edu/data/UCF101.php",
    ),
    "digits": DatasetSpec(
        title="Digits",
        folders=("digits",),
        images="images",
        split=digits.SPLIT_FILE,
        read=None,
        classes=10,
        counts=(898, 359, 540),
        url="https://doi.org/10.24432/C50P49",
        prepare=digits.prepare,
    ),
}


def find_spec(name: str) -> DatasetSpec:
    """The row of a dataset.

    Raises:
        ValueError: There is no such name; the error lists those that there are.
    """
    if name in DATASETS:
        return DATASETS[name]
    nearest = difflib.get_close_matches(str(name).lower(), DATASETS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown dataset {name!r}: did you mean {nearest!r}? Known: {', '.join(DATASETS)}"
    )


def build_dataset(name: str, root_path: str | os.PathLike | None, shots: int) -> FewShotDataset:
    """Read a dataset and draw its few shots with Python's global `random`, seeded by the caller.

    Args:
        name: A name of the table `DATASETS`.
        root_path: The folder of all datasets; None for those that are made on first use.
        shots: Training images per class; min(shots, 4) are drawn for validation.

    Raises:
        ValueError: An unknown name, shots below 1, no root_path, or broken data.
        FileNotFoundError: A folder, list or image is missing.
    """
    spec = find_spec(name)
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, not {shots!r}")
    state = random.getstate()
    source = find_source(name, spec, root_path)
    split = read_split(source)
    random.setstate(state)  # importing what a reader needs may draw: scikit-learn does
    if source.problems:
        first, more = source.problems[0], len(source.problems) - 1
        if more:
            command = f"python -m datasets --root_path {root_path} --dataset {name}"
            raise type(first)(f"{first} (`{command}` lists this and {more} more)")
        raise first
    try:
        train, val = draw_shots(split, shots, spec.together)
    except ValueError as error:
        raise source.error(str(error)) from error

    def items(entries: list[Entry]) -> list[Item]:
        return [Item(source.locate(path), label, name) for path, label, name in entries]

    return FewShotDataset(
        name,
        items(train),
        items(val),
        items(split.test),
        split.classnames,
        list(TEMPLATE),
        split.published,
        described(split),
    )


def described(split: Split) -> dict:
    """The split's kind, digest and numbers of images: a stand-in."""
    parts = {part: getattr(split, part) for part in PARTS}
    digest = hashlib.sha256(json.dumps([split.classnames, *parts.values()]).encode()).hexdigest()
    kind = "published" if split.published else "made"
    return {"split": kind, "digest": digest, **{part: len(e) for part, e in parts.items()}}
