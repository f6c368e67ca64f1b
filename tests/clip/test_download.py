"""Downloads from a server on loopback that is reliable, or not in one way or another."""

import hashlib
import shutil
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor

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


def refused(kind, url, folder, sha256=SHA256):
    """The one sentence that a download ends in; nothing is left of it."""
    with pytest.raises(kind) as caught:
        download.download_url(url, folder / "file", sha256)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_a_download_takes_its_name_once_it_is_whole(server, tmp_path):
    target = tmp_path / "new folder" / "file.bin"
    assert download.download_url(server.url, target, SHA256) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    download.download_url(server.url, target, SHA256)
    assert server.requests == 1  # a file that is there is not asked for again


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_breaks_off_starts_again(server, tmp_path, capsys, chunked):
    server.chunked, server.stop_after = chunked, [123_456, 200_000, None]
    assert download.download_url(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    said = capsys.readouterr().err
    assert server.requests == 3 and said.count("starting again") == 2
    assert chunked or "stopped after 123,456 of 300,000 bytes" in said


def test_a_download_that_always_breaks_off_says_which_file_to_place_where(server, tmp_path):
    server.stop_after = [123_456]
    said = refused(ConnectionError, server.url, tmp_path)
    assert server.requests == 3 and "after 123,456 of 300,000 bytes" in said
    assert f"get the file from {server.url}" in said and f"place it at {tmp_path / 'file'}" in said


def test_a_server_that_stops_sending_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    monkeypatch.setattr(download, "MAX_RETRIES", 1)
    server.stop_after, server.stall = [131_072], 0.3
    assert "timed out" in refused(ConnectionError, server.url, tmp_path)


def test_what_has_a_wrong_digest_is_deleted_or_replaced_once_the_right_one_is_there(
    server, tmp_path, capsys
):
    said = refused(ValueError, server.url, tmp_path, "0" * 64)
    assert "wrong SHA-256 and was deleted" in said
    target = tmp_path / "file"
    target.write_bytes(b"an older file")
    server.status = 503
    with pytest.raises(ConnectionError, match="file has a wrong SHA-256 and cannot be downloaded"):
        download.download_url(server.url, target, SHA256)
    assert target.read_bytes() == b"an older file"
    server.status = None
    download.download_url(server.url, target, SHA256)
    assert target.read_bytes() == CONTENT
    assert "wrong SHA-256: downloading it again" in capsys.readouterr().err


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusing_server_is_quoted_with_the_file_to_place(server, tmp_path, status):
    server.status = status
    said = refused(ConnectionError, server.url, tmp_path)
    assert f"({status} " in said and server.requests == 1
    assert server.url in said and f"place it at {tmp_path / 'file'}" in said


def test_without_a_network_the_file_to_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ALLOWED_ORIGINS", {"http://127.0.0.1:9"})  # nobody listens
    said = refused(ConnectionError, "http://127.0.0.1:9/file", tmp_path)
    assert "is missing and cannot be downloaded" in said and "http://127.0.0.1:9/file" in said


def test_progress_is_a_line_for_every_tenth_or_a_bar_on_a_terminal(
    server, tmp_path, monkeypatch, capsys
):
    server.content = bytes(2_000_000)
    sha256 = hashlib.sha256(server.content).hexdigest()
    download.download_url(server.url, tmp_path / "weights.pt", sha256)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "weights.pt: 2.0 of 2.0 MB"
    monkeypatch.setattr(download.sys.stderr, "isatty", lambda: True, raising=False)
    download.download_url(server.url, tmp_path / "again.pt", sha256)
    shown = capsys.readouterr().err
    assert "again.pt: 100%" in shown and "B/s" in shown


def test_downloads_come_from_two_hosts_over_tls():
    assert download.ALLOWED_ORIGINS == {
        "https://openaipublic.azureedge.net",
        "https://raw.githubusercontent.com",
    }


@pytest.mark.parametrize(
    "url",
    ["http://openaipublic.azureedge.net/x", "https://openaipublic.azureedge.net.evil.org/x"]
    + ["https://openaipublic.azureedge.net@evil.org/x", "https://evil.org/x", "file:///etc/passwd"]
    + ["https://openaipublic.azureedge.net:8443/x", "ftp://raw.githubusercontent.com/x"],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_no_other_address_is_asked(server, tmp_path, url, redirected):
    server.location = url if redirected else None
    said = refused(ConnectionError, server.url if redirected else url, tmp_path)
    assert "is none of" in said or "not allowed" in said
    assert server.requests == redirected


def test_a_redirection_to_a_named_host_is_followed(server, tmp_path):
    with Server(b"") as first:
        first.location = server.url
        assert download.download_url(first.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_host_that_cannot_prove_its_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    key, certificate, folder = tmp_path / "key.pem", tmp_path / "certificate.pem", tmp_path / "new"
    folder.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    # What other code in the process believes must not matter.
    monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)
    with Server(CONTENT, tls) as server:
        assert "certificate verify failed" in refused(ConnectionError, server.url, folder)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # once the user trusts it
        assert download.download_url(server.url, folder / "file", SHA256).read_bytes() == CONTENT


def test_several_that_download_one_file_do_not_disturb_each_other(server, tmp_path):
    server.delay = 0.1
    done = []
    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            done.append(
                threads.submit(download.download_url, server.url, tmp_path / "file", SHA256)
            )
    assert [future.result() for future in done] == [tmp_path / "file"] * 4
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_disk_that_is_full_and_a_folder_that_cannot_be_are_named(server, tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    with pytest.raises(OSError, match="no folder/file cannot be written .*correct the permissions"):
        download.download_url(server.url, tmp_path / "no folder/file", SHA256)
    (tmp_path / "no folder").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "open", full, raising=False)
    said = refused(OSError, server.url, tmp_path)
    assert "No space left on device" in said and "place the file from" in said
