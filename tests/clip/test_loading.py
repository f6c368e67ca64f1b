"""Checkpoints of every kind, good, damaged and hostile; names and devices."""

import hashlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from clip_helpers import CONFIGS, TINY_RESNET, TINY_VIT, Server, random_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import clip
from clip import download, loading
from clip.archive import read_archive
from clip.model import EXTRA_KEYS

jit = pytest.mark.filterwarnings("ignore")  # torch deprecates its own tracing and scripting


@pytest.fixture
def state():
    return random_state_dict(TINY_VIT)


class Hostile:
    """Runs a shell command when an ordinary unpickler meets it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Module(nn.Module):
    """Holds whatever tensors it is given, as parameters, buffers or plain attributes."""

    def __init__(self, **tensors):
        super().__init__()
        self.sizes = [3, 4]
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor):
        return x


def rewrite(source, target, change):
    """Copy a zip file, with change(name, content) in place of each content; None drops it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def traced(path, config, half=False):
    """Save a CLIP as a TorchScript archive, as OpenAI did, and return its state dict."""
    model = clip.build_model(random_state_dict(config))
    # The published archives hold sizes and masks as well.
    model.register_buffer("input_resolution", torch.tensor(7))
    model.transformer.resblocks[0].register_buffer("attn_mask", torch.zeros(16, 16))
    side = model.visual.input_resolution
    inputs = torch.zeros(1, 3, side, side), model.tokenize("a")
    script = torch.jit.trace(model, inputs)
    script = script.half() if half else script
    torch.jit.save(script, path)
    return script.state_dict()


# Reading checkpoints


def saved_plain(state, path):
    torch.save(state, path)


def saved_old_format(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def saved_nested(state, path):
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


def saved_safetensors(state, path):
    save_file(state, path)


@pytest.mark.parametrize(
    ("save", "file"),
    [
        (saved_plain, "model.pt"),
        (saved_plain, "model.unheard-of"),
        (saved_old_format, "model.pth"),
        (saved_nested, "model.bin"),
        (saved_safetensors, "model.safetensors"),
    ],
)
def test_every_way_of_saving_gives_the_same_model(save, file, state, tmp_path):
    save(state, tmp_path / file)
    model, preprocess = clip.load(tmp_path / file, device="cpu")
    back = model.state_dict()
    assert back.keys() == state.keys() - set(EXTRA_KEYS)
    assert all(torch.equal(back[key], state[key]) for key in back)
    assert not model.training
    assert preprocess(Image.new("L", (50, 40))).shape == (3, 32, 32)


@jit
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
def test_a_torchscript_archive_gives_its_state_dict(config, half, tmp_path):
    path = tmp_path / "model.pt"
    expected = traced(path, config, half)
    read = read_archive(path)
    assert read.keys() >= expected.keys()
    for key, value in expected.items():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key], value)

    model, _ = clip.load(path, device="cpu")
    assert model.dtype == torch.float32
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype))


@jit
def test_archives_keep_strides_types_and_shared_storages(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "turned": nn.Parameter(base.view(4, 6).T),
        "part": base[5:9],
        "every_second": base[::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "float16": torch.arange(3).half(),
        "brain16": torch.arange(3).bfloat16(),
        "float64": torch.arange(3).double(),
        "empty": torch.zeros(0, 4),
    }
    module = Module(**tensors)
    module.inner = Module(bytes=torch.arange(3, dtype=torch.uint8))
    torch.jit.save(torch.jit.script(module), tmp_path / "module.pt")
    read = read_archive(tmp_path / "module.pt")
    assert read.keys() == tensors.keys() | {"inner.bytes"}
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key], value)
    assert read["turned"].stride() == (1, 6)
    assert read["turned"].untyped_storage().data_ptr() == read["part"].untyped_storage().data_ptr()


@jit
def test_an_archives_code_is_never_run(tmp_path, monkeypatch):
    traced(tmp_path / "model.pt", TINY_VIT)

    def broken(name, content):
        return b"this is no program" if "/code/" in name else content

    path = rewrite(tmp_path / "model.pt", tmp_path / "broken.pt", broken)
    monkeypatch.delattr(torch.jit, "load")
    clip.load(path, device="cpu")


