"""`python -m datasets --fetch`: torchvision's downloads, of archives like the real ones."""

import io
import json
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

BY_HAND = {  # needed without the split file
    "oxford_flowers": ["cat_to_name.json"],
    "sun397": ["ClassName.txt", "Training_01.txt", "Testing_01.txt"],
}


def archive(name, parts):
    """The bytes of an archive of files and folders, by their name in it."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as writer:
            for inside, part in parts.items():
                for path in sorted(part.rglob("*")) if part.is_dir() else [part]:
                    writer.write(path, Path(inside) / path.relative_to(part))
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as writer:
            for inside, part in parts.items():
                writer.add(part, inside)
    return file.getvalue()


def real_archives(name, data, tmp_path):
    """The files that a dataset's page has, made of a small copy in `data`."""
    extra = tmp_path / "extra"
    if name == "dtd":
        extra.write_text("banded/banded_0000.jpg\n")
        parts = {"dtd/images": data / "images", "dtd/labels/train1.txt": extra}
        return {"dtd-r1.0.1.tar.gz": archive(".tar.gz", parts)}
    if name == "eurosat":
        return {"EuroSAT.zip": archive(".zip", {"2750": data / "2750"})}
    if name == "fgvc":
        shutil.copy(data / "images_variant_train.txt", data / "images_variant_trainval.txt")
        return {"fgvc-aircraft-2013b.tar.gz": archive(".gz", {"fgvc-aircraft-2013b/data": data})}
    if name == "oxford_flowers":
        savemat(
            extra.with_suffix(".mat"), {k: np.arange(1, 4) for k in ("trnid", "valid", "tstid")}
        )
        return {
            "102flowers.tgz": archive(".tgz", {"jpg": data / "jpg"}),
            "imagelabels.mat": (data / "imagelabels.mat").read_bytes(),
            "setid.mat": extra.with_suffix(".mat").read_bytes(),
        }
    if name == "food101":
        extra.write_text(json.dumps({"apple_pie": []}))
        parts = {"food-101/images": data / "images", "food-101/meta/train.json": extra}
        return {"food-101.tar.gz": archive(".tar.gz", parts)}
    if name == "oxford_pets":
        return {
            f"{part}.tar.gz": archive(".tar.gz", {part: data / part})
            for part in ("images", "annotations")
        }
    if name == "sun397":
        parts = {"SUN397": data / "SUN397", "SUN397/ClassName.txt": data / "ClassName.txt"}
        return {"SUN397.tar.gz": archive(".tar.gz", parts)}
    images = data / "101_ObjectCategories"
    for file in (".directory", "readme.txt"):  # torchvision takes all that is there for classes
        (images / file).unlink()
    extra.write_bytes(archive(".tar.gz", {"101_ObjectCategories": images}))
    return {"caltech-101.zip": archive(".zip", {"caltech-101/101_ObjectCategories.tar.gz": extra})}


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
    copy = make_small_dataset(name, tmp_path / "copy", split=False)
    served.update(real_archives(name, copy, tmp_path))
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
    copy = make_small_dataset("food101", tmp_path / "copy", split=False)
    served.update(real_archives("food101", copy, tmp_path))
    home = tmp_path / "data/Food101"
    (home / "meta").mkdir(parents=True)
    for path in (home / "split_zhou_Food101.json", home / "meta/mine.txt"):
        path.write_text("mine")
    fetch("food101", tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["Food101"]
    assert (home / "split_zhou_Food101.json").read_text() == "mine"
    assert [path.name for path in (home / "meta").iterdir()] == ["mine.txt"]
    served.clear()
    capsys.readouterr()
    assert fetch("food101", tmp_path) == 1
    assert f"is already in {home}" in capsys.readouterr().out
    home.rename(tmp_path / "data/food41")  # as Kaggle calls it
    assert fetch("food101", tmp_path) == 2
    assert f"rename {tmp_path}/data/food41 to" in capsys.readouterr().err


def test_broken_download_starts_again(served, tmp_path, capsys):
    copy = make_small_dataset("fgvc", tmp_path / "copy")
    files = real_archives("fgvc", copy, tmp_path)
    whole = files["fgvc-aircraft-2013b.tar.gz"]
    for content in (b"<html>moved</html>", whole[: len(whole) // 2], None):
        served.update({} if content is None else dict.fromkeys(files, content))
        if content is None:
            served.clear()
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
