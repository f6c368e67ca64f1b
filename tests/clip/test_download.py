"""Downloads from a server on loopback that is reliable, or not in one way or another."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pytest

from clip import download
from clip.download import download_url

CONTENT = bytes(range(250)) * 1200
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Sends CONTENT, or as much of it as the server wants, or an error."""

    def do_GET(self):
        self.server.requests += 1
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: self.server.stop_after])
        time.sleep(self.server.stall)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.status, server.stop_after, server.stall, server.requests = 200, None, 0, 0
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def refused(kind, url, folder, sha256=SHA256):
    """The sentence that a download ends in; nothing is left of it."""
    with pytest.raises(kind) as caught:
        download_url(url, folder / "file", sha256)
    assert "\n" not in str(caught.value) and list(folder.iterdir()) == []
    return str(caught.value)


def test_download_is_verified_and_kept(server, tmp_path):
    target = tmp_path / "new folder" / "file.bin"
    for _ in range(2):
        assert download_url(server.url, target, SHA256) == target
        assert target.read_bytes() == CONTENT
        assert list(target.parent.iterdir()) == [target]
    assert server.requests == 1  # a file that is there is not asked for again


def test_broken_download_starts_again(server, tmp_path):
    server.stop_after = 123_456
    message = refused(ConnectionError, server.url, tmp_path)
    assert "it stopped after 123,456 of 300,000 bytes" in message
    assert f"get the file from {server.url}" in message and f"at {tmp_path / 'file'}" in message
    server.stop_after = None
    assert download_url(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_download_gives_up_silent_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.stop_after, server.stall = 131_072, 0.3
    assert "timed out" in refused(ConnectionError, server.url, tmp_path)


def test_wrong_sha256_is_replaced(server, tmp_path, capsys):
    assert "deleted" in refused(ValueError, server.url, tmp_path, "0" * 64)
    target = tmp_path / "file"
    target.write_bytes(b"an older file")
    server.status = 503
    with pytest.raises(ConnectionError, match="file has a wrong SHA-256 and cannot be downloaded"):
        download_url(server.url, target, SHA256)
    assert target.read_bytes() == b"an older file"
    server.status = 200
    download_url(server.url, target, SHA256)
    assert target.read_bytes() == CONTENT
    assert "has a wrong SHA-256: downloading" in capsys.readouterr().err


def test_unreachable_file_is_named(server, tmp_path):
    server.status = 404
    assert "404: Not Found" in refused(ConnectionError, server.url, tmp_path)
    message = refused(ConnectionError, "http://127.0.0.1:9/file", tmp_path)  # nobody listens
    assert "is missing and cannot be downloaded" in message and "127.0.0.1:9/file" in message


def test_parallel_downloads_of_one_file(server, tmp_path):
    target = tmp_path / "file"
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(download_url, server.url, target, SHA256) for _ in range(4)]
    assert [future.result() for future in done] == [target] * 4
    assert target.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [target]


def test_unwritable_target_is_named(server, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(download, "open", full, raising=False)
    assert "No space left on device" in refused(ConnectionError, server.url, tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(ConnectionError, match="x/file is missing .*place it at .*x/file"):
        download_url(server.url, tmp_path / "x" / "file", SHA256)