@jit
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda name, data: data[:-4] if name.endswith("data/0") else data,
            "storage 0 should hold",
        ),
        (lambda name, data: None if name.endswith("data/0") else data, "storage 0 is missing"),
        (lambda name, data: None if name.endswith("data.pkl") else data, "no data.pkl"),
        (lambda name, data: data[:-90] if name.endswith("data.pkl") else data, "broken.pt"),
    ],
)
def test_an_archive_that_lacks_something_is_refused(change, words, tmp_path):
    traced(tmp_path / "model.pt", TINY_VIT)
    path = rewrite(tmp_path / "model.pt", tmp_path / "broken.pt", change)
    with pytest.raises(ValueError, match=words):
        clip.load(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))]
    + [(0, (2,), (1, 1)), (0, (-2,), (1,))],
)
def test_a_tensor_beyond_its_storage_is_refused(offset, size, stride):
    from clip.archive import _Reader

    storage = torch.arange(4.0)
    assert _Reader.rebuild_tensor(storage, 0, (2, 2), (2, 1)).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="tensor"):
        _Reader.rebuild_tensor(storage, offset, size, stride)


def hostile_zip(marker, path):
    torch.save({"visual.proj": Hostile(marker)}, path)


def hostile_pickle(marker, path):
    path.write_bytes(pickle.dumps({"visual.proj": Hostile(marker)}))


def hostile_archive(marker, path, content=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", pickle.dumps(()))
        archive.writestr("model/data.pkl", content or pickle.dumps(Hostile(marker), 2))


def hostile_constants(marker, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", pickle.dumps(Hostile(marker), 2))
        archive.writestr("model/data.pkl", pickle.dumps({}, 2))


@pytest.mark.parametrize("save", [hostile_zip, hostile_pickle, hostile_archive, hostile_constants])
def test_nothing_in_a_hostile_checkpoint_is_executed(save, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "hostile.pt"
    save(marker, path)
    with pytest.raises(ValueError, match="hostile.pt .*(names .*system|no file that|no state)"):
        clip.load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "os system", "torch load", "torch.hub load", "torch.jit._pickle os.system"]
    + ["torch._utils _rebuild_tensor_v2.__globals__", "clip.archive zipfile.ZipFile"],
)
def test_an_archive_may_name_tensors_and_modules_only(name, tmp_path):
    module, attribute = name.split()
    content = b"\x80\x04" + b"".join(
        b"\x8c" + struct.pack("B", len(text)) + text.encode() for text in (module, attribute)
    )
    hostile_archive(None, tmp_path / "hostile.pt", content + b"\x93.")
    with pytest.raises(ValueError, match="which no CLIP needs"):
        clip.load(tmp_path / "hostile.pt")


def test_an_archive_that_contains_itself_is_refused(tmp_path):
    # A record whose attribute "a" is the record.
    content = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    hostile_archive(None, tmp_path / "endless.pt", content)
    with pytest.raises(ValueError, match="endless.pt holds no state dict"):
        clip.load(tmp_path / "endless.pt")


@jit
@pytest.mark.parametrize("cut", [0, 30])
def test_torch_is_never_given_a_zip_file(tmp_path, monkeypatch, cut):
    # Until 2.5, torch.load(weights_only=True) gave what it took for TorchScript to torch.jit.load.
    path = tmp_path / "model.pt"
    traced(path, TINY_VIT)
    path.write_bytes(path.read_bytes()[: -cut or None])
    monkeypatch.setattr(loading, "is_archive", lambda path: False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was given the archive"))
    with pytest.raises(ValueError, match="its end is missing" if cut else "holds no state dict"):
        clip.load(path)


def damaged(kind, path, state):
    torch.save(state, path)
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "short": whole[:1000],
        "half": whole[: len(whole) // 2],
        "headless": whole[1000:],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "zeros": bytes(5000),
    }
    path.write_bytes(contents[kind])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["empty", "short", "half", "headless", "text", "html", "zeros"])
def test_a_damaged_file_is_refused_in_one_sentence(kind, suffix, state, tmp_path):
    path = tmp_path / f"damaged{suffix}"
    damaged(kind, path, state)
    with pytest.raises(ValueError) as caught:
        clip.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a checkpoint that can be read safely")
    assert "get it again" in message
    assert "weights_only" not in message  # torch's advice to read it unsafely
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, "it lacks .* and 2 more.* CLIP such as OpenAI's"),
        ({"epoch": 3}, "holds no state dict: save"),
        ([1, 2], "holds no state dict: save"),
        (torch.zeros(3), "holds no state dict: save"),
        ({"state_dict": {}}, "holds no state dict: save"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt .*{words}"):
        clip.load(tmp_path / "other.pt")


# Names, paths, devices


def test_the_nine_models_are_available_under_their_names():
    assert clip.available_models()[:9] == list(CONFIGS)
    assert set(clip.available_models()[9:]) == set(loading.SHIPPED)


@pytest.mark.parametrize(
    ("name", "near"),
    [("ViT-B16", "ViT-B/16"), ("vit-b/32", "ViT-B/32"), ("RN50x46", "RN50x4"), ("rn101", "RN101")],
)
def test_an_unknown_name_gets_the_nearest_one(name, near):
    with pytest.raises(ValueError, match=f"Unknown model '{name}': did you mean {near}"):
        clip.load(name)


def test_an_unknown_name_gets_the_list():
    with pytest.raises(ValueError) as caught:
        clip.load("resnext")
    assert all(name in str(caught.value) for name in clip.available_models())


@pytest.mark.parametrize("path", ["missing.pt", "a/b/missing.ckpt", "missing.safetensors"])
def test_a_path_that_leads_nowhere_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=path):
        clip.load(path)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        clip.load(tmp_path)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            clip.load(tmp_path / "missing.pt", device=device)


