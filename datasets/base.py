"""What all datasets share: their records, and how their folder is found."""

import hashlib
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from datasets.files import PathLike, nfc
from utils import format_error

RawSample = tuple[str, int, str]  # path below the image folder with "/", label, class name
GrayRange = tuple[float, float]  # the values that become black and white (`transforms.read_image`)

SPLITS = ("train", "val", "test")
SUBSAMPLES = ("all", "base", "new")  # halves of the classes (see `Split.subsample_classes`)
DEFAULT_TEMPLATE = "a photo of a {}."
DEFAULT_ROOT = "~/.cache/so"  # for the dataset that is made, not downloaded


@dataclass(frozen=True)
class Datum:
    """One image."""

    impath: str  # on this disk
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
    """All samples of a dataset as they were read; `splits.find_problems` checks them."""

    source_path: str  # the file or folder that they were read from, for messages
    train: list[RawSample]
    val: list[RawSample]
    test: list[RawSample]
    lab2cname: dict[int, str]  # label to class name
    origin: str = "published"  # or "made" here from the raw download, or "own" for a user's images
    files_exist: bool = False  # whether the paths come from listing their folders
    has_parts: bool = True  # False if the classes of own images were divided here
    gray_range: GrayRange | None = None  # of own images, for `transforms.read_image`
    notes: tuple[str, ...] = ()  # what was left out, dropped or taken in another sense

    @property
    def parts(self) -> dict[str, list[RawSample]]:
        return {part: getattr(self, part) for part in SPLITS}

    def samples(self) -> Iterator[RawSample]:
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
        return self.relabel({label: (i, self.lab2cname[label]) for i, label in enumerate(labels)})

    def relabel(self, classes: dict[int, tuple[int, str]]) -> "Split":
        """Return the samples of classes, given their new labels and names by the old labels."""
        parts = {
            part: [(path, *classes[label]) for path, label, _ in samples if label in classes]
            for part, samples in self.parts.items()
        }
        return replace(self, **parts, lab2cname=dict(classes.values()))

    def fingerprint(self, subsample: str = "all") -> dict[str, str | int]:
        """Return what results record of a half's data; a run on base classes tests on all."""
        half = self.subsample_classes(subsample)
        tested = replace(half, test=self.test) if subsample == "base" else half
        return {"split": self.origin, "digest": tested.sha256(), **half.num_images()}

    def num_images(self) -> dict[str, int]:
        return {part: len(samples) for part, samples in self.parts.items()}

    def sha256(self) -> str:
        """Return the SHA-256 of all samples in their order, which no folder's place changes."""
        sha = hashlib.sha256(repr(self.num_images()).encode())
        for path, label, name in self.samples():
            sha.update(nfc(f"{path}\0{label}\0{name}\0").encode(errors="surrogateescape"))
        return sha.hexdigest()


@dataclass(frozen=True)
class DatasetInfo:
    """One row of the catalog: where a dataset is, how it is read, what it should hold."""

    title: str  # as people write it; the name of its section in DATASETS.md
    dataset_dirs: tuple[str, ...] = ()  # names of its folder below the root, by preference
    image_dir: str = "."  # in that folder, what the samples' paths start from
    num_classes: int | None = None  # as published
    num_images: tuple[int | None, ...] = (None, None, None)  # as published, by SPLITS
    split_file: str | None = None  # None if the download has lists of its own
    read_data: Callable[["DatasetDir"], Split] | None = None  # used if there is no split file
    required_subdirs: tuple[str, ...] = (".",)  # of image_dir, to recognize the dataset's folder
    aliases: tuple[str, ...] = ()  # what archives, torchvision and Kaggle call one of the folders
    val_from_train: bool = False  # validation images are drawn from the training images
    prepare: Callable[[Path], None] | None = None  # makes the folder, if it is not downloaded
    template: str = DEFAULT_TEMPLATE  # CoOp's prompt
    custom_path: Path | None = None  # the folder of a user's own images

    @property
    def needs_root(self) -> bool:
        return not self.prepare and not self.custom_path

    @property
    def test_only(self) -> bool:
        return self.num_images[0] == 0

    def image_dirs(self, path: Path) -> list[Path]:
        """Return the folders of images that a dataset's folder needs."""
        return [path / self.image_dir / name for name in self.required_subdirs]

    def is_complete(self, path: Path) -> bool:
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
        return self.path / self.info.image_dir

    def image_path(self, path: str) -> str:
        """Return the path of a sample's image on this disk."""
        return os.path.join(self.image_dir, path)

    def find_path(self, path: str) -> str:
        """Return the path below the image folder that a list means, or else the path as it is.

        It may be written on Windows or in Unicode's other form, and for own images be absolute.
        """
        if self.info.custom_path:
            path = path.removeprefix(os.path.join(self.image_dir, ""))
        if path.isascii() and "\\" not in path:
            return path
        posix = path.replace("\\", "/")
        candidates = (posix, nfc(posix), unicodedata.normalize("NFD", posix))  # macOS has NFD
        return next((c for c in candidates if os.path.isfile(self.image_path(c))), path)


