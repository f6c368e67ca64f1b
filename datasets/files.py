"""Folders and text files as people's disks have them."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

from utils import detect_placeholder_file

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".gif", ".bmp", ".ppm", ".pgm")
IMAGE_EXTENSIONS += (".tif", ".tiff", ".webp")
# What archives and file servers leave behind, besides hidden files; in lower case.
IGNORED_NAMES = ("__macosx", "@eadir", "@recycle", "lost+found", "$recycle.bin", "#recycle")
IGNORED_NAMES += ("#snapshot", "system volume information", "thumbs.db", "desktop.ini")
PathLike = str | os.PathLike


def list_images(folder: PathLike) -> list[str]:
    """Return the sorted names of a folder's images, by their extensions."""
    return [name for name in list_entries(folder)[0] if name.lower().endswith(IMAGE_EXTENSIONS)]


def list_subdirs(folder: PathLike) -> list[str]:
    """Return the sorted names of a folder's subfolders."""
    return list_entries(folder)[1]


def list_entries(folder: PathLike) -> tuple[list[str], list[str], list[str]]:
    """Return the sorted names of a folder's files, subfolders, and links that lead nowhere."""
    files, subdirs, dead_links = [], [], []
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name.lower() in IGNORED_NAMES:
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            dead_links.append(entry.name)
        elif entry.is_dir():
            subdirs.append(entry.name)
        elif entry.is_file():
            files.append(entry.name)
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
    try:
        return json.loads(read_text(path, remedy))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error
