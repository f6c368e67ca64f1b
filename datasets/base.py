"""What all datasets share: their records, how their folder is found, how files are read."""

import hashlib
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from utils import detect_placeholder_file, format_error

PathLike = str | os.PathLike
RawSample = tuple[str, int, str]  # path below the image folder with "/", label, class name
GrayRange = tuple[float, float]  # the values that become black and white (`transforms.read_image`)

SPLITS = ("train", "val", "test")
SUBSAMPLES = ("all", "base", "new")  # halves of the classes (see `Split.subsample_classes`)
DEFAULT_TEMPLATE = "a photo of a {}."
DEFAULT_ROOT = "~/.cache/so"  # for the dataset that is made, not downloaded
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".gif", ".bmp", ".ppm", ".pgm")
IMAGE_EXTENSIONS += (".tif", ".tiff", ".webp")
# Folders that archives and file servers leave behind, besides hidden ones; in lower case.
IGNORED_DIRS = ("__macosx", "@eadir", "@recycle", "lost+found", "$recycle.bin", "#recycle")
IGNORED_DIRS += ("#snapshot", "system volume information")
IGNORED_FILES = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Datum:
    """One image: its path on this disk, its label and its class name."""

    impath: str
    label: int
    classname: str
    gray_range: GrayRange | None = None


@dataclass(frozen=True)
class FewShotDataset:
    """The few images to adapt with, and all images to test on."""

    name: str
    train_x: list[Datum]
    val: list[Datum]
    test: list[Datum]
    classnames: list[str]  # by label
    template: list[str]  # prompts with {} for the class name
    fingerprint: dict[str, str | int]  # of the data that the few were drawn from
    image_dir: str  # what all paths begin with
    new_classes: "FewShotDataset | None" = None  # the other half, if this is the base half


@dataclass(frozen=True)
class Split:
    """All samples of a dataset as they were read; `splits.check_split` checks them."""

    source_path: str  # the file or folder that they were read from, for messages
    train: list[RawSample]
    val: list[RawSample]
    test: list[RawSample]
    lab2cname: dict[int, str]  # label to class name
    origin: str = "published"  # or "made" here from the raw download, or "own" for a user's images
    files_exist: bool = False  # whether the paths come from listing their folders
    has_parts: bool = True  # False if the classes of own images were divided here
    notes: tuple[str, ...] = ()  # what was left out, dropped or taken in another sense

    def samples(self) -> Iterator[RawSample]:
        """Yield all samples, in the order of SPLITS."""
        return chain(self.train, self.val, self.test)

    def subsample_classes(self, subsample: str) -> "Split":
        """Return the base or the new half of the classes, labeled from 0, or all of them.

        The base classes are the first half in the order of labels, rounded up (Zhou et al. 2022,
        "Conditional Prompt Learning for Vision-Language Models", arXiv 2203.05557).
        """
        if subsample == "all":
            return self
        middle = math.ceil(len(self.lab2cname) / 2)
        labels = range(middle) if subsample == "base" else range(middle, len(self.lab2cname))
        lab2cname = {label - labels.start: self.lab2cname[label] for label in labels}
        splits = {
            split: [(p, label - labels.start, c) for p, label, c in samples if label in labels]
            for split, samples in ((split, getattr(self, split)) for split in SPLITS)
        }
        return replace(self, **splits, lab2cname=lab2cname)

    def num_images(self) -> dict[str, int]:
        """Return the number of training, validation and test images."""
        return {split: len(getattr(self, split)) for split in SPLITS}

    def sha256(self) -> str:
        """Return the SHA-256 of all samples in their order, which no folder's place changes."""
        sha = hashlib.sha256(repr(self.num_images()).encode())
        for path, label, name in self.samples():
            sha.update(nfc(f"{path}\0{label}\0{name}\0").encode(errors="surrogateescape"))
        return sha.hexdigest()

    def fingerprint(self) -> dict[str, str | int]:
        """Return what results record of their data: origin, SHA-256, numbers of images."""
        return {"split": self.origin, "digest": self.sha256(), **self.num_images()}


