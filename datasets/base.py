"""What all datasets share: their records, the way to their folder, the listing of folders."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from utils import detect_placeholder_file

RawSample = tuple[str, int, str]  # path below the image folder with "/", label, class name

SPLITS = ("train", "val", "test")
SUBSAMPLES = ("all", "base", "new")  # classes of a task (see `Split.half`)
TEMPLATE = ["a photo of a {}."]
DEFAULT_ROOT = "~/.cache/so"  # holds the datasets that are made, not downloaded
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Folders that archives and file servers leave behind, besides hidden ones; in lower case.
IGNORED_DIRS = ("__macosx", "@eadir", "@recycle", "lost+found", "$recycle.bin", "#recycle")
IGNORED_DIRS += ("#snapshot", "system volume information")


@dataclass(frozen=True)
class Datum:
    """One image: where it is (root_path joined with the path below it), its label and class."""

    impath: str
    label: int
    classname: str


@dataclass(frozen=True)
class FewShotDataset:
    """The few images to adapt with, and all images to test on.

    Attributes:
        classnames: By label.
        template: Prompts with {} for the class name.
        fingerprint: What the few were drawn from (see `Split.fingerprint`).
        image_dir: The image folder, where the paths of all items begin.
        new_classes: The other half of the classes, where this is the base half.
    """

    name: str
    train_x: list[Datum]
    val: list[Datum]
    test: list[Datum]
    classnames: list[str]
    template: list[str]
    fingerprint: dict[str, str | int]
    image_dir: str
    new_classes: "FewShotDataset | None" = None


@dataclass(frozen=True)
class Split:
    """All entries of a dataset as they were read, checked by nobody yet.

    Attributes:
        where: The file or folder that they were read from, for messages.
        names: Class name of each label.
        kind: "published", "made" here from the raw download, or "own" for a user's images.
        listed: The paths come from listing their folders, so that the files are there.
    """

    where: str
    train: list[RawSample]
    val: list[RawSample]
    test: list[RawSample]
    names: dict[int, str]
    kind: str = "published"
    listed: bool = False

    def entries(self) -> Iterator[RawSample]:
        """All entries, in the order of PARTS."""
        return chain(self.train, self.val, self.test)

    def half(self, subsample: str) -> "Split":
        """The base or the new half of the classes, labelled from 0; with "all" all of them.

        The base classes are the first half in the order of labels, rounded up (Zhou et al. 2022,
        "Conditional Prompt Learning for Vision-Language Models", arXiv 2203.05557).
        """
        if subsample == "all":
            return self
        middle = math.ceil(len(self.names) / 2)
        labels = range(middle) if subsample == "base" else range(middle, len(self.names))

        def some(entries: list[RawSample]) -> list[RawSample]:
            return [(path, i - labels.start, name) for path, i, name in entries if i in labels]

        names = {label - labels.start: self.names[label] for label in labels}
        return replace(self, **{p: some(getattr(self, p)) for p in SPLITS}, names=names)

    def counts(self) -> dict[str, int]:
        """Number of images in each part."""
        return {part: len(getattr(self, part)) for part in SPLITS}

    def digest(self) -> str:
        """SHA-256 of all entries in their order: the same wherever the same data lies."""
        sha = hashlib.sha256(repr(self.counts()).encode())
        for path, label, name in self.entries():
            sha.update(f"{path}\0{label}\0{name}\0".encode(errors="surrogateescape"))
        return sha.hexdigest()

    def fingerprint(self) -> dict[str, str | int]:
        """What a result says of its data: kind of split, digest, images in each part."""
        return {"split": self.kind, "digest": self.digest(), **self.counts()}


@dataclass(frozen=True)
class DatasetInfo:
    """One row of the table: where a dataset lies, how it is read, what is to be expected.

    Attributes:
        title: Its section in DATASETS.md.
        folders: Names of its folder below the root, in order of preference.
        images: The folder that paths start from, below the dataset's; "." for that one itself.
        split: The published split file; None where the download has lists of its own.
        read: Makes a split from the download, where there is no split file.
        classes: Published number of classes.
        counts: Published number of training, validation and test images; None for no such part,
            0 where a set that is for testing alone has none.
        url: Official page.
        holds: Folders below `images` that tell the dataset's folder from others.
        aliases: Names that archives, torchvision and Kaggle give the dataset's folder.
        image_aliases: Names that they give the image folder.
        others: Folders of another release that people have instead, and what to say of each.
        together: Training and validation images are drawn at once (see `generate_fewshot_dataset`).
        prepare: Makes the dataset's folder, if it is not there yet, instead of a download.
        template: The prompt that CoOp has for it.
        place: The folder of a user's own images, which need not be below the root.
    """

    title: str
    folders: tuple[str, ...]
    images: str
    split: str | None
    read: Callable[["DatasetDir"], Split]
    classes: int | None
    counts: tuple[int | None, int | None, int | None]
    url: str
    holds: tuple[str, ...] = (".",)
    aliases: tuple[str, ...] = ()
    image_aliases: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    together: bool = False
    prepare: Callable[[Path], None] | None = None
    template: str = TEMPLATE[0]
    place: Path | None = None

    @property
    def needs_root(self) -> bool:
        """Whether its folder is looked for below the folder of all datasets."""
        return not self.prepare and not self.place

    @property
    def test_only(self) -> bool:
        """Whether it has neither training nor validation images."""
        return self.counts[0] == 0

    def image_folders(self, folder: Path) -> list[Path]:
        """The folders of images, where the dataset's own folder is this one."""
        return [folder / self.images / name for name in self.holds]

    def lies_in(self, folder: Path) -> bool:
        """Whether a folder has the folders of images."""
        return all(os.path.isdir(path) for path in self.image_folders(folder))


