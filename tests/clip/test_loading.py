"""Names, paths and folders, and the file that each of them means."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from safetensors.torch import save_file

import clip
from clip import loading, model_config
from clip.files import find_weight_file
from clip.loading import resolve_checkpoint

PLACEHOLDERS = {
    "git lfs pull": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 350939004\n",
    "web page": '<?xml version="1.0"?>\n<!-- a proxy -->\n<!DOCTYPE html><html>Forbidden</html>',
}


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
    vits = ["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "ViT-Tiny/8"]
    assert clip.available_models() == ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", *vits]
    for name in clip.available_models():
        clip.validate_name(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit-b16", "unknown model 'vit-b16' (did you mean 'ViT-B/16'?): known are RN50, RN101,"),
        ("openai/clip-vit-base-patch16", "`hf download openai/clip-vit-base-patch16 --local-dir"),
        ("hf-hub:ORG/NAME", "`hf download ORG/NAME --local-dir FOLDER`"),
        ("open_clip:ViT-B-32", "should be open_clip:NAME/PRETRAINED"),
        ("open_clip:ViT-B-16-SigLIQ/webli", "no model 'ViT-B-16-SigLIQ' (did you mean"),
        ("open_clip:ViT-B-16-SigLIP/webly", "SigLIP (did you mean 'webli'?): it has webli"),
    ],
)
def test_unknown_name_gets_a_hint(name, words):
    pytest.importorskip("open_clip")
    assert words in refused(name)


@pytest.mark.parametrize("path", ["missing.pt", "a/missing.pth.tar", "/no/x", "../x"])
def test_missing_path_is_named(path):
    assert path in refused(path, FileNotFoundError)


@pytest.mark.parametrize("words", PLACEHOLDERS)
def test_placeholder_file_is_named(words, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text(PLACEHOLDERS[words])
    assert words in refused(path) and refused(path).startswith(f"{path} is a ")


def test_folder_prefers_safetensors(state, tmp_path):
    names = ["anything.pt", "open_clip_pytorch_model.bin", "pytorch_model.bin"]
    names += ["open_clip_model.safetensors", "model.safetensors"]
    for name in names:
        (save_file if name.endswith("tensors") else torch.save)(state, tmp_path / name)
        assert find_weight_file(tmp_path) == tmp_path / name
    clip.validate_name(tmp_path)
    assert clip.load(f"local-dir:{tmp_path}", "cpu")[0].vocab_size == 514


def test_folder_without_one_checkpoint(tmp_path):
    assert "holds no checkpoint" in refused(tmp_path, FileNotFoundError)
    for name in ("a.pt", "b.pth"):
        (tmp_path / name).touch()
    assert "several checkpoints (a.pt, b.pth): name one of them" in refused(tmp_path)


def test_folders_are_searched_deeper(tmp_path):
    file, other = (tmp_path / f"checkpoint-{i}" / "model.safetensors" for i in (5, 9))
    file.parent.mkdir()
    file.touch()
    file.with_name("optimizer.pt").touch()
    assert find_weight_file(tmp_path) == file
    other.parent.mkdir()
    other.touch()
    assert "(checkpoint-5/model.safetensors, checkpoint-9/model.saf" in refused(tmp_path)


def test_open_clip_weights_decide_activation():
    pytest.importorskip("open_clip")
    for tag, activation in (("openai", "quickgelu"), ("laion2b_s34b_b79k", "gelu")):
        config, _ = model_config.from_open_clip_pretrained(f"open_clip:ViT-B-32/{tag}")
        assert (config.activation, config.image_mean) == (activation, clip.OPENAI_MEAN)


def test_open_clip_weights(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    file = tmp_path / "x.pt"
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), file)
    model, _ = clip.load(f"open_clip:ViT-S-32-alt/{file}", "cpu")
    assert (model.activation, model.heads) == ("gelu", (6, 4))

    download = "open_clip.pretrained.download_pretrained"
    monkeypatch.setattr(download, lambda record, cache_dir: str(file))
    name = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    assert resolve_checkpoint(name)[0] == file

    def fail(record, cache_dir):
        raise RuntimeError("The hub\ncannot be reached. And so on.")

    monkeypatch.setattr(download, fail)
    with pytest.raises(ConnectionError, match=r"79k \(The hub cannot be reached\): get the file"):
        clip.load(name, "cpu")


def test_missing_open_clip_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in refused("open_clip:ViT-B-32/openai")


@pytest.mark.parametrize("named", [True, False])
def test_load_downloads(tmp_path, monkeypatch, state, named):
    torch.save(state, tmp_path / "x.pt")
    sha256 = hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(loading, "MODELS_URL", tmp_path.as_uri())
    monkeypatch.setitem(loading._MODELS, "ViT-L/14@336px", sha256)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "weights" if named else Path.home() / ".cache" / "clip"
    args = "ViT-L/14@336px", "cpu", folder if named else None
    with pytest.raises(ConnectionError, match=f"{sha256}/ViT-L-14-336px.pt .*at {folder}/ViT"):
        clip.load(*args)
    (tmp_path / sha256).mkdir()
    (tmp_path / "x.pt").rename(tmp_path / sha256 / "ViT-L-14-336px.pt")
    model, _ = clip.load(*args)
    assert torch.equal(model.logit_scale.detach(), state["logit_scale"])
    assert [path.name for path in folder.iterdir()] == ["ViT-L-14-336px.pt"]
