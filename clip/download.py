"""Download files that are verified by their SHA-256 before they take their name."""

import hashlib
import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 30.0  # seconds without a byte
MAX_ATTEMPTS = 3
CHUNK_SIZE = 1 << 16  # bytes


def cache_dir() -> Path:
    """Where downloads go by default: ~/.cache/clip."""
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise FileNotFoundError("this user has no home folder: set the variable HOME to one")
    return Path(home) / ".cache" / "clip"


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
        ConnectionError: The file did not arrive; the message says which file to place where.
        OSError: It cannot be written.
        ValueError: What arrived has another SHA-256; it is deleted.
    """
    if target.is_file():
        if sha256_file(target) == sha256:
            return target
        print(f"note: {target} has a wrong SHA-256: downloading it again", file=sys.stderr)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download_with_retries(url, partial)
        if sha256_file(partial) != sha256:
            raise ValueError(
                f"what came from {url} has a wrong SHA-256 and was deleted: run the same command "
                f"again, or get {target.name} elsewhere and place it at {target}"
            )
        os.replace(partial, target)
    except ConnectionError as error:
        problem = "has a wrong SHA-256" if target.exists() else "is missing"
        raise ConnectionError(
            f"{target} {problem} and cannot be downloaded ({error}): get the file from {url} on a "
            f"machine that can, and place it at {target}"
        ) from None
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror or error}): make room or correct the "
            f"permissions and run the same command again, or place the file from {url} there"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return target


def _download_with_retries(url: str, path: Path) -> None:
    """Download a file, and start again where the connection breaks."""
    print(f"note: downloading {url}", file=sys.stderr)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return _download(url, path)
        except ConnectionError as error:
            if attempt == MAX_ATTEMPTS or not path.exists():  # no answer, or a refusal
                raise
            print(f"note: the download of {url} {error}: starting again", file=sys.stderr)


def _download(url: str, path: Path) -> None:
    """Write what comes from an address to a file; any failure of it is a ConnectionError."""
    # A context of its own: other code in this process may have switched verification off. And
    # torch.hub's downloader would wait for a silent server for ever.
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    request = urllib.request.Request(url, headers={"User-Agent": "SO"})
    try:
        response = urllib.request.build_opener(https).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionError(f"{error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{getattr(error, 'reason', error)}") from None

    total = int(response.headers["Content-Length"] or 0)  # 0: unknown
    bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=None)
    with response, open(path, "wb") as file, bar:
        for chunk in _read_chunks(response, total):
            file.write(chunk)
            bar.update(len(chunk))


def _read_chunks(response: http.client.HTTPResponse, total: int) -> Iterator[bytes]:
    """Yield the body of a response; raise a ConnectionError where it ends early."""
    done, reason = 0, "the connection closed"
    try:
        while chunk := response.read(CHUNK_SIZE):
            yield chunk
            done += len(chunk)
        if done >= total:
            return
    except (OSError, http.client.HTTPException) as error:
        reason = str(error)
    of_total = f" of {total:,}" if total else ""
    raise ConnectionError(f"stopped after {done:,}{of_total} bytes ({reason})")
