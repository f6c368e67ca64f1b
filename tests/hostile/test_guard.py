"""What must not get in: links, hosts, names; and what odd machines must not break."""

import fcntl
import gzip
import hashlib
import json
import os
import re
import resource
import shutil
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from clip_helpers import TINY_VIT, Server, random_state_dict
from dataset_helpers import write_image

import clip
import main
import run_utils
from clip import download
from clip.tokenizer import MERGES_LIMIT, read_merges
from datasets import DATASETS
from datasets.base import find_source

ROOT = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


# The sources

FORBIDDEN = {  # what no line may hold: a line that does
    r"torch\.load\((?!.*weights_only=True)": "torch.load(path)",
    r"\byaml\.(?!safe_|YAMLError|SafeLoader|Alias|load\(.*=PlainLoader\))": "yaml.load(file)",
    r"shell=True|os\.(system|popen|spawn|exec)|getoutput": "subprocess.run(line, shell=True)",
    r"\beval\((?!\))|\bexec\(": "eval(text)",  # .eval() is a model's mode
    r"allow_pickle|np\.load\(|joblib|torch\.jit\.load\(": "np.load(path, allow_pickle=True)",
    r"pickle\.(?!_Unpickler|BUILD|BYTEARRAY8)|import (dill|marshal|shelve)": "pickle.loads(data)",
    r"urlopen|requests\.|_unverified_|verify=False|http://": "urllib.request.urlopen(url)",
    r"extractall|\.extract\(|unpack_archive": "archive.extractall(folder)",
    r"Image\.open\((?!path, formats=FORMATS)": "Image.open(path)",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_sources_have_nothing_that_runs_what_it_reads(pattern):
    assert re.search(pattern, FORBIDDEN[pattern])
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "tests" or inside.parts[0].startswith("."):
            continue
        text = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line.split("  #")[0] for line in text.splitlines()]
        found += [f"{inside}: {line.strip()}" for line in lines if re.search(pattern, line)]
    assert found == []


# Folders


@pytest.mark.parametrize("named", ["~nobody-of-this-name/data", "a" * 5000, "no\0where"])
def test_a_root_that_cannot_be_is_no_folder(named):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_source("eurosat", DATASETS["eurosat"], named)


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="no home folder: name a folder with --root_path"):
        find_source("digits", DATASETS["digits"], None)
    with pytest.raises(FileNotFoundError, match="no home folder: set the variable HOME"):
        clip.load("ViT-B/16", device="cpu")
    assert list(tmp_path.iterdir()) == []


# Clocks


def tiny_run(folder):
    """A dataset and a checkpoint, both below an odd folder, and the arguments of a run on them."""
    odd = folder / 'it\'s "d\u00f6nn\u00e9es"  \u6570\u636e'
    for label, name in enumerate(["\u00c7am", "\u68ee\u6797", "Ilgaz I"]):
        for index in range(4):
            path = odd / "dtd/images" / name / f"{name} '{index}'.jpg"
            write_image(path, label, index, (16, 16))
    state = random_state_dict({**TINY_VIT, "context_length": 48})
    weights = odd / "weights/k\u00fc\u00e7\u00fck \u0130.pt"
    weights.parent.mkdir()
    torch.save(state, weights)
    return [
        "--root_path", odd, "--dataset", "dtd", "--backbone", weights, "--n_iters", 2,
        "--num_workers", 1, "--save_path", odd / "sonu\u00e7lar", "--save_weights",
        "--threads", 1,
    ]  # fmt: skip


def results(folder):
    """The result of the only run below a folder, and its weights."""
    (result,) = folder.rglob("result.json")
    content = json.loads(result.read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(result.parent / "weights.safetensors")
    return content["final_accuracy"], {name: t.tolist() for name, t in tensors.items()}


def test_clocks_that_are_wrong_change_nothing(tmp_path, monkeypatch, capsys):
    argv = [str(part) for part in tiny_run(tmp_path)]
    far = time.time() + 40 * 365 * 86400
    for path in tmp_path.rglob("*"):
        os.utime(path, (far, far))
    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # backwards
    assert run_utils.exit_status(lambda: main.main(argv)) == 0, capsys.readouterr().err
    assert 0 <= results(tmp_path)[0] <= 100


# Downloads


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(CONTENT) as server:
        yield server


def test_downloads_come_from_two_hosts_over_tls():
    assert download.ORIGINS == {
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
    with pytest.raises(ConnectionError, match="cannot be downloaded .*(is none of|not allowed)"):
        download.fetch(server.url if redirected else url, tmp_path / "file", SHA256)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == redirected


def test_a_redirection_to_a_named_host_is_followed(server, tmp_path):
    with Server(b"") as first:
        first.location = server.url
        download.fetch(first.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_host_that_cannot_prove_its_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        + ["-addext", "subjectAltName=IP:127.0.0.1","-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    # What other code in the process believes must not matter.
    monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)
    with Server(CONTENT, tls) as server:
        with pytest.raises(ConnectionError, match="certificate verify failed"):
            download.fetch(server.url, tmp_path / "file", SHA256)
        assert not (tmp_path / "file").exists()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # once the user trusts it
        assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_one_of_many_downloads_a_file_and_the_others_wait(server, tmp_path, capsys):
    server.delay = 0.2
    errors = []

    def fetch():
        try:
            download.fetch(server.url, tmp_path / "file", SHA256)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == [] and server.requests == [None]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]
    assert "Another process is downloading" in capsys.readouterr().err


def test_a_lock_that_a_dead_process_held_holds_nobody_up(server, tmp_path):
    code = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); f.write('x' * 9)"
    code += "; f.flush(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "file.part"], check=False)
    assert (tmp_path / "file.part").stat().st_size == 9
    with pytest.raises(ValueError, match="wrong SHA-256 and was deleted"):
        download.fetch(server.url, tmp_path / "file", SHA256)
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_a_disk_without_locks_is_used_all_the_same(server, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT


def test_a_full_disk_is_named_and_what_arrived_is_used_later(server, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # no file may be longer
    try:
        with pytest.raises(OSError, match="file cannot be written .*make room") as caught:
            download.fetch(server.url, tmp_path / "file", SHA256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and not (tmp_path / "file").exists()
    have = (tmp_path / "file.part").read_bytes()
    assert have and CONTENT.startswith(have)
    assert download.fetch(server.url, tmp_path / "file", SHA256).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={len(have)}-"]


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    with pytest.raises(OSError, match="no folder/file cannot be written .*correct the permissions"):
        download.fetch(server.url, tmp_path / "no folder/file", SHA256)

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(download, "_create", read_only)
    with pytest.raises(OSError, match="Read-only file system.*place the file from"):
        download.fetch(server.url, tmp_path / "file", SHA256)
    assert server.requests == []


def test_a_list_of_merges_does_not_unpack_without_end(tmp_path):
    path = tmp_path / "merges.gz"
    path.write_bytes(gzip.compress(b"a" * (MERGES_LIMIT + 1)))
    with pytest.raises(ValueError, match="merges.gz is no merges file.*longer than"):
        read_merges(path)
