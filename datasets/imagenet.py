"""ImageNet, and the sets of other images of its classes, which are for testing alone."""

import os
from collections.abc import Mapping
from pathlib import Path

from datasets.base import DatasetDir, RawSample, Split, list_images, list_subdirs
from datasets.readers import paths_in
from utils import progress, truncate_list

CLASSNAMES = Path(__file__).with_name("imagenet_classnames.txt")  # lines "n01440764 tench"


def read_imagenet(source: DatasetDir) -> Split:
    """Read train/ and val/; labels follow the sorted WordNet ids of the folders in train/."""
    folders = {part: source.images / part for part in ("train", "val")}
    found = {part: list_subdirs(folder) for part, folder in folders.items()}
    if flat := [str(folders[part]) for part in found if not found[part]]:
        raise source.error(
            f"{truncate_list(flat)} has no class folders like n01440764: sort its images"
        )
    ids = found["train"]
    if other := sorted(set(found["val"]) - set(ids)):
        raise source.error(f"{folders['train']} lacks the folders {truncate_list(other)} of val")
    names = _names(source, ids, folders["train"])
    parts: dict[str, list[RawSample]] = {}
    for part, folder in folders.items():
        parts[part] = [
            (f"{part}/{wnid}/{image}", label, names[label])
            for label, wnid in enumerate(progress(ids, desc=f"imagenet/{part}", unit="class"))
            if os.path.isdir(folder / wnid)
            for image in list_images(folder / wnid)
        ]
    return Split(str(source.images), parts["train"], [], parts["val"], names, listed=True)


def read_imagenet_variant(source: DatasetDir) -> Split:
    """Read class folders of test images, named by WordNet ids, or by their places in ImageNet.

    Labels follow the sorted WordNet ids of the classes that are there: ImageNet's own labels where
    all are. Class names are ImageNet's.
    """
    published = _read_names(source, CLASSNAMES)
    places = sorted(published)
    folders = {}
    for folder in list_subdirs(source.images):
        known = folder.isdecimal() and int(folder) < len(places)  # ImageNetV2: 0 to 999
        folders[places[int(folder)] if known else folder] = folder
    if not folders:
        raise source.error(
            f"{source.images} has no class folders like n01440764: unpack the download there"
        )
    ids = sorted(folders)
    names = _names(source, ids, source.images, published)
    test = [
        (path, label, names[label])
        for label, wnid in enumerate(progress(ids, desc=source.name, unit="class"))
        for path in paths_in(source, folders[wnid])
    ]
    return Split(str(source.images), [], [], test, names, listed=True)


def _names(
    source: DatasetDir, ids: list[str], folder: Path, others: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Class name of each label: of the first classnames.txt that there is, or the shipped list.

    It lies in the dataset's own folder, beside that where it is called images, or in ImageNet's.
    `others` has names for what it leaves out.
    """
    imagenet = source.root / "imagenet"
    places = [source.folder, imagenet, imagenet / "images"]
    if source.folder.name == "images":
        places.insert(0, source.folder.parent)
    files = [place / "classnames.txt" for place in places]
    path = next((path for path in files if path.is_file()), CLASSNAMES)
    names = {**(others or {}), **_read_names(source, path)}
    if unnamed := [wnid for wnid in ids if wnid not in names]:
        raise source.missing(
            f"there is no class name for {truncate_list(unnamed)} in {folder}",
            "give them one in a classnames.txt with lines like 'n01440764 tench'",
            ValueError,
        )
    return {label: names[wnid] for label, wnid in enumerate(ids)}


def _read_names(source: DatasetDir, path: Path) -> dict[str, str]:
    """The lines of a list of class names, by WordNet id."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return dict(line.split(maxsplit=1) for line in lines if line)
    except (OSError, ValueError) as error:
        fault = f"is not made of lines like 'n01440764 tench' ({error}); correct it"
        raise source.unreadable(path, fault) from error
