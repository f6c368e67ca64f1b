"""Names, paths and folders, and the file that each of them means."""

import hashlib
import io
import sys
from pathlib import Path

import pytest
import torch
from clip_helpers import CONFIGS, TINY_VIT, Server, random_state_dict
from safetensors.torch import save_file

import clip
from clip import loading, model_config
from clip.loading import resolve_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 350939004\n"
PAGE = '<?xml version="1.0"?>\n<!-- a proxy -->\n<!DOCTYPE html><html>403 Forbidden</html>'


@pytest.fixture
def state():
    return random_state_dict(TINY_VIT)


def refused(name, kind=ValueError):
    """The sentence that `validate_name` and `load` refuse a name with."""
    with pytest.raises(kind) as validated:
        clip.validate_name(name)
    with pytest.raises(kind) as loaded:
        clip.load(name, "cpu")
    message = str(loaded.value)
    assert message == str(validated.value) and "\n" not in message and not message.endswith(".")
    return message


def test_available_models():
    assert clip.available_models() == [*CONFIGS, *loading.BUNDLED_MODELS]
    for name in clip.available_models():
        clip.validate_name(name)


def test_unknown_name_gets_a_hint():
    assert "unknown model 'vit-b16' (did you mean 'ViT-B/16'?)" in refused("vit-b16")
    message = refused("openai/clip-vit-base-patch16")
    assert all(name in message for name in clip.available_models())
    assert "hf download openai/clip-vit-base-patch16" in message


@pytest.mark.parametrize("path", ["missing.pt", "a/b/missing.ckpt", "/no/x"])
def test_missing_path_is_named(path):
    assert path in refused(path, FileNotFoundError)


@pytest.mark.parametrize("text", [POINTER, PAGE], ids=["LFS", "page"])
def test_placeholder_file_is_named(text, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text(text)
    remedy = "git lfs pull" if text == POINTER else "a web page, not the file itself: download"
    assert remedy in refused(path) and refused(path).startswith(f"{path} is a ")


def test_folder_prefers_safetensors(state, tmp_path):
    names = ["anything.pt", "open_clip_pytorch_model.bin", "pytorch_model.bin"]
    names += ["open_clip_model.safetensors", "model.safetensors"]
    for name in names:
        (save_file if name.endswith("tensors") else torch.save)(state, tmp_path / name)
        assert resolve_checkpoint(tmp_path) == tmp_path / name
        clip.validate_name(tmp_path)
    assert clip.load(tmp_path, "cpu")[0].vocab_size == 514


def test_folder_without_one_checkpoint(state, tmp_path):
    assert "holds no checkpoint" in refused(tmp_path, FileNotFoundError)
    for name in ("a.pt", "b.pth"):
        torch.save(state, tmp_path / name)
    assert "several checkpoints (a.pt, b.pth): name one of them" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "split into several files (model.safetensors.index.json)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("open_clip:ViT-B-32", "should be open_clip:NAME/PRETRAINED"),
        ("open_clip:ViT-B-16-SigLIQ/webli", "no model 'ViT-B-16-SigLIQ' (did you mean"),
        ("open_clip:ViT-B-16-SigLIP/webly", "SigLIP (did you mean 'webli'?): it has webli"),
    ],
)
def test_unsupported_open_clip_name(name, words):
    pytest.importorskip("open_clip")
    assert words in refused(name)


@pytest.mark.parametrize(
    ("name", "activation", "heads"),
    [
        ("ViT-B-32/laion2b_s34b_b79k", "gelu", (12, 8)),
        ("ViT-B-32/openai", "quickgelu", (12, 8)),
        ("ViT-bigG-14/laion2b_s39b_b160k", "gelu", (16, 20)),
        ("RN50x4/openai", "quickgelu", (40, 10)),
    ],
)
def test_open_clip_configs(name, activation, heads):
    pytest.importorskip("open_clip")
    config, _ = model_config.from_open_clip_pretrained(f"open_clip:{name}")
    assert (config.activation, config.heads) == (activation, heads)
    assert config.normalization == (clip.OPENAI_MEAN, clip.OPENAI_STD)


def test_open_clip_weights(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    file = tmp_path / "x.pt"
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), file)
    model, _ = clip.load(f"open_clip:ViT-S-32-alt/{file}", "cpu")
    assert (model.activation, model.heads) == ("gelu", (6, 4))

    download = "open_clip.pretrained.download_pretrained"
    monkeypatch.setattr(download, lambda record, cache_dir: str(file))
    name = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    assert resolve_checkpoint(name) == file

    def fail(record, cache_dir):
        raise RuntimeError("The hub\ncannot be reached. And so on.")

    monkeypatch.setattr(download, fail)
    with pytest.raises(ConnectionError, match=r"79k \(The hub cannot be reached\): get the file"):
        clip.load(name, "cpu")


def test_missing_open_clip_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in refused("open_clip:ViT-B-32/openai")


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="must be quickgelu or gelu, not 'relu'"):
        clip.load("ViT-Tiny/8", "cpu", activation="relu")


@pytest.mark.parametrize("named", [True, False])
def test_load_downloads(tmp_path, monkeypatch, state, named):
    file = io.BytesIO()
    torch.save(state, file)
    sha256 = hashlib.sha256(file.getvalue()).hexdigest()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(loading._MODELS, "ViT-L/14@336px", sha256)
    folder = tmp_path / "weights" if named else Path.home() / ".cache" / "clip"
    args = "ViT-L/14@336px", "cpu", folder if named else None
    with Server(file.getvalue()) as server:
        monkeypatch.setattr(loading, "MODELS_URL", server.url)
        server.status = 404
        with pytest.raises(ConnectionError, match=f"{sha256}/ViT-L-14-336px.pt .*at {folder}/ViT"):
            clip.load(*args)
        server.status = None
        model, _ = clip.load(*args)
    assert torch.equal(model.logit_scale.detach(), state["logit_scale"])
    assert [path.name for path in folder.iterdir()] == ["ViT-L-14-336px.pt"]