@dataclass(frozen=True)
class DatasetDir:
    """A dataset's folder on this disk."""

    name: str
    spec: DatasetInfo
    root: Path
    folder: Path

    @property
    def images(self) -> Path:
        """The folder that the entries' paths start from."""
        return self.folder / self.spec.images

    def locate(self, path: str) -> str:
        """Where an entry's image is on this disk."""
        return os.path.join(self.images, path)

    def error(self, text: str, kind: type[Exception] = ValueError) -> Exception:
        """An exception in one form: dataset, fault and remedy, section of DATASETS.md."""
        return kind(f"{self.name}: {text}; see DATASETS.md, section {self.spec.title}")

    def remedy(self, download: str, own: str = "correct it") -> str:
        """What helps with faulty data: another for a download than for a user's own images."""
        return own if self.spec.place else download

    def missing(
        self, text: str, remedy: str = "", kind: type[Exception] = FileNotFoundError
    ) -> Exception:
        """An exception for data that is not there: the remedy is to move it, if it is near."""
        with suppress(OSError):  # of folders that may not be read
            remedy = suggest_fix(self) or remedy
        return self.error(f"{text}; {remedy}" if remedy else text, kind)

    def unreadable(self, path: Path, fault: str) -> Exception:
        """An exception for a file whose content is not what it should be, by its first bytes."""
        words = (
            detect_placeholder_file(path) if path.is_file() else None
        )  # a pipe would be waited for
        return self.error(f"{path} is {words}" if words else f"{path} {fault}")


def find_dataset_dir(
    name: str, spec: DatasetInfo, root_path: str | os.PathLike | None, prepare: bool = True
) -> DatasetDir:
    """Find a dataset's folder: the first of its names that has most of what it should hold.

    Args:
        name: The dataset's name in the table.
        spec: Its row.
        root_path: The folder of all datasets; needed where the row says so.
        prepare: Make the folder where it is missing and the row says how. Without it, such a
            row's folder need not be there.

    Raises:
        ValueError: No root_path, or the folder could not be made.
        FileNotFoundError: The root or the dataset's folder is not there.
    """
    if spec.place:
        return DatasetDir(name, spec, spec.place.parent, spec.place)
    names, section = " or ".join(spec.folders), f"see DATASETS.md, section {spec.title}"
    if not root_path and spec.needs_root:
        raise ValueError(f"{name} needs --root_path, the folder with {names} in it; {section}")
    root = resolve_root(root_path)
    if root_path and not os.path.isdir(root):
        raise FileNotFoundError(f"--root_path {root} is not a folder; {section}")
    preferred = DatasetDir(name, spec, root, root / spec.folders[0])
    if spec.prepare:
        try:
            if prepare:
                spec.prepare(preferred.folder)
        except OSError as error:
            raise preferred.error(str(error)) from error
        return preferred
    folders = [root / folder for folder in spec.folders if os.path.isdir(root / folder)]
    if not folders:
        remedy = "put the dataset there or correct --root_path"
        raise preferred.missing(f"there is no {names} in {root}", remedy)

    def completeness(folder: Path) -> tuple[bool, bool]:  # `max` keeps the first of equals
        return spec.lies_in(folder), bool(spec.split) and os.path.isfile(folder / spec.split)

    return DatasetDir(name, spec, root, max(folders, key=completeness))


