"""Checkpoints in every format, damaged or hostile: read as data, or refused."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from safetensors.torch import save_file
from torch import nn

import clip
from clip.archive import safe_load
from clip.model import EXTRA_KEYS


def refused(path):
    """The sentence that a checkpoint is refused with."""
    with pytest.raises(ValueError) as caught:
        clip.load(path, device="cpu")
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert "weights_only" not in message  # torch's advice to read it unsafely
    return message


def write_zip(path, content):
    """Write a pickle, after its protocol, as torch.save does, with a storage of 16 zero bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + content)
        archive.writestr("model/data/0", bytes(16))


@pytest.mark.parametrize("file", ["x.pt", "x.unheard-of", "x.pth", "x.safetensors"])
def test_load_reads_every_format(file, tmp_path):
    state, path = random_state_dict(TINY_VIT), tmp_path / file
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".pth")
    model, _ = clip.load(path, device="cpu")
    loaded = model.state_dict()
    assert loaded.keys() == state.keys() - set(EXTRA_KEYS) and not model.training
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own tracing and scripting
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
def test_torchscript_is_read_not_run(config, tmp_path, monkeypatch):
    path, side = tmp_path / "model.pt", config["image_resolution"]
    model = clip.build_model(random_state_dict(config))
    # The published archives hold sizes and masks as well.
    model.register_buffer("input_resolution", torch.tensor(7))
    model.transformer.resblocks[0].register_buffer("attn_mask", torch.zeros(16, 16))
    script = torch.jit.trace(model, (torch.zeros(1, 3, side, side), model.tokenize("a"))).half()
    torch.jit.save(script, path)
    expected = script.state_dict()
    # Until 2.5, torch.load(weights_only=True) gave what it took for TorchScript to torch.jit.load.
    monkeypatch.delattr(torch, "load")
    monkeypatch.delattr(torch.jit, "load")
    state = clip.read_checkpoint(path)
    assert state.keys() >= expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value)
    model, _ = clip.load(path, device="cpu")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype))
    path.write_bytes(path.read_bytes()[:-30])
    assert "not a zip file" in refused(path)


def test_strides_types_and_storages_stay(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "turned": nn.Parameter(base.view(4, 6).T), "part": base[5:9], "second": base[::2],
        "expanded": torch.ones(1, 3).expand(5, 3), "count": torch.tensor(7),
        "mask": torch.tensor([True, False]), "float16": torch.arange(3).half(),
        "bfloat16": torch.arange(3).bfloat16(), "float64": torch.arange(3).double(),
        "bytes": torch.arange(3, dtype=torch.uint8), "empty": torch.zeros(0, 4),
    }  # fmt: skip
    torch.save(OrderedDict(tensors), tmp_path / "x.pt")
    loaded = safe_load(tmp_path / "x.pt")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value)
    assert loaded["turned"].stride() == (1, 6)
    storages = [loaded[name].untyped_storage().data_ptr() for name in ("turned", "part")]
    assert storages[0] == storages[1]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [slice(0), slice(1000), slice(1000, None)])
def test_damaged_file_is_refused(part, suffix, tmp_path):
    path = tmp_path / f"damaged{suffix}"
    torch.save(random_state_dict(TINY_VIT), path)
    path.write_bytes(path.read_bytes()[part])
    message = refused(path)
    assert message.startswith(f"{path} is not a checkpoint that can be read safely")
    assert "download it again" in message and len(message) < 300 + len(str(path))


def test_file_without_tensors_is_refused(tmp_path):
    for content in ({"epoch": 3}, nn.Linear(2, 2)):
        torch.save(content, tmp_path / "other.pt")
        assert "holds no state dict" in refused(tmp_path / "other.pt")


VIEW = b"K\0K\x04\x85K\x01\x85"  # offset 0, size 4, stride 1
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
    b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ" + VIEW + b"\x89ccollections\nOrderedDict\n)RtR"
)
HOSTILE = {  # pickles, by what each must not get to do
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\0\0\0aK\x01s\x86b.",
    "hooks of a tensor": TENSOR + b"(\x89\x89}tb.",
    "set a tensor": TENSOR + b"(NNNNtb.",
    "attributes of a class": b"c__torch__\nM\n}X\x01\0\0\0aK\x01sb.",
    "a storage that is a path": TENSOR.replace(b"X\x01\0\0\x000", b"X\x0b\0\0\0/etc/passwd") + b".",
    "a type that is none": TENSOR.replace(b"ctorch\nFloatStorage\n", b"N") + b".",
    "values behind its storage": TENSOR.replace(VIEW, b"K\x01K\x04\x85K\x01\x85") + b".",
    "too many values": TENSOR.replace(VIEW, b"K\0K\x05\x85K\x01\x85") + b".",
    "values before its storage": TENSOR.replace(VIEW, b"J\xff\xff\xff\xffK\x02\x85K\x01\x85")
    + b".",
    "itself": b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "a program": b"cposix\nsystem\n.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickle_does_nothing(tmp_path, case):
    write_zip(tmp_path / "hostile.pt", HOSTILE[case])
    refused(tmp_path / "hostile.pt")
    write_zip(tmp_path / "good.pt", TENSOR + b".")
    assert torch.equal(safe_load(tmp_path / "good.pt"), torch.zeros(4))


def test_hostile_checkpoint_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path, content = tmp_path / "hostile.pt", {"visual.proj": Hostile()}
    torch.save(content, path)
    refused(path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(content, protocol))
        refused(path)
    assert not (tmp_path / "executed").exists()
