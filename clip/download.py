"""Downloads from named hosts that are verified, and only then take their name."""

import hashlib
import http.client
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Whom a request or a redirection may address; the scheme is part of it.
ALLOWED_ORIGINS = {"https://openaipublic.azureedge.net", "https://raw.githubusercontent.com"}
TIMEOUT = 30.0  # seconds without a byte
MAX_RETRIES = 3  # a download that breaks off is begun anew so often
CHUNK = 1 << 16  # bytes


def cache_dir() -> Path:
    """Where downloads go unless a folder is named: ~/.cache/clip.

    Raises:
        FileNotFoundError: if this user has no home.
    """
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise FileNotFoundError("this user has no home folder: set the variable HOME to one")
    return Path(home) / ".cache" / "clip"


def sha256_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def download_url(url: str, target: Path, sha256: str) -> Path:
    """Make sure that a file is there and has its digest, downloading it where it is not.

    A file of another digest under the target's name is downloaded again, and replaced only when
    that has succeeded. Several processes may do so at once: each has a file of its own until the
    last moment.

    Args:
        url: where the file comes from; below one of ORIGINS.
        target: where it is to lie.
        sha256: its digest, in hexadecimal digits.

    Returns:
        The target.

    Raises:
        ConnectionError: if the file does not arrive whole; the message says which file to place
            where.
        OSError: if it cannot be written.
        ValueError: if what arrived has another digest; it is deleted.
    """
    if target.is_file():
        if sha256_file(target) == sha256:
            return target
        print(f"note: {target} has a wrong SHA-256: downloading it again", file=sys.stderr)
    # torch.hub's downloader waits for ever for a silent server and follows it to any host.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, MAX_RETRIES + 1):
            broken = _download(url, partial, target.name)
            if not broken:
                break
            if attempt < MAX_RETRIES:
                print(f"note: the download of {url} {broken}: starting again", file=sys.stderr)
        else:
            raise ConnectionError(f"it {broken}, {MAX_RETRIES} times")
        if sha256_file(partial) != sha256:
            raise ValueError(
                f"what came from {url} has a wrong SHA-256 and was deleted: run the same command "
                f"again, or get {target.name} elsewhere and place it at {target}"
            )
        os.replace(partial, target)
    except ConnectionError as error:
        wrong = "has a wrong SHA-256" if target.exists() else "is missing"
        raise ConnectionError(
            f"{target} {wrong} and cannot be downloaded ({error}): get the file from {url} on a "
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


def _download(url: str, partial: Path, name: str) -> str:
    """Write what comes from an address to a file; return how it broke off, or nothing.

    Raises:
        ConnectionError: if there is no answer at all, or a refusal.
        OSError: if the file cannot be written.
    """
    # An opener and a context of its own: others in this process may have loosened theirs.
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    opener = urllib.request.build_opener(https, _Redirects)
    request = urllib.request.Request(url, headers={"User-Agent": "SO"})
    try:
        _check_origin(url)
        response = opener.open(request, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        code = ""
        if isinstance(error, urllib.error.HTTPError):
            code = f"{error.code} "
            error.close()
        raise ConnectionError(f"{code}{reason}") from None

    length = response.headers["Content-Length"] or ""
    total = int(length) if length.isdecimal() else None
    done, broken = 0, ""
    with response, open(partial, "wb") as file, _progress(name, total) as advance:
        while not broken:
            try:
                chunk = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                chunk, broken = b"", str(error) or type(error).__name__
            if not chunk:
                break
            file.write(chunk)
            done += len(chunk)
            advance(len(chunk))
    if total is not None and done < total:
        broken = broken or "the connection closed"
    of = f" of {total:,}" if total is not None else ""
    return f"stopped after {done:,}{of} bytes ({broken})" if broken else ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to ORIGINS alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: D102
        try:
            _check_origin(newurl)
        except urllib.error.URLError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_origin(url: str) -> None:
    """Refuse whatever is not one of the named hosts, or is so without TLS."""
    parts = urllib.parse.urlsplit(url)
    if f"{parts.scheme}://{parts.netloc}" not in ALLOWED_ORIGINS:
        raise urllib.error.URLError(f"{url} is none of {', '.join(sorted(ALLOWED_ORIGINS))}")


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show what arrives: a bar on a terminal, elsewhere a line for every tenth."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=name, total=total, unit="B", unit_scale=True) as bar:
            yield bar.update
        return
    step = total / 10 if total else 50e6  # bytes
    of = f" of {total / 1e6:.1f}" if total else ""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        if done // step < (done + count) // step:
            print(f"{name}: {(done + count) / 1e6:.1f}{of} MB", file=sys.stderr, flush=True)
        done += count

    yield advance
