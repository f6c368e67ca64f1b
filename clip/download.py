"""Download files that are verified by their SHA-256 before they take their name."""

import hashlib
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 30.0  # seconds without a byte


def cache_dir() -> Path:
    """Where downloads go by default: ~/.cache/clip."""
    return Path(os.path.expanduser("~/.cache/clip"))


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def download_url(url: str, target: Path, sha256: str) -> Path:
    """Download a file unless it is there; return its path.

    A file with another SHA-256 is downloaded again, and replaced once that has succeeded. Several
    processes may download one file at once.

    Raises:
        ConnectionError: It did not arrive; the message says which file to place where.
        ValueError: What arrived has another SHA-256.
    """
    problem = "is missing"
    if target.is_file():
        if sha256_file(target) == sha256:
            return target
        problem = "has a wrong SHA-256"
    print(f"note: {target} {problem}: downloading {url}", file=sys.stderr)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(url, partial)
        if sha256_file(partial) != sha256:
            raise ValueError(
                f"what came from {url} has a wrong SHA-256 and was deleted: run the same command "
                f"again, or get {target.name} elsewhere and place it at {target}"
            )
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is a response, too
        raise ConnectionError(
            f"{target} {problem} and cannot be downloaded ({error}): run the same command again "
            f"once that is mended, or get the file from {url} on a machine that can, and place it "
            f"at {target}"
        ) from None
    finally:
        if os.path.exists(partial):
            partial.unlink()
    return target


def _download(url: str, path: Path) -> None:
    # torch.hub's downloader would wait for a silent server for ever.
    opener = urllib.request.build_opener()
    with opener.open(url, timeout=TIMEOUT) as response, open(path, "wb") as file:
        total = int(response.headers["Content-Length"] or 0)  # 0: unknown
        with tqdm.wrapattr(file, "write", total=total or None, disable=None) as progress:
            shutil.copyfileobj(response, progress)
        if file.tell() < total:
            raise ConnectionError(f"it stopped after {file.tell():,} of {total:,} bytes")