@dataclass(frozen=True)
class DatasetInfo:
    """One row of the catalog: where a dataset is, how it is read, what it should hold.

    Numbers are the published ones: None if there is none, or no such part; a dataset that is only
    for testing has 0 training images.
    """

    title: str  # as people write it; the name of its section in DATASETS.md
    dataset_dirs: tuple[str, ...]  # names of its folder below the root, in order of preference
    image_dir: str  # in that folder, what the samples' paths start from; "." for the folder itself
    num_classes: int | None
    num_images: tuple[int | None, int | None, int | None]  # for training, validation, testing
    split_file: str | None = None  # None if the download has lists of its own
    read_data: Callable[["DatasetDir"], Split] | None = None  # used if there is no split file
    required_subdirs: tuple[str, ...] = (".",)  # of image_dir, to recognize the dataset's folder
    aliases: tuple[str, ...] = ()  # what archives, torchvision and Kaggle call the dataset's folder
    image_aliases: tuple[str, ...] = ()  # what they call the image folder
    val_from_train: bool = False  # validation images are drawn from the training images
    prepare: Callable[[Path], None] | None = None  # makes the folder, if it is not downloaded
    template: str = DEFAULT_TEMPLATE  # CoOp's prompt
    custom_path: Path | None = None  # the folder of a user's own images

    @property
    def needs_root(self) -> bool:
        """Whether its folder is below the root of all datasets."""
        return not self.prepare and not self.custom_path

    @property
    def test_only(self) -> bool:
        """Whether it has neither training nor validation images."""
        return self.num_images[0] == 0

    def image_dirs(self, path: Path) -> list[Path]:
        """Return the folders of images in a dataset's folder."""
        return [path / self.image_dir / name for name in self.required_subdirs]

    def is_complete(self, path: Path) -> bool:
        """Return whether a folder has the dataset's folders of images."""
        return all(map(os.path.isdir, self.image_dirs(path)))


@dataclass(frozen=True)
class DatasetDir:
    """A dataset's folder on this disk: `path`, below `root`."""

    name: str
    info: DatasetInfo
    root: Path
    path: Path

    @property
    def image_dir(self) -> Path:
        """The folder that the samples' paths start from."""
        return self.path / self.info.image_dir

    def image_path(self, path: str) -> str:
        """Return the path of a sample's image on this disk."""
        return os.path.join(self.image_dir, path)

    def find_path(self, path: str) -> str:
        """Return the path below the image folder that a list means, or else the path as it is.

        It may be written on Windows or in Unicode's other form, and for own images be absolute.
        """
        if self.info.custom_path and os.path.isabs(path):
            relative = os.path.relpath(path, self.image_dir)
            path = path if relative.startswith("..") else relative
        if path.isascii() and "\\" not in path:
            return path
        posix = path.replace("\\", "/")
        candidates = (posix, nfc(posix), unicodedata.normalize("NFD", posix))  # macOS has NFD
        return next((c for c in candidates if os.path.isfile(self.image_path(c))), path)


def find_dataset_dir(name: str, info: DatasetInfo, root_path: PathLike | None) -> DatasetDir:
    """Find a dataset's folder below the root: by the first of its names, or the most complete one.

    A dataset that is made, not downloaded, is made if it does not exist, and needs no root.

    Raises:
        ValueError: No root_path, or the folder could not be made.
        FileNotFoundError: The root or the dataset's folder does not exist.
    """
    if info.custom_path:
        return DatasetDir(name, info, info.custom_path.parent, info.custom_path)
    names = " or ".join(info.dataset_dirs)
    if not root_path and info.needs_root:
        raise ValueError(
            f"{name} needs --root_path, the folder with {names} in it; see DATASETS.md, section "
            f"{info.title}"
        )
    root = resolve_root(root_path)
    preferred = DatasetDir(name, info, root, root / info.dataset_dirs[0])
    with dataset_errors(preferred):
        if root_path and not os.path.isdir(root):
            raise FileNotFoundError(f"--root_path {root} is not a folder")
        if info.prepare:
            info.prepare(preferred.path)
        paths = [root / folder for folder in info.dataset_dirs if os.path.isdir(root / folder)]
        if not paths:
            raise FileNotFoundError(f"there is no {names} in {root}")
    # `max` returns the first of equals; with a split file is better than without.
    path = max(paths, key=lambda p: (info.is_complete(p), (p / (info.split_file or "")).is_file()))
    return replace(preferred, path=path)


def resolve_root(root_path: PathLike | None) -> Path:
    """Return the folder of all datasets, or DEFAULT_ROOT if none is given."""
    return Path(os.path.expanduser(root_path or DEFAULT_ROOT))


