"""Names, paths, folders and devices, and which file each of them means."""

import hashlib
import importlib
import io
import sys
from pathlib import Path

import pytest
import torch
from clip_helpers import CONFIGS, TINY_VIT, Server, random_state_dict
from PIL import Image
from safetensors.torch import save_file

import clip
from clip import download, loading, model_config
from utils import detect_placeholder_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 350939004\n"
PAGES = [
    "<!DOCTYPE html><html><body>403 Forbidden</body></html>",
    "\n <HTML>\n",
    '<?xml version="1.0"?>\n<!DOCTYPE html>',
    "<!-- a proxy's -->\n<html lang=en>",
]


@pytest.fixture
def state():
    return random_state_dict(TINY_VIT)


def refused(name, kind=ValueError):
    """The one sentence that `check` and `load` refuse a name with."""
    with pytest.raises(kind) as checked:
        clip.validate_name(name)
    with pytest.raises(kind) as loaded:
        clip.load(name, "cpu")
    sentence = str(loaded.value)
    assert sentence == str(checked.value) and "\n" not in sentence and not sentence.endswith(".")
    return sentence


def test_the_nine_models_are_available_under_their_names():
    assert clip.available_models()[:9] == list(CONFIGS)
    assert set(clip.available_models()[9:]) == set(loading.BUNDLED_MODELS)
    for name in clip.available_models():
        clip.validate_name(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [("ViT-B16", "ViT-B/16"), ("vit-b/32", "ViT-B/32"), ("RN50x46", "RN50x4"), ("rn101", "RN101")],
)
def test_an_unknown_name_gets_the_nearest_one(name, near):
    assert f"unknown model '{name}': did you mean {near}?" in refused(name)


@pytest.mark.parametrize("name", ["resnext", "openai/clip-vit-base-patch16"])
def test_an_unknown_name_gets_the_list(name):
    said = refused(name)
    assert all(known in said for known in clip.available_models())
    assert ("hf download openai/clip-vit-base-patch16" in said) == ("/" in name)


@pytest.mark.parametrize("path", ["missing.pt", "a/b/missing.ckpt", "missing.safetensors", "/no/x"])
def test_a_path_that_leads_nowhere_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert path in refused(path, FileNotFoundError)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pt"])
@pytest.mark.parametrize("text", [POINTER, *PAGES], ids=["LFS", "page", "html", "xml", "comment"])
def test_a_pointer_or_a_web_page_is_called_that(text, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_text(text)
    remedy = "git lfs pull" if text == POINTER else "a web page, not the file itself: download"
    assert remedy in refused(path) and refused(path).startswith(f"{path} is a ")


def test_other_files_are_not_taken_for_pointers_and_pages(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "x.txt").write_text("<body and soul>, said a list of class names")
    (tmp_path / "x.svg").write_text('<?xml version="1.0"?><svg></svg>')
    for name in ("x.pt", "x.txt", "x.svg", "missing", "."):
        assert detect_placeholder_file(tmp_path / name) is None or name == "x.txt"


# Folders


def test_a_folder_means_its_checkpoint_safetensors_first(state, tmp_path):
    names = ["anything.pt", "open_clip_pytorch_model.bin", "pytorch_model.bin"]
    names += ["open_clip_model.safetensors", "model.safetensors"]
    for name in names:
        (save_file if name.endswith("tensors") else torch.save)(state, tmp_path / name)
        assert clip.resolve_checkpoint(tmp_path) == tmp_path / name
        clip.validate_name(tmp_path)
    assert clip.load(tmp_path, "cpu")[0].vocab_size == 514


def test_a_folder_without_one_checkpoint_is_refused(state, tmp_path):
    assert "holds no checkpoint" in refused(tmp_path, FileNotFoundError)
    for name in ("a.pt", "b.pth"):
        torch.save(state, tmp_path / name)
    assert "several checkpoints (a.pt, b.pth): name one of them" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "split into several files (model.safetensors.index.json)" in refused(tmp_path)


# open_clip's names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("open_clip:ViT-B-32", "should be open_clip:NAME/PRETRAINED"),
        ("open_clip:ViT-B-99/openai", "no model 'ViT-B-99'"),
        ("open_clip:ViT-B-32/nobody", "no weights 'nobody' for ViT-B-32: it has openai, "),
        ("open_clip:ViT-B-16-SigLIP/webli", "SigLIP"),
        ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("open_clip:convnext_base/laion400m_s13b_b51k", "timm trunk"),
        ("open_clip:ViT-L-14-CLIPA/datacomp1b", "no layer norm before"),
        ("open_clip:xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k", "Hugging Face text tower"),
    ],
)
def test_open_clips_names_that_cannot_be_used_are_refused(name, words):
    pytest.importorskip("open_clip")
    assert words in refused(name)


