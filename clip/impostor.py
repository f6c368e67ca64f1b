"""Files that stand in place of others: Git LFS pointers, web pages."""

import os

POINTER = "a Git LFS pointer, not the file itself: run `git lfs pull`"
PAGE = "a web page, not the file itself: download it again"


def impostor(path: str | os.PathLike) -> str | None:
    """Say what a file is instead of what its name says, judged by its first bytes.

    Returns:
        Words such as "a Git LFS pointer, not the file itself: run `git lfs pull`", or None where
        the file is neither a pointer nor a web page, or cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return POINTER
    return PAGE if start.startswith((b"<!doctype html", b"<html")) else None
