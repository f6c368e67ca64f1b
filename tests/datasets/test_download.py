"""`python -m datasets --fetch`: torchvision's downloads, from a server on loopback."""

import io
import json
import shutil
import tarfile
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from dataset_helpers import make_dataset
from scipy.io import savemat

from datasets import dataset_fingerprint
from datasets.__main__ import main
from datasets.download import DOWNLOADS

BY_HAND = {  # without the split file
    "oxford_flowers": ["cat_to_name.json"],
    "sun397": ["ClassName.txt", "Training_01.txt", "Testing_01.txt"],
}


def archived(folder, name):
    """The bytes of an archive of all that is in a folder."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
    return file.getvalue()


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def real_archives(name, folder, data):
    """The files that a dataset's page has, of the content of a small copy, `data`."""

    def packed(archive, **parts):
        """One archive: of these parts of the copy, each under its name in it."""
        place = folder / archive.replace(".", "-")
        for below, part in parts.items():
            target = place / below.replace("__", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if (data / part).is_dir():
                shutil.copytree(data / part, target, dirs_exist_ok=True)
            else:
                shutil.copy(data / part, target)
        return place

    if name == "dtd":
        place = packed("dtd-r1.0.1.tar.gz", dtd__images="images")
        write(place / "dtd/labels/train1.txt", "banded/banded_0000.jpg\n")
        return {"dtd-r1.0.1.tar.gz": archived(place, ".tar.gz")}
    if name == "eurosat":
        return {"EuroSAT.zip": archived(packed("EuroSAT", **{"2750": "2750"}), ".zip")}
    if name == "fgvc":
        place = packed("fgvc", **{"fgvc-aircraft-2013b__data": "."})
        shutil.copy(
            data / "images_variant_train.txt",
            place / "fgvc-aircraft-2013b/data/images_variant_trainval.txt",
        )
        return {"fgvc-aircraft-2013b.tar.gz": archived(place, ".tar.gz")}
    if name == "oxford_flowers":
        ids = io.BytesIO()
        savemat(ids, {key: np.arange(1, 4) for key in ("trnid", "valid", "tstid")})
        return {
            "102flowers.tgz": archived(packed("jpg", jpg="jpg"), ".tgz"),
            "imagelabels.mat": (data / "imagelabels.mat").read_bytes(),
            "setid.mat": ids.getvalue(),
        }
    if name == "food101":
        place = packed("food", **{"food-101__images": "images"})
        write(place / "food-101/meta/train.json", json.dumps({"apple_pie": []}))
        return {"food-101.tar.gz": archived(place, ".tar.gz")}
    if name == "oxford_pets":
        return {
            f"{part}.tar.gz": archived(packed(part, **{part: part}), ".tar.gz")
            for part in ("images", "annotations")
        }
    if name == "sun397":
        place = packed("SUN", SUN397="SUN397", SUN397__ClassName="ClassName.txt")
        (place / "SUN397/ClassName").rename(place / "SUN397/ClassName.txt")
        return {"SUN397.tar.gz": archived(place, ".tar.gz")}
    place = packed("101", **{"101_ObjectCategories": "101_ObjectCategories"})
    for file in (".directory", "readme.txt"):  # torchvision takes all that is there for classes
        (place / "101_ObjectCategories" / file).unlink()
    inner = archived(place, ".tar.gz")
    (folder / "zip/caltech-101").mkdir(parents=True)
    (folder / "zip/caltech-101/101_ObjectCategories.tar.gz").write_bytes(inner)
    (folder / "zip/__MACOSX").mkdir()
    return {"caltech-101.zip": archived(folder / "zip", ".zip")}


@pytest.fixture
def page(monkeypatch):
    """Serves `files` by name whatever the address before it; `stop` breaks a file's answer off.

    A digest is good where the content is the one that is served.
    """
    page = SimpleNamespace(files={}, stop={}, asked=[], digests=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name, start = self.path.rsplit("/", 1)[-1], 0
            content, asked = page.files.get(name), self.headers["Range"]
            if content is None:
                return self.send_error(404)
            if asked:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            page.asked.append((name, start))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : page.stop.get(name)])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    usual = urllib.request.OpenerDirector.open

    def here(opener, request, *args, **options):
        name = request.full_url.rsplit("/", 1)[-1]
        request.full_url = f"http://127.0.0.1:{server.server_port}/{name}"
        return usual(opener, request, *args, **options)

    def good(path, md5, **_):
        page.digests.append((Path(path).name, md5))
        return Path(path).read_bytes() == page.files[Path(path).name]

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", here)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", good)
    yield page
    server.shutdown()
    server.server_close()


