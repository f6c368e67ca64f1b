"""Downloads from named hosts that resume, are verified, and only then take their name."""

import fcntl
import hashlib
import http.client
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Whom a request or a redirection may address; the scheme is part of it.
ORIGINS = {"https://openaipublic.azureedge.net", "https://raw.githubusercontent.com"}
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16  # bytes, what a cut connection can lose at most


def cache_folder() -> Path:
    """Where downloads go unless a folder is named: ~/.cache/clip.

    Raises:
        FileNotFoundError: if this user has no home.
    """
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise FileNotFoundError("this user has no home folder: set the variable HOME to one")
    return Path(home) / ".cache" / "clip"


def digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def fetch(url: str, target: Path, sha256: str) -> Path:
    """Make sure that a file is there and has its digest, downloading it where it is not.

    What has arrived waits beside the target as `<name>.part`, so that a download that was cut
    goes on where it stopped. A process that is writing there holds a lock on it, and others wait.
    A file of another digest under the target's name is downloaded again, and replaced only when
    that has succeeded.

    Args:
        url: where the file comes from; below one of ORIGINS.
        target: where it is to lie.
        sha256: its digest, in hexadecimal digits.

    Returns:
        The target.

    Raises:
        ConnectionError: if the file does not arrive, or only a part of it; the message says
            which file to place where.
        OSError: if it cannot be written.
        ValueError: if what arrived has another digest; it is deleted.
    """
    if target.is_file():
        if digest(target) == sha256:
            return target
        print(f"{target} has a wrong SHA-256: downloading it again.", file=sys.stderr)
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as file:
            if target.is_file() and digest(target) == sha256:  # another process was faster
                partial.unlink()
                return target
            _download(url, file, target, sha256)
            if digest(partial) != sha256:
                partial.unlink()
                raise ValueError(
                    f"What came from {url} has a wrong SHA-256 and was deleted: run the same "
                    f"command again, or get {target.name} elsewhere and place it at {target}."
                )
            os.replace(partial, target)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror or error}): make room or correct the "
            f"permissions and run the same command again, or place the file from {url} there."
        ) from error
    return target


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read and write, made where it is missing, once no other process has it."""
    while True:
        with open(path, "r+b", opener=_create) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Another process is downloading {path}: waiting for it.", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
            if not _is_at(file, path):
                continue  # whoever had it renamed or deleted it
            try:
                yield file
            finally:
                if _is_at(file, path) and not path.stat().st_size:
                    path.unlink()
            return


def _create(path: str, flags: int) -> int:
    """Open what is there, or make it."""
    return os.open(path, flags | os.O_CREAT, 0o666)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is what lies under this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _download(url: str, file: BinaryIO, target: Path, sha256: str) -> None:
    """Complete a partial file, or start it anew where the server cannot continue it."""
    start = file.seek(0, os.SEEK_END)
    try:
        response = _open(url, start)
        if response is None:  # no byte behind the partial file: it is complete, or another's
            if digest(file.name) == sha256:
                return
            response, start = _open(url, 0), 0
        elif start and not _continues(response, start):
            if response.status == 206:
                response.close()
                response = _open(url, 0)
            start = 0
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        code = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        wrong = "has a wrong SHA-256" if target.exists() else "is missing"
        raise ConnectionError(
            f"{target} {wrong} and cannot be downloaded ({code}{reason}): get the file from "
            f"{url} on a machine that can, and place it at {target}."
        ) from None

    length = response.headers["Content-Length"]
    total = start + int(length) if (length or "").isdecimal() else None
    done, cut = start, ""
    file.seek(start)
    file.truncate()
    with response, _progress(target.name, start, total) as advance:
        while not cut:
            try:
                chunk = response.read(CHUNK)
            except http.client.IncompleteRead as error:
                chunk, cut = error.partial, "the connection closed"
            except (OSError, http.client.HTTPException) as error:
                chunk, cut = b"", str(error) or type(error).__name__
            if not chunk:
                break
            file.write(chunk)
            done += len(chunk)
            advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done < total:
        cut = cut or "the connection closed"
    if cut:
        of = f" of {total:,}" if total is not None else ""
        raise ConnectionError(
            f"The download of {url} stopped after {done:,}{of} bytes ({cut}): run the same "
            f"command again to resume it, or place the file at {target}."
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to ORIGINS alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: D102
        _check_origin(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_origin(url: str) -> None:
    """Refuse whatever is not one of the named hosts, or is so without TLS."""
    parts = urllib.parse.urlsplit(url)
    if f"{parts.scheme}://{parts.netloc}" not in ORIGINS:
        raise urllib.error.URLError(f"{url} is none of {', '.join(sorted(ORIGINS))}")


def _open(url: str, start: int) -> http.client.HTTPResponse | None:
    """Ask for a file from some byte on; None if the server says that nothing lies there."""
    _check_origin(url)
    headers = {"User-Agent": "SO"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        # An opener and a context of its own: others in this process may have loosened theirs.
        https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
        opener = urllib.request.build_opener(https, _Redirects)
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return None
        raise


def _continues(response: http.client.HTTPResponse, start: int) -> bool:
    """Whether an answer is the part of the file that was asked for."""
    match = re.match(r"bytes (\d+)-", response.headers["Content-Range"] or "")
    return response.status == 206 and match is not None and int(match[1]) == start


@contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show what arrives: a bar on a terminal, elsewhere a line for every tenth."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=name, initial=done, total=total, unit="B", unit_scale=True) as bar:
            yield bar.update
        return
    step = total / 10 if total else 50e6  # bytes
    of = f" of {total / 1e6:.1f}" if total else ""

    def advance(count: int) -> None:
        nonlocal done
        if done // step < (done + count) // step:
            print(f"{name}: {(done + count) / 1e6:.1f}{of} MB", file=sys.stderr, flush=True)
        done += count

    yield advance