def test_a_shipped_model_is_verified(monkeypatch, tmp_path, state):
    torch.save(state, tmp_path / "tiny.pt")
    sha256 = download.digest(tmp_path / "tiny.pt")
    monkeypatch.setattr(loading, "WEIGHTS", tmp_path)
    monkeypatch.setattr(loading, "SHIPPED", {"Tiny": ("tiny.pt", sha256)})
    assert clip.load("Tiny", device="cpu")[0].vocab_size == 514
    (tmp_path / "tiny.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match="tiny.pt has a wrong SHA-256"):
        clip.load("Tiny")
    (tmp_path / "tiny.pt").unlink()
    with pytest.raises(FileNotFoundError, match="Tiny are missing at"):
        clip.load("Tiny")


def test_without_a_network_a_name_says_which_file_to_place_where(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(loading, "MODELS_URL", "http://127.0.0.1:9/models")  # nobody listens
    with pytest.raises(ConnectionError) as caught:
        clip.load("ViT-B/16", device="cpu", download_root=tmp_path)
    file, sha256 = loading.OPENAI["ViT-B/16"]
    assert f"http://127.0.0.1:9/models/{sha256}/{file}" in str(caught.value)
    assert f"place it at {tmp_path / file}" in str(caught.value)


@pytest.mark.parametrize("named", [True, False])
def test_a_name_is_downloaded_to_the_folder_named_or_the_cache(tmp_path, monkeypatch, state, named):
    file = io.BytesIO()
    torch.save(state, file)
    sha256 = hashlib.sha256(file.getvalue()).hexdigest()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(loading.OPENAI, "RN50", ("RN50.pt", sha256))
    folder = tmp_path / "weights" if named else Path.home() / ".cache" / "clip"
    with Server(file.getvalue()) as server:
        monkeypatch.setattr(loading, "MODELS_URL", server.url)
        model, _ = clip.load("RN50", "cpu", folder if named else None)
    assert torch.equal(model.logit_scale.detach(), state["logit_scale"])
    assert [path.name for path in folder.iterdir()] == ["RN50.pt"]