def find_dataset_dir(
    name: str, info: DatasetInfo, root_path: PathLike | None, prepare: bool = True
) -> DatasetDir:
    """Find a dataset's folder below the root: by the first of its names, or the most complete one.

    A dataset that is not downloaded is made if `prepare`.
    """
    if info.custom_path:
        return DatasetDir(name, info, info.custom_path.parent, info.custom_path)
    root = Path(os.path.expanduser(root_path or DEFAULT_ROOT))
    preferred = DatasetDir(name, info, root, root / info.dataset_dirs[0])
    with dataset_errors(preferred):
        names = " or ".join(info.dataset_dirs)
        if not root_path and info.needs_root:
            raise ValueError(f"needs --root_path, the folder with {names} in it")
        if root_path and not os.path.isdir(root):
            raise FileNotFoundError(f"--root_path {root} is not a folder")
        if info.prepare and prepare:
            info.prepare(preferred.path)
        paths = [root / folder for folder in info.dataset_dirs if os.path.isdir(root / folder)]
        if not paths:
            raise FileNotFoundError(f"there is no {names} in {root}")
    # `max` returns the first of equals; with a split file is better than without.
    path = max(paths, key=lambda p: (info.is_complete(p), (p / (info.split_file or "")).is_file()))
    return replace(preferred, path=path)


@contextmanager
def dataset_errors(dataset_dir: DatasetDir) -> Iterator[None]:
    """Raise errors with what `describe_problem` adds to them."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(describe_problem(dataset_dir, format_error(error))) from error


def describe_problem(dataset_dir: DatasetDir, problem: str) -> str:
    """Add to a problem: the dataset's name, what to move where, a section of DATASETS.md."""
    text = f"{dataset_dir.name}: {problem}"
    with suppress(OSError):  # of folders that cannot be read
        for source, target in find_moves(dataset_dir)[:1]:
            content = "all that is in " if os.path.isdir(target) else ""
            text += f"; move {content}{source} to {target}"
    return f"{text}; see DATASETS.md, section {dataset_dir.info.title}"


def find_moves(dataset_dir: DatasetDir) -> list[tuple[Path, Path]]:
    """Return folders one level deeper or of another name, and where they belong."""
    info, root, path = dataset_dir.info, dataset_dir.root, dataset_dir.path
    moves: list[tuple[Path, Path]] = []
    if not info.is_complete(path):
        for name in (*info.dataset_dirs, *info.aliases):
            folders = (root / name, *root.glob(f"{name}/*"), *root.glob(f"{name}/*/*"))
            moves += [(folder, path) for folder in folders if info.is_complete(folder)]
        # torchvision's root/SUN397/a is the image folder, not the dataset's.
        home = root / info.dataset_dirs[0] if path.name in info.aliases else path
        folders = [folder / name for folder in (path, root) for name in info.aliases]
        moves += [(folder, home / info.image_dir) for folder in folders]
    moves += [(folder / folder.name, folder) for folder in info.image_dirs(path)]
    return [(source, target) for source, target in moves if os.path.isdir(source)]


def group_by_label(samples: Iterable[RawSample]) -> list[list[RawSample]]:
    """Return the samples of each class, the classes in order of first appearance."""
    groups: dict[int, list[RawSample]] = {}
    for sample in samples:
        groups.setdefault(sample[1], []).append(sample)
    return list(groups.values())
