"""ImageNet: class folders named by WordNet ids, the validation images as the test set."""

import os
from pathlib import Path

from datasets.base import Entry, Source, Split, list_folders, list_images
from utils import first_few, progress

CLASSNAMES = Path(__file__).with_name("imagenet_classnames.txt")  # lines "n01440764 tench"


def read_imagenet(source: Source) -> Split:
    """Read train/ and val/; labels follow the sorted WordNet ids of the folders in train/."""
    folders = {part: source.images / part for part in ("train", "val")}
    found = {part: list_folders(folder) for part, folder in folders.items()}
    if flat := [str(folders[part]) for part in found if not found[part]]:
        raise source.error(
            f"{first_few(flat)} has no class folders like n01440764: sort its images"
        )
    ids = found["train"]
    if other := sorted(set(found["val"]) - set(ids)):
        raise source.error(f"{folders['train']} lacks the folders {first_few(other)} of val")
    names = _names(source)
    if unnamed := [wnid for wnid in ids if wnid not in names]:
        raise source.error(
            f"there is no class name for {first_few(unnamed)} in {folders['train']}: give them "
            "one in a classnames.txt with lines like 'n01440764 tench'"
        )
    parts: dict[str, list[Entry]] = {}
    for part, folder in folders.items():
        parts[part] = [
            (f"{part}/{wnid}/{image}", label, names[wnid])
            for label, wnid in enumerate(progress(ids, desc=f"imagenet/{part}", unit="class"))
            if os.path.isdir(folder / wnid)
            for image in list_images(folder / wnid)
        ]
    classnames = {label: names[wnid] for label, wnid in enumerate(ids)}
    return Split(str(source.images), parts["train"], [], parts["val"], classnames, listed=True)


def _names(source: Source) -> dict[str, str]:
    """Class name of each WordNet id: of classnames.txt beside the images, or the shipped list."""
    places = [source.folder.parent, source.folder] if source.folder.name == "images" else []
    for path in [place / "classnames.txt" for place in places or [source.folder]] + [CLASSNAMES]:
        if path.is_file():
            break
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return dict(line.split(maxsplit=1) for line in lines if line)
    except (OSError, ValueError) as error:
        fault = f"is not made of lines like 'n01440764 tench' ({error}); correct it"
        raise source.unreadable(path, fault) from error