@pytest.mark.parametrize(
    ("name", "activation", "heads"),
    [
        ("ViT-B-32/laion2b_s34b_b79k", "gelu", (12, 8)),
        ("ViT-B-32/openai", "quickgelu", (12, 8)),
        ("ViT-B-32-quickgelu/laion400m_e32", "quickgelu", (12, 8)),
        ("ViT-H-14/laion2b_s32b_b79k", "gelu", (16, 16)),
        ("ViT-g-14/laion2b_s34b_b88k", "gelu", (16, 16)),
        ("ViT-bigG-14/laion2b_s39b_b160k", "gelu", (16, 20)),
        ("RN50x4/openai", "quickgelu", (40, 10)),
    ],
)
def test_open_clip_says_how_its_models_were_trained(name, activation, heads):
    pytest.importorskip("open_clip")
    said, _ = model_config.from_open_clip_pretrained(f"open_clip:{name}")
    assert (said.activation, said.heads) == (activation, heads)
    assert said.normalisation == (clip.OPENAI_MEAN, clip.OPENAI_STD)


def test_open_clips_weights_come_from_open_clip_or_from_a_file(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("ViT-S-32-alt").state_dict()
    torch.save(model, tmp_path / "x.pt")
    ours, _ = clip.load(f"open_clip:ViT-S-32-alt/{tmp_path / 'x.pt'}", "cpu")
    assert (ours.activation, ours.heads) == ("gelu", (6, 4))

    asked = []

    def bring(source, hub, folder):
        asked.append(hub)
        if hub:
            raise RuntimeError("The hub\ncannot be reached. And so on.")
        return str(tmp_path / "x.pt")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", bring)
    assert clip.resolve_checkpoint("open_clip:ViT-B-32/openai") == tmp_path / "x.pt" and asked == [
        True,
        False,
    ]
    name = "open_clip:ViT-B-32/laion2b_s34b_b79k"  # which has the hub alone
    with pytest.raises(ConnectionError, match=r"79k \(The hub cannot be reached\): get the file"):
        clip.load(name, "cpu")


def test_without_open_clip_its_names_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in refused("open_clip:ViT-B-32/openai")


# Devices, downloads, other systems


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            clip.load(tmp_path / "missing.pt", device=device)
    with pytest.raises(ValueError, match="must be quickgelu or gelu, not 'relu'"):
        clip.load("ViT-Tiny/8", "cpu", activation="relu")


def test_a_shipped_model_is_verified(monkeypatch, tmp_path, state):
    torch.save(state, tmp_path / "tiny.pt")
    sha256 = download.sha256_file(tmp_path / "tiny.pt")
    monkeypatch.setattr(loading, "WEIGHTS_DIR", tmp_path)
    monkeypatch.setattr(loading, "BUNDLED_MODELS", {"Tiny": ("tiny.pt", sha256)})
    model, preprocess = clip.load("Tiny", device="cpu")
    assert model.vocab_size == 514
    assert preprocess(Image.new("L", (50, 40))).shape == (3, 32, 32)
    (tmp_path / "tiny.pt").write_text(POINTER)
    with pytest.raises(ValueError, match="tiny.pt is a Git LFS pointer"):
        clip.load("Tiny")
    (tmp_path / "tiny.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match="tiny.pt has a wrong SHA-256"):
        clip.load("Tiny")
    (tmp_path / "tiny.pt").unlink()
    with pytest.raises(FileNotFoundError, match="Tiny are missing at"):
        clip.load("Tiny")


@pytest.mark.parametrize("named", [True, False])
def test_a_name_is_downloaded_to_the_folder_named_or_the_cache(tmp_path, monkeypatch, state, named):
    file = io.BytesIO()
    torch.save(state, file)
    sha256 = hashlib.sha256(file.getvalue()).hexdigest()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(loading._MODELS, "RN50", ("RN50.pt", sha256))
    folder = tmp_path / "weights" if named else Path.home() / ".cache" / "clip"
    with Server(file.getvalue()) as server:
        monkeypatch.setattr(loading, "MODELS_URL", server.url)
        server.status = 404
        with pytest.raises(ConnectionError, match=f"{sha256}/RN50.pt .*place it at {folder}/RN50"):
            clip.load("RN50", "cpu", folder if named else None)
        server.status = None
        model, _ = clip.load("RN50", "cpu", folder if named else None)
    assert torch.equal(model.logit_scale.detach(), state["logit_scale"])
    assert [path.name for path in folder.iterdir()] == ["RN50.pt"]


def test_clip_can_be_imported_where_unix_modules_are_missing(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "clip"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.import_module("clip")
    assert fresh is not clip and fresh.load("ViT-Tiny/8", "cpu")[0].vocab_size == 514