@contextmanager
def dataset_errors(dataset_dir: DatasetDir) -> Iterator[None]:
    """Add to errors: the dataset's name, what to move or rename, and a section of DATASETS.md."""
    try:
        yield
    except (ValueError, OSError) as error:
        parts = [f"{dataset_dir.name}: {format_error(error)}"]
        with suppress(OSError):  # of folders that cannot be read
            parts += suggest_fix(dataset_dir)
        parts.append(f"see DATASETS.md, section {dataset_dir.info.title}")
        missing = isinstance(error, FileNotFoundError)
        raise (FileNotFoundError if missing else ValueError)("; ".join(parts)) from error


def suggest_fix(dataset_dir: DatasetDir) -> list[str]:
    """Return what to move or rename if the data is one level deeper or has another name."""
    info, root, path = dataset_dir.info, dataset_dir.root, dataset_dir.path
    if not info.is_complete(path):
        if root.name in info.dataset_dirs and info.is_complete(root):
            return [f"name the folder above, {root.parent}, as --root_path"]
        for name in (*info.dataset_dirs, *info.aliases):
            for candidate in filter(info.is_complete, _walk(root / name)):
                return [_move(candidate, path)]
        for candidate in (p / name for p in (path, root) for name in info.image_aliases):
            if os.path.isdir(candidate) and list_subdirs(candidate):
                # torchvision's root/SUN397/a is the image folder, not the dataset's.
                home = root / info.dataset_dirs[0] if candidate == path else path
                return [_move(candidate, home / info.image_dir)]
    nested = [(folder / folder.name, folder) for folder in info.image_dirs(path) if folder != path]
    return [_move(inner, folder) for inner, folder in nested if os.path.isdir(inner)]


def _move(source: Path, target: Path) -> str:
    """Return the instruction that brings a folder to its place."""
    if os.path.isdir(target):
        return f"move all that is in {source} to {target}"
    return f"{'rename' if source.parent == target.parent else 'move'} {source} to {target}"


def _walk(folder: Path, max_depth: int = 2) -> Iterator[Path]:
    """Yield a folder, the folders in it, and so on down to max_depth."""
    level = [folder] if os.path.isdir(folder) else []
    for _ in range(max_depth + 1):
        yield from level
        level = [path / name for path in level for name in list_subdirs(path)]


def list_images(folder: PathLike) -> list[str]:
    """Return the sorted names of a folder's images, by their extensions."""
    return [name for name in list_entries(folder)[0] if name.lower().endswith(IMAGE_EXTENSIONS)]


def list_subdirs(folder: PathLike) -> list[str]:
    """Return the sorted names of a folder's subfolders."""
    return list_entries(folder)[1]


def list_entries(folder: PathLike) -> tuple[list[str], list[str], list[str]]:
    """Return the sorted names of a folder's files, subfolders, and links that lead nowhere.

    Hidden and ignored ones are left out; links are followed.
    """
    files, subdirs, dead_links = [], [], []
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name.lower() in (*IGNORED_DIRS, *IGNORED_FILES):
            continue
        with suppress(OSError):  # a link to itself
            if entry.is_dir():
                subdirs.append(entry.name)
                continue
            if entry.is_file():
                files.append(entry.name)
                continue
        if entry.is_symlink():
            dead_links.append(entry.name)
    return sorted(files), sorted(subdirs), sorted(dead_links)


def nfc(text: str) -> str:
    """Return a name in the one of Unicode's forms in which names are compared."""
    return unicodedata.normalize("NFC", text)


def read_text(path: PathLike, remedy: str = "get the file again") -> str:
    """Read a text file in UTF-8; a ValueError says what else it is, and the remedy."""
    if placeholder := detect_placeholder_file(path):
        raise ValueError(f"{path} is {placeholder}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): {remedy}") from error


def read_json(path: PathLike, remedy: str = "get the file again") -> Any:
    """Read a JSON file; a ValueError says what else it is, and the remedy."""
    text = read_text(path, remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error


def group_by_label(samples: Iterable[RawSample]) -> list[list[RawSample]]:
    """Return the samples of each class, the classes in order of first appearance."""
    groups: dict[int, list[RawSample]] = {}
    for sample in samples:
        groups.setdefault(sample[1], []).append(sample)
    return list(groups.values())
