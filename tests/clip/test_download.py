"""Downloads from a server on loopback that is reliable, or not in one way or another."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from clip_helpers import Server

from clip import download
from clip.download import download_url

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(CONTENT) as server:
        yield server


def refused(kind, url, folder, sha256=SHA256):
    """The sentence that a download ends in; nothing is left of it."""
    with pytest.raises(kind) as caught:
        download_url(url, folder / "file", sha256)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_download_is_verified_and_kept(server, tmp_path):
    target = tmp_path / "new folder" / "file.bin"
    assert download_url(server.url, target, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    download_url(server.url, target, SHA256)
    assert server.requests == 1  # a file that is there is not asked for again


@pytest.mark.parametrize("chunked", [False, True])
def test_broken_download_starts_again(server, tmp_path, chunked):
    server.chunked, server.stop_after = chunked, [123_456, None]
    message = refused(ConnectionError, server.url, tmp_path)
    assert chunked or "it stopped after 123,456 of 300,000 bytes" in message
    assert f"get the file from {server.url}" in message
    assert f"place it at {tmp_path / 'file'}" in message
    assert download_url(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_download_gives_up_silent_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.stop_after, server.stall = [131_072], 0.3
    assert "timed out" in refused(ConnectionError, server.url, tmp_path)


def test_wrong_sha256_is_replaced(server, tmp_path, capsys):
    message = refused(ValueError, server.url, tmp_path, "0" * 64)
    assert "wrong SHA-256 and was deleted" in message
    target = tmp_path / "file"
    target.write_bytes(b"an older file")
    server.status = 503
    with pytest.raises(ConnectionError, match="file has a wrong SHA-256 and cannot be downloaded"):
        download_url(server.url, target, SHA256)
    assert target.read_bytes() == b"an older file"
    server.status = None
    download_url(server.url, target, SHA256)
    assert target.read_bytes() == CONTENT
    assert "has a wrong SHA-256: downloading" in capsys.readouterr().err


def test_unreachable_file_is_named(server, tmp_path):
    server.status = 404
    assert "404: Not Found" in refused(ConnectionError, server.url, tmp_path)
    message = refused(ConnectionError, "http://127.0.0.1:9/file", tmp_path)  # nobody listens
    assert "is missing and cannot be downloaded" in message
    assert "http://127.0.0.1:9/file" in message


def test_parallel_downloads_of_one_file(server, tmp_path):
    target = tmp_path / "file"
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(download_url, server.url, target, SHA256) for _ in range(4)]
    assert [future.result() for future in done] == [target] * 4
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]


def test_unwritable_target_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    with pytest.raises(OSError, match="no folder/file cannot be written .*correct the permissions"):
        download_url(server.url, tmp_path / "no folder/file", SHA256)
    (tmp_path / "no folder").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "open", full, raising=False)
    message = refused(OSError, server.url, tmp_path)
    assert "No space left on device" in message and "place the file from" in message
