"""Downloads from a server on loopback that is reliable, or not in one way or another."""

import hashlib

import numpy as np
import pytest
from clip_helpers import Server

from clip import download

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(CONTENT) as server:
        yield server


def test_a_download_takes_its_name_once_it_is_whole(server, tmp_path):
    target = tmp_path / "new folder" / "file.bin"
    assert download.fetch(server.url, target, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert server.requests == [None]
    download.fetch(server.url, target, SHA256)
    assert server.requests == [None]  # a file that is there is not asked for again


@pytest.mark.parametrize("have", [1, 100_000, 299_999])
def test_a_partial_download_is_resumed(server, tmp_path, have):
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == [f"bytes={have}-"]


def test_a_complete_partial_file_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == ["bytes=300000-"]


@pytest.mark.parametrize("part", [b"x" * 300_000, b"x" * 400_000])
def test_a_partial_file_that_is_too_long_or_anothers_is_begun_anew(server, tmp_path, part):
    (tmp_path / "file.part").write_bytes(part)
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(part)}-", None]


def test_a_server_without_ranges_sends_the_file_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_a_server_that_continues_elsewhere_is_asked_for_the_whole(server, tmp_path):
    server.shift = 5
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-", None]


def test_a_connection_that_is_cut_leaves_a_part_to_resume(server, tmp_path):
    server.stop_after = 123_456
    with pytest.raises(ConnectionError, match="after 123,456 of 300,000 bytes.*to resume it"):
        download.fetch(server.url, tmp_path / "file", SHA256)
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:123_456]
    server.stop_after = None
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=123456-"]


def test_a_chunked_answer_that_is_cut_leaves_a_part_to_resume(server, tmp_path):
    server.chunked, server.stop_after = True, 123_456
    with pytest.raises(ConnectionError, match="after [0-9,]+ bytes.*to resume it"):
        download.fetch(server.url, tmp_path / "file", SHA256)
    arrived = (tmp_path / "file.part").stat().st_size
    assert arrived > 50_000
    server.stop_after = None
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={arrived}-"]


def test_a_server_that_stops_sending_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.stop_after, server.stall = 131_072, 0.5
    with pytest.raises(ConnectionError, match="after 131,072 of 300,000 bytes .*timed out"):
        download.fetch(server.url, tmp_path / "file", SHA256)


@pytest.mark.parametrize("have", [0, 1000])
def test_a_wrong_digest_leaves_nothing_behind(server, tmp_path, have):
    if have:
        (tmp_path / "file.part").write_bytes(b"x" * have)
    wrong = "0" * 64 if not have else SHA256
    with pytest.raises(ValueError, match="wrong SHA-256 and was deleted"):
        download.fetch(server.url, tmp_path / "file", wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_wrong_digest_is_replaced_once_the_right_one_is_there(
    server, tmp_path, capsys
):
    target = tmp_path / "file"
    target.write_bytes(b"an older file")
    server.status = 503
    with pytest.raises(ConnectionError, match="file has a wrong SHA-256 and cannot be downloaded"):
        download.fetch(server.url, target, SHA256)
    assert target.read_bytes() == b"an older file"
    server.status = None
    download.fetch(server.url, target, SHA256)
    assert target.read_bytes() == CONTENT
    assert "wrong SHA-256: downloading it again" in capsys.readouterr().err


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_refusing_server_is_quoted_with_the_file_to_place(server, tmp_path, status):
    server.status = status
    with pytest.raises(ConnectionError) as caught:
        download.fetch(server.url, tmp_path / "file", SHA256)
    assert f"({status} " in str(caught.value)
    assert server.url in str(caught.value)
    assert f"place it at {tmp_path / 'file'}" in str(caught.value)


def test_a_download_reports_every_tenth_where_there_is_no_terminal(server, tmp_path, capsys):
    server.content = bytes(2_000_000)
    sha256 = hashlib.sha256(server.content).hexdigest()
    download.fetch(server.url, tmp_path / "weights.pt", sha256)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "weights.pt: 2.0 of 2.0 MB"


def test_a_download_shows_a_bar_on_a_terminal(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.sys.stderr, "isatty", lambda: True, raising=False)
    download.fetch(server.url, tmp_path / "weights.pt", SHA256)
    shown = capsys.readouterr().err
    assert "weights.pt: 100%" in shown
    assert "300k/300k" in shown
    assert "B/s" in shown