def resolve_root(root_path: str | os.PathLike | None) -> Path:
    """The folder of all datasets, or of those that are made.

    Raises:
        ValueError: None is named, and this user has no home.
    """
    root = os.path.expanduser(os.fspath(root_path or DEFAULT_ROOT))
    if not root_path and not os.path.isabs(root):
        raise ValueError("this user has no home folder: name a folder with --root_path")
    return Path(root)


def suggest_fix(source: DatasetDir) -> str:
    """What to move or rename where the data lies deeper or under another name, or ""."""
    spec, root, home = source.spec, source.root, source.folder
    if not spec.lies_in(home):
        if root.name in spec.folders and spec.lies_in(root):
            return f"name the folder above, {root.parent}, as --root_path"
        for name in (*spec.folders, *spec.aliases):
            for folder in _three_levels(root / name):
                if spec.lies_in(folder):
                    return _move(folder, home)
    hints = []
    for wanted in spec.image_folders(home):
        nested = wanted / wanted.name
        if wanted != home and os.path.isdir(nested):  # cars_train/cars_train
            hints.append(_move(nested, wanted))
        for place in [] if os.path.isdir(wanted) else [home, root]:
            for found in [place / alias for alias in spec.image_aliases]:
                if os.path.isdir(found) and list_subdirs(found):
                    # torchvision's $DATA/SUN397/a is the image folder, not the dataset's.
                    home = root / spec.folders[0] if found == home else home
                    return _move(found, home / spec.images)
    for name, remedy in spec.others:
        hints += [f"{p / name} is {remedy}" for p in (home, root) if os.path.isdir(p / name)]
    return "; ".join(hints)


def _move(found: Path, wanted: Path) -> str:
    """The instruction that brings a folder to where it is looked for."""
    if os.path.isdir(wanted):
        return f"move all that is in {found} to {wanted}"
    return f"{'rename' if found.parent == wanted.parent else 'move'} {found} to {wanted}"


def _three_levels(folder: Path) -> Iterator[Path]:
    """A folder, the folders in it, and the folders in those."""
    level = [folder] if os.path.isdir(folder) else []
    for _ in range(3):
        yield from level
        level = [path / name for path in level for name in list_subdirs(path)]


def group_by_label(entries: Iterable[RawSample]) -> list[list[RawSample]]:
    """Entries of each class, the classes in order of first appearance."""
    groups: dict[int, list[RawSample]] = {}
    for entry in entries:
        groups.setdefault(entry[1], []).append(entry)
    return list(groups.values())


def natural_sort(names: Iterable[str]) -> list[str]:
    """Distinct names, sorted; by value where all of them are numbers."""
    names = sorted(set(names))
    numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names)
    return sorted(names, key=float) if numbers else names


def list_images(folder: str | os.PathLike) -> list[str]:
    """Sorted names of a folder's images; hidden files and other types are left out."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(IMAGE_TYPES)
        and not entry.name.startswith(".")
        and exists(entry.is_file)
    )


def list_subdirs(folder: str | os.PathLike) -> list[str]:
    """Sorted names of a folder's sub-folders, without hidden ones and left-overs."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".")
        and entry.name.lower() not in IGNORED_DIRS
        and exists(entry.is_dir)
    )


def exists(kind: Callable[[], bool]) -> bool:
    """Whether an entry of a folder is of a kind, its link followed; a link to itself is of none."""
    try:
        return kind()
    except OSError:
        return False
