"""`python -m datasets --fetch`: torchvision's downloads, of archives like the real ones."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from dataset_helpers import make_small_dataset
from scipy.io import savemat

from datasets import dataset_fingerprint
from datasets.__main__ import main
from datasets.download import DOWNLOADS

# Each archive on a dataset's page: what is where in it, by paths in the dataset's folder. A file
# that is no archive has no such paths.
PAGES = {
    "sun397": {"SUN397.tar.gz": {"SUN397": "SUN397", "SUN397/ClassName.txt": "ClassName.txt"}},
    "fgvc": {"fgvc-aircraft-2013b.tar.gz": {"fgvc-aircraft-2013b/data": "."}},
    "eurosat": {"EuroSAT.zip": {"2750": "2750"}},
    "food101": {"food-101.tar.gz": {"food-101/images": "images", "food-101/meta": "meta"}},
    "oxford_pets": {
        "images.tar.gz": {"images": "images"},
        "annotations.tar.gz": {"annotations": "annotations"},
    },
    "oxford_flowers": {"102flowers.tgz": {"jpg": "jpg"}, "imagelabels.mat": {}, "setid.mat": {}},
    "caltech101": {
        "101_ObjectCategories.tar.gz": {"101_ObjectCategories": "101_ObjectCategories"},
        "caltech-101.zip": {"caltech-101/101_ObjectCategories.tar.gz": "inner"},
    },
    "dtd": {"dtd-r1.0.1.tar.gz": {"dtd/images": "images", "dtd/labels": "labels"}},
}
BY_HAND = {  # needed without the split file
    "oxford_flowers": ["cat_to_name.json"],
    "sun397": ["ClassName.txt", "Training_01.txt", "Testing_01.txt"],
}


def archive(name, parts, folder):
    """The bytes of an archive."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as writer:
            for inside, part in parts.items():
                for path in [folder / part, *(folder / part).rglob("*")]:
                    writer.write(path, Path(inside) / path.relative_to(folder / part))
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as writer:
            for inside, part in parts.items():
                writer.add(folder / part, inside)
    return file.getvalue()


def make_page(name, root):
    """Return the folder of a small copy, and the files that its dataset's page has, by name."""
    folder = make_small_dataset(name, root, split=False)
    files = {}
    if name == "fgvc":
        shutil.copy(folder / "images_variant_train.txt", folder / "images_variant_trainval.txt")
    if name == "food101":
        (folder / "meta").mkdir()
        (folder / "meta/train.json").write_text('{"apple_pie": []}')
    if name == "oxford_flowers":
        savemat(folder / "setid.mat", {key: np.arange(1, 4) for key in ("trnid", "valid", "tstid")})
    if name == "caltech101":
        for file in (".directory", "readme.txt"):  # torchvision takes all that is there for classes
            (folder / "101_ObjectCategories" / file).unlink()
    if name == "dtd":
        (folder / "labels").mkdir()
        (folder / "labels/train1.txt").write_text("banded/banded_0000.jpg\n")
    for file, parts in PAGES[name].items():
        files[file] = archive(file, parts, folder) if parts else (folder / file).read_bytes()
        (folder / "inner").write_bytes(files[file])  # for the archive around it
    (folder / "inner").unlink()
    return folder, files


@pytest.fixture
def served(monkeypatch):
    """Files by name, which torchvision's downloader gets whatever their address and digest."""
    files = {}

    def download_url(url, root, filename=None, md5=None, **_):
        path = Path(root) / (filename or url.rsplit("/", 1)[-1])
        if path.name not in files:
            raise RuntimeError(f"{url} is not found")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path.name])

    for module in (torchvision.datasets.utils, torchvision.datasets.flowers102):
        monkeypatch.setattr(module, "download_url", download_url)
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda *_, **__: True)
    return files


def fetch(name, tmp_path):
    (tmp_path / "data").mkdir(exist_ok=True)
    return main(["--fetch", name, "--root_path", str(tmp_path / "data")])


@pytest.mark.parametrize("name", DOWNLOADS)
def test_download_is_as_documented(served, tmp_path, capsys, name):
    copy, files = make_page(name, tmp_path / "copy")
    served.update(files)
    status = fetch(name, tmp_path)
    printed = capsys.readouterr()
    if "gdown" in printed.err:
        pytest.skip("this version of torchvision takes it from Google Drive")
    assert not printed.err, printed.err
    (folder,) = (tmp_path / "data").iterdir()
    assert folder.name == copy.name and not any(folder.glob(".*"))
    for file in BY_HAND.get(name, []):
        shutil.copy(copy / file, folder)
    assert dataset_fingerprint(name, tmp_path / "data") == dataset_fingerprint(name, copy.parent)
    assert name == "fgvc" or "from https://github.com/KaiyangZhou/CoOp" in printed.out
    assert status == 1 and f"{name}: downloaded to {folder}" in printed.out  # an incomplete one


def test_download_keeps_what_exists(served, tmp_path, capsys):
    served.update(make_page("food101", tmp_path / "copy")[1])
    home = tmp_path / "data/Food101"
    (home / "meta").mkdir(parents=True)
    mine = [home / "split_zhou_Food101.json", home / "meta/mine.txt"]
    for path in mine:
        path.write_text("mine")
    fetch("food101", tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["Food101"]
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert list((home / "meta").iterdir()) == mine[1:]
    served.clear()
    capsys.readouterr()
    assert fetch("food101", tmp_path) == 1
    assert f"is already in {home}" in capsys.readouterr().out
    home.rename(tmp_path / "data/food41")  # as Kaggle calls it
    assert fetch("food101", tmp_path) == 2
    assert f"rename {tmp_path}/data/food41 to" in capsys.readouterr().err


def test_broken_download_starts_again(served, tmp_path, capsys):
    _, files = make_page("fgvc", tmp_path / "copy")
    ((name, whole),) = files.items()
    for broken in ({name: b"<html>moved</html>"}, {name: whole[: len(whole) // 2]}, {}):
        served.clear()
        served.update(broken)
        assert fetch("fgvc", tmp_path) == 2
        error = capsys.readouterr().err
        assert "fgvc could not be downloaded" in error and "section FGVC-Aircraft" in error
    served.update(files)
    fetch("fgvc", tmp_path)
    assert dataset_fingerprint("fgvc", tmp_path / "data")["train"] == 12


def test_download_refuses_other_datasets(tmp_path, capsys):
    assert fetch("stanford_cars", tmp_path) == 2
    error = capsys.readouterr().err
    assert "section Stanford Cars" in error and "valid: sun397, fgvc" in error
