"""Downloads: torchvision's, with its addresses and digests, moved to where DATASETS.md has them.

An archive arrives, and is unpacked, in a hidden folder of the dataset's own; what is unpacked is
moved out whole, the images last. So a dataset that is there is whole, and nothing that was there
before is touched. An attempt that broke off is gone on with by the same command.
"""

import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import torchvision
from filelock import FileLock, Timeout

from datasets.base import DatasetDir, find_dataset_dir, resolve_root, suggest_fix
from datasets.catalog import DATASETS
from utils import Progress, format_error

DOWNLOADS = {  # torchvision's class, and the folder that it unpacks below its root
    "sun397": ("SUN397", "."),
    "fgvc": ("FGVCAircraft", "fgvc-aircraft-2013b/data"),
    "eurosat": ("EuroSAT", "eurosat"),
    "food101": ("Food101", "food-101"),
    "oxford_pets": ("OxfordIIITPet", "oxford-iiit-pet"),
    "oxford_flowers": ("Flowers102", "flowers-102"),
    "caltech101": ("Caltech101", "caltech101"),
    "dtd": ("DTD", "dtd/dtd"),
}
SPLITS = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"  # links all split files
ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".part")
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError)
WORK = ".fetch"  # the hidden folder
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20  # bytes


def download_dataset(name: str, root_path: str | os.PathLike) -> None:
    """Download a dataset into its folder below the root, and print what became of it.

    Raises:
        ValueError: torchvision cannot download it, it lies elsewhere below the root, another
            process is at it, or what arrived is damaged.
        OSError: It cannot be downloaded or written; the same command goes on from there.
    """
    if name not in DOWNLOADS:
        row = DATASETS.get(name)
        where = f"; DATASETS.md, section {row.title}, says where to get it" if row else ""
        raise ValueError(f"{name} cannot be fetched{where}; valid: {', '.join(DOWNLOADS)}")
    source = _place(name, root_path)
    work = source.folder / WORK
    if source.spec.lies_in(source.folder):
        print(f"{name} is there already, in {source.folder}: to fetch it anew, rename that folder")
    else:
        try:
            _download(source, work)
        except BROKEN as error:
            shutil.rmtree(work)  # of an archive without a digest nothing is known to be good
            raise source.error(
                f"what arrived is not a whole archive ({error}), and was deleted: run the same "
                "command again"
            ) from error
        except Timeout:
            raise source.error(f"another process is fetching it, in {work}") from None
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a wrong digest
            raise ConnectionError(
                f"{name} was not fetched ({format_error(error)}): the same command goes on with what "  # noqa: E501
                f"has arrived in {work}; or see DATASETS.md, section {source.spec.title}"
            ) from error
        print(f"{name}: fetched into {source.folder}")
    shutil.rmtree(work, ignore_errors=True)
    split = source.spec.split
    if split and not (source.folder / split).exists():
        print(f"{name}: {split} is to be fetched by hand, into the same folder, from {SPLITS}")


def _place(name: str, root_path: str | os.PathLike) -> DatasetDir:
    """Where a dataset lies, or is to lie.

    Raises:
        ValueError: It has been downloaded before, and lies elsewhere.
    """
    spec, root = replace(DATASETS[name], others=()), resolve_root(root_path)
    source = DatasetDir(name, spec, root, root / spec.folders[0])
    with suppress(FileNotFoundError):
        source = find_dataset_dir(name, spec, root_path)
    if hint := "" if spec.lies_in(source.folder) else suggest_fix(source):
        raise source.error(f"it has been downloaded to another place: {hint}")
    return source


def _download(source: DatasetDir, work: Path) -> None:
    """Have torchvision download and unpack a dataset, and move it to where it belongs."""
    maker, made = DOWNLOADS[source.name]
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock", timeout=0), resumable():
        discard_unpacked(work)  # torchvision would take half of a folder for the whole
        getattr(torchvision.datasets, maker)(work, download=True)
        found = [path for path in (work / made).iterdir() if not _is_archive(path)]
        for path in sorted(found, key=lambda path: path.name == source.spec.images):
            if path.name != "lock" and not os.path.lexists(source.folder / path.name):
                os.rename(path, source.folder / path.name)


def discard_unpacked(folder: Path) -> None:
    """Remove what was unpacked in a folder and those below it; archives stay, whole or in part."""
    for path in folder.iterdir():
        if path.is_dir():
            if any(map(_is_archive, path.iterdir())):
                discard_unpacked(path)
            else:
                shutil.rmtree(path)


def _is_archive(path: Path) -> bool:
    """Whether a file's name says that it is an archive, or has only arrived in part."""
    return path.name.endswith(ARCHIVES)


@contextmanager
def resumable() -> Iterator[None]:
    """Let torchvision's downloader go on where it broke off; it would begin anew."""
    tools = torchvision.datasets.utils
    usual, tools._urlretrieve = tools._urlretrieve, retrieve
    try:
        yield
    finally:
        tools._urlretrieve = usual


def retrieve(url: str, filename: str | os.PathLike, chunk_size: int = CHUNK) -> None:
    """Download a file in place of torchvision's function of these arguments.

    It is called FILE.part until it is whole. A part that is there is gone on with, if the server
    sends parts.

    Raises:
        OSError: It did not arrive whole, or cannot be written.
    """
    part = Path(f"{filename}.part")
    done = part.stat().st_size if part.exists() else 0
    agent = torchvision.datasets.utils.USER_AGENT
    request = urllib.request.Request(url, headers={"User-Agent": agent})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        response = urllib.request.build_opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        error.close()
        part.unlink()  # the server's file is no longer than that: it is another one by now
        return retrieve(url, filename, chunk_size)
    with response, open(part, "ab") as file:
        if response.status != 206:  # it sends the whole file
            done = file.truncate(0)
        total = None if response.length is None else (done + response.length) / 1e6
        with Progress(total and round(total), Path(filename).name, "MB", round(done / 1e6)) as bar:
            while chunk := response.read(chunk_size):
                file.write(chunk)
                done += len(chunk)
                bar.update(int(done / 1e6) - bar.count)
        if response.length:
            raise ConnectionError(f"{url} broke off after {done:,} bytes")
    os.replace(part, filename)
