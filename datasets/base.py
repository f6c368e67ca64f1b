"""What all datasets share: their records, the way to their folder, the listing of folders."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Path below the image folder, label, class name: as in a split file. Texts are what UTF-8 says,
# whatever the locale takes the names on the disk for (`on_disk`).
Entry = tuple[str, int, str]

PARTS = ("train", "val", "test")
TEMPLATE = ["a photo of a {}."]
DEFAULT_ROOT = "~/.cache/so"  # of datasets that are made, not downloaded
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Item:
    """One image: where it is (root_path joined with what is below it), its label and class."""

    impath: str
    label: int
    classname: str


@dataclass(frozen=True)
class FewShotDataset:
    """The few images to adapt with, and all images to test on."""

    name: str
    train_x: list[Item]
    val: list[Item]
    test: list[Item]
    classnames: list[str]  # by label
    template: list[str]  # prompts with {} for the class name
    published: bool  # False when the split was made here, from the raw download
    data: dict  # split, digest and numbers of all images that it could draw or test on


@dataclass(frozen=True)
class Split:
    """All entries of a dataset."""

    train: list[Entry]
    val: list[Entry]
    test: list[Entry]
    classnames: list[str]  # by label
    published: bool = True


@dataclass(frozen=True)
class DatasetSpec:
    """One row of the table: where a dataset lies, how it is read, what is to be expected.

    Attributes:
        title: Its section in DATASETS.md.
        folders: Names of its folder below the root, in order of preference.
        images: The folder that paths start from, below the dataset's; "." for that one itself.
        split: The published split file; None where the download has lists of its own.
        read: Makes a split from the download, where there is no split file.
        classes: Published number of classes.
        counts: Published number of training, validation and test images; None for no such part.
        url: Official page.
        links: Folders below `images` that may lead elsewhere as an image folder may.
        together: Training and validation images are drawn at once (see `draw_shots`).
        prepare: Makes the dataset's folder where it is not there yet; nothing to download then.
    """

    title: str
    folders: tuple[str, ...]
    images: str
    split: str | None
    read: Callable[["Source"], Split] | None
    classes: int
    counts: tuple[int, int | None, int]
    url: str
    links: tuple[str, ...] = ()
    together: bool = False
    prepare: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Source:
    """A dataset's folder on this disk, and what was found to be wrong with it."""

    name: str
    spec: DatasetSpec
    folder: Path
    problems: list[Exception] = field(default_factory=list)

    @property
    def images(self) -> Path:
        """The folder that the entries' paths start from."""
        return self.folder / self.spec.images

    def locate(self, path: str) -> str:
        """Where an entry's path leads on this disk."""
        return os.path.join(self.images, on_disk(path))

    def error(self, text: str, kind: type[Exception] = ValueError) -> Exception:
        """An exception in the house's form: dataset, culprit and remedy, section of the manual."""
        return kind(f"{self.name}: {text}; see DATASETS.md, section {self.spec.title}")

    def report(self, text: str, kind: type[Exception] = ValueError) -> None:
        """Note a problem; reading goes on, for there may be more."""
        self.problems.append(self.error(text, kind))


def find_source(
    name: str, spec: DatasetSpec, root_path: str | os.PathLike | None, prepare: bool = True
) -> Source:
    """Find a dataset's folder: the first of its names that has most of what it should hold.

    Args:
        name: The dataset's name in the table.
        spec: Its row.
        root_path: The folder of all datasets; needed unless the row has `prepare`.
        prepare: Make the folder where it is not there and the row says how.

    Raises:
        ValueError: No root_path, or the folder could not be made.
        FileNotFoundError: The root or the dataset's folder is not there.
    """
    section = f"see DATASETS.md, section {spec.title}"
    if not root_path and not spec.prepare:
        names = " or ".join(spec.folders)
        raise ValueError(f"{name} needs --root_path, the folder with {names} in it; {section}")
    root = root_folder(root_path)
    if root_path and not os.path.isdir(root):
        raise FileNotFoundError(f"--root_path {root} is not a folder; {section}")
    if spec.prepare and prepare:
        try:
            spec.prepare(root / spec.folders[0])
        except OSError as error:
            raise ValueError(f"{name}: {error}; {section}") from error
    folders = [root / folder for folder in spec.folders if os.path.isdir(root / folder)]
    if not folders:
        raise FileNotFoundError(
            f"{name}: there is no {' or '.join(spec.folders)} in {root}; put the dataset there "
            f"or correct --root_path; {section}"
        )
    source = Source(name, spec, max(folders, key=lambda folder: _completeness(spec, folder)))
    if not os.path.isdir(source.images):
        source.report(f"the image folder {source.images} is missing", FileNotFoundError)
    return source


def root_folder(root_path: str | os.PathLike | None) -> Path:
    """The folder of all datasets, or of those that are made.

    Raises:
        ValueError: None is named, and this user has no home.
    """
    root = os.path.expanduser(os.fspath(root_path or DEFAULT_ROOT))
    if not root_path and not os.path.isabs(root):
        raise ValueError("this user has no home folder: name a folder with --root_path")
    return Path(on_disk(root))


def on_disk(path: str) -> str:
    """A path as Python spells it in this locale: in C's, a letter may be two odd characters.

    Raises:
        ValueError: It cannot be the name of a file.
    """
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def as_text(name: str) -> str:
    """The text of a file's name, whatever the locale; the opposite of `on_disk`."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _completeness(spec: DatasetSpec, folder: Path) -> tuple[bool, bool]:
    """Whether images and the split file are there; `max` keeps the first of equals."""
    split = spec.split is not None and os.path.isfile(folder / spec.split)
    return os.path.isdir(folder / spec.images), split


def few_of(names: Iterable[str]) -> str:
    """The first few names, and how many more there are, on one line whatever they hold."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:5]) + more


def list_images(folder: str | os.PathLike) -> list[str]:
    """Sorted names of a folder's images; hidden files and other types are left out."""
    return sorted(
        as_text(entry.name)
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(IMAGE_TYPES)
        and not entry.name.startswith(".")
        and there(entry.is_file)
    )


def list_folders(folder: str | os.PathLike) -> list[str]:
    """Sorted names of a folder's sub-folders, hidden ones left out."""
    return sorted(
        as_text(entry.name)
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and there(entry.is_dir)
    )


def there(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link to itself is of none."""
    try:
        return kind()
    except OSError:
        return False