def prepared(name, page, tmp_path):
    """Serve a dataset's files; return the folder of the copy that they were made of."""
    make_dataset(name, tmp_path / "copy", split=False, size=(8, 8))
    (data,) = (path for path in (tmp_path / "copy").iterdir())
    page.files = real_archives(name, tmp_path / "archives", data)
    (tmp_path / "data").mkdir()
    return data


def fetch(name, tmp_path):
    return main(["--fetch", name, "--root_path", str(tmp_path / "data")])


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_fetched_dataset_lies_as_datasets_md_says(name, page, tmp_path, capsys):
    copy = prepared(name, page, tmp_path)
    status = fetch(name, tmp_path)
    said = capsys.readouterr()
    if "gdown" in said.err:
        pytest.skip("this version of torchvision takes it from Google Drive")
    assert not said.err, said.err
    said = said.out
    (folder,) = (tmp_path / "data").iterdir()
    assert folder.name == copy.name and not any(folder.glob(".*"))
    assert name == "fgvc" or {file for file, _ in page.digests} == set(page.files)
    assert all(len(md5) == 32 for _, md5 in page.digests)
    by_hand = BY_HAND.get(name, [])
    assert all(f"{file}" in said for file in by_hand)
    for file in by_hand:
        shutil.copy(copy / file, folder)
    assert dataset_fingerprint(name, tmp_path / "data") == dataset_fingerprint(name, copy.parent)
    assert name == "fgvc" or "is to be fetched by hand, into the same folder, from https://" in said
    assert status == 1 and f"{name}: fetched into {folder}" in said  # far fewer than published


def test_a_download_goes_on_where_it_broke_off(page, tmp_path, capsys):
    prepared("oxford_pets", page, tmp_path)
    page.stop = {"annotations.tar.gz": 100}
    assert fetch("oxford_pets", tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "broke off after 100 bytes" in error and "the same command goes on" in error
    half = tmp_path / "data/oxford_pets/.fetch/oxford-iiit-pet/images/Abyssinian_1.jpg"
    half.unlink()  # as where the process was killed while it unpacked
    page.stop, page.asked = {}, []
    fetch("oxford_pets", tmp_path)
    assert page.asked == [("annotations.tar.gz", 100)]
    dataset_fingerprint("oxford_pets", tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data/oxford_pets").iterdir()) == [
        "annotations", "images",
    ]  # fmt: skip


def test_what_is_there_is_left_alone(page, tmp_path, capsys):
    prepared("food101", page, tmp_path)
    home = tmp_path / "data" / "Food101"
    write(home / "split_zhou_Food101.json", "mine")
    write(home / "meta/mine.txt", "mine")
    fetch("food101", tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["Food101"]
    assert (home / "split_zhou_Food101.json").read_text() == "mine"
    assert [path.name for path in (home / "meta").iterdir()] == ["mine.txt"]
    assert "by hand" not in capsys.readouterr().out
    before, page.asked = content(home), []
    assert fetch("food101", tmp_path) == 1
    assert content(home) == before and page.asked == []
    assert f"is there already, in {home}" in capsys.readouterr().out
    home.rename(tmp_path / "data" / "food41")  # as Kaggle calls it
    assert fetch("food101", tmp_path) == 2 and page.asked == []
    assert f"rename {tmp_path}/data/food41 to" in capsys.readouterr().err


def test_damage_ends_in_one_sentence_and_the_next_attempt_begins_anew(page, tmp_path, capsys):
    prepared("fgvc", page, tmp_path)  # torchvision knows no digest of it
    whole, page.files = page.files, dict.fromkeys(page.files, b"<html>moved</html>")
    assert fetch("fgvc", tmp_path) == 2
    assert "not a whole archive" in capsys.readouterr().err
    page.files = {}
    assert fetch("fgvc", tmp_path) == 2 and "404" in capsys.readouterr().err
    page.files = whole
    fetch("fgvc", tmp_path)
    dataset_fingerprint("fgvc", tmp_path / "data")


def test_what_torchvision_cannot_download_is_said_with_the_place_that_helps(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert fetch("stanford_cars", tmp_path) == 2
    error = capsys.readouterr().err
    assert "section Stanford Cars" in error and "valid: sun397, fgvc" in error
