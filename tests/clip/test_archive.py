"""Checkpoints whatever way they were saved, damaged or hostile: read as data, or refused."""

import argparse
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from safetensors.torch import save_file
from torch import nn

import clip
from clip import files
from clip.archive import (
    MAX_EXPANSION_BYTES,
    MAX_EXPANSION_RATIO,
    _RestrictedUnpickler,
    read_torchscript_state_dict,
    safe_load,
)
from clip.model import EXTRA_KEYS

jit = pytest.mark.filterwarnings("ignore")  # torch deprecates its own tracing and scripting


def refused(path):
    """The one sentence that a checkpoint is refused with."""
    with pytest.raises(ValueError) as caught:
        clip.load(path, device="cpu")
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence
    assert "weights_only" not in sentence  # torch's advice to read it unsafely
    return sentence


def write_zip(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)


def rewrite(path, end, change):
    """Change the content of the entry that ends so; None drops it."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            content = change(content) if end in name else content
            if content is not None:
                new.writestr(name, content)


def traced(path, config, half=False):
    """Save a CLIP as a TorchScript archive, as OpenAI did, and return its state dict."""
    model = clip.build_model(random_state_dict(config))
    # The published archives hold sizes and masks as well.
    model.register_buffer("input_resolution", torch.tensor(7))
    model.transformer.resblocks[0].register_buffer("attn_mask", torch.zeros(16, 16))
    side = model.visual.input_resolution
    script = torch.jit.trace(model, (torch.zeros(1, 3, side, side), model.tokenize("a")))
    script = script.half() if half else script
    torch.jit.save(script, path)
    return script.state_dict()


# Good ones


@pytest.mark.parametrize("file", ["x.pt", "x.unheard-of", "x.pth", "x.safetensors"])
def test_every_way_of_saving_gives_the_same_model(file, tmp_path):
    state, path = random_state_dict(TINY_VIT), tmp_path / file
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".pth")
    model, _ = clip.load(path, device="cpu")
    back = model.state_dict()
    assert back.keys() == state.keys() - set(EXTRA_KEYS) and not model.training
    assert all(torch.equal(back[key], state[key]) for key in back)


@jit
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
def test_a_torchscript_archive_gives_its_state_dict_and_its_code_is_never_run(
    config, half, tmp_path, monkeypatch
):
    path = tmp_path / "model.pt"
    expected = traced(path, config, half)
    rewrite(path, "/code/", lambda content: b"this is not a program")
    monkeypatch.delattr(torch.jit, "load")
    read = read_torchscript_state_dict(path)
    assert read.keys() >= expected.keys()
    for key, value in expected.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value)
    model, _ = clip.load(path, device="cpu")
    assert model.dtype == torch.float32 and all(p.dtype == model.dtype for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype))


def tensors():
    base = torch.arange(24.0)
    return {
        "turned": nn.Parameter(base.view(4, 6).T), "part": base[5:9], "second": base[::2],
        "expanded": torch.ones(1, 3).expand(5, 3), "count": torch.tensor(7),
        "mask": torch.tensor([True, False]), "float16": torch.arange(3).half(),
        "brain16": torch.arange(3).bfloat16(), "float64": torch.arange(3).double(),
        "bytes": torch.arange(3, dtype=torch.uint8), "empty": torch.zeros(0, 4),
    }  # fmt: skip


class Module(nn.Module):
    """Holds them as parameters or buffers."""

    def __init__(self):
        super().__init__()
        for name, value in tensors().items():
            kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
            getattr(self, f"register_{kind}")(name, value)

    def forward(self, x: torch.Tensor):
        return x


@jit
@pytest.mark.parametrize("script", [False, True])
def test_strides_types_and_shared_storages_are_kept(script, tmp_path):
    path = tmp_path / "x.pt"
    if script:
        torch.jit.save(torch.jit.script(Module()), path)
        read = read_torchscript_state_dict(path)
    else:
        torch.save(OrderedDict(tensors()), path)
        read = safe_load(path)
    assert read.keys() == tensors().keys()
    for key, value in tensors().items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value)
    assert read["turned"].stride() == (1, 6)
    assert read["turned"].untyped_storage().data_ptr() == read["part"].untyped_storage().data_ptr()


def test_plain_values_are_read_as_torch_reads_them(tmp_path):
    numbers = [1, -2.5, None, True, 10**30, (3, "text")]
    content = {"numbers": numbers, "dtype": torch.float16, "size": torch.Size([2, 3])}
    torch.save(content, tmp_path / "x.pt")
    read = safe_load(tmp_path / "x.pt")
    assert read["numbers"] == numbers and read["dtype"] is torch.float16
    assert tuple(read["size"]) == (2, 3)
    torch.save({"args": argparse.Namespace()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="names argparse.Namespace"):  # unless it may hold any
        safe_load(tmp_path / "x.pt")


# Damaged ones


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["empty", "short", "half", "headless", "zeros"])
def test_a_damaged_file_is_refused_in_one_sentence(kind, suffix, tmp_path):
    path = tmp_path / f"damaged{suffix}"
    torch.save(random_state_dict(TINY_VIT), path)
    whole = path.read_bytes()
    cut = {"empty": 0, "short": 1000, "half": len(whole) // 2}
    contents = {"headless": whole[1000:], "zeros": bytes(5000)}
    path.write_bytes(contents[kind] if kind in contents else whole[: cut[kind]])
    message = refused(path)
    assert message.startswith(f"{path} is not a checkpoint that can be read safely")
    assert "get it again" in message and len(message) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, "not a CLIP's: it lacks .* and 2 more"),
        ({"epoch": 3}, "holds no state dict: save"),
        ([1, 2], "holds no state dict: save"),
        (torch.zeros(3), "holds no state dict: save"),
        ({"state_dict": {}}, "holds no state dict: save"),
        (nn.Linear(2, 2), "holds no state dict: save"),
    ],
    ids=["another model", "no tensor", "list", "tensor", "empty", "module"],
)
def test_a_file_that_holds_something_else_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    assert re.search(words, refused(tmp_path / "other.pt"))


@jit
@pytest.mark.parametrize(
    ("entry", "change", "words"),
    [
        ("data/0", lambda data: data[:-4], "storage 0 should hold"),
        ("data/0", lambda data: None, "storage 0 is missing"),
        ("data.pkl", lambda data: None, "no data.pkl"),
        ("data.pkl", lambda data: data[:-90], "model.pt"),
    ],
    ids=["short", "missing", "no pickle", "short pickle"],
)
def test_an_archive_that_lacks_something_is_refused(entry, change, words, tmp_path):
    traced(tmp_path / "model.pt", TINY_VIT)
    rewrite(tmp_path / "model.pt", entry, change)
    assert words in refused(tmp_path / "model.pt")


# Those that lie about their sizes


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


@pytest.mark.parametrize("length", [4, 5, 2**40, 2**62])
@pytest.mark.parametrize("size", [5, 2**40, 2**62])
def test_a_tensor_that_says_it_is_longer_than_its_bytes_is_refused(tmp_path, length, size):
    def longer(content):
        first, second, third = content.split(b"K\x04")  # the storage's length, the tensor's size
        return first + number(length) + second + number(size) + third

    torch.save({"x": torch.zeros(4)}, tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", "data.pkl", longer)
    assert ("should hold" if length > 4 else "reaches entry") in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [5, 2**40, 2**61])
@pytest.mark.parametrize("where", ["size", "storage", "bytes", "size storage", "storage bytes"])
def test_a_file_of_the_old_format_that_says_it_is_longer_is_refused(tmp_path, value, where):
    path = tmp_path / "old.pt"
    torch.save({"x": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    places = {  # what stands before it, and how it is written
        "size": (b"K\0", b"K\x04", number(value)),
        "storage": (b"cpuq\x06", b"K\x04", number(value)),
        "bytes": (b"a.", struct.pack("<q", 4), struct.pack("<q", value)),
    }
    for name in where.split():
        before, old, new = places[name]
        assert content.count(before + old) == 1
        content = content.replace(before + old, before + new)
    path.write_bytes(content)
    assert "is not a checkpoint that can be read safely" in refused(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))]
    + [(0, (2,), (1, 1)), (0, (-2,), (1,))],
)
def test_a_tensor_beyond_its_storage_is_refused(offset, size, stride):
    storage = torch.arange(4.0)
    assert _RestrictedUnpickler.rebuild_tensor(storage, 0, (2, 2), (2, 1)).tolist() == [
        [0, 1],
        [2, 3],
    ]
    with pytest.raises(ValueError, match="tensor"):
        _RestrictedUnpickler.rebuild_tensor(storage, offset, size, stride)


@pytest.mark.parametrize("constants", [{}, {"constants.pkl": b""}])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, constants):
    bomb, size = tmp_path / "bomb.pt", 2 * MAX_EXPANSION_BYTES
    entries = {"data.pkl": TENSOR + b".", "data/0": bytes(size), **constants}
    write_zip(bomb, entries, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < size / 500
    assert re.search(r"its [\d,]+ bytes would become 33,\d+,\d+", refused(bomb))


def test_a_small_file_that_expands_to_large_tensors_is_refused(tmp_path):
    expanded = {"token_embedding.weight": torch.zeros(1, 1).expand(10**12, 64)}
    shared = dict.fromkeys(map(str, range(MAX_EXPANSION_RATIO + 10)), torch.zeros(10**6))
    for state in (random_state_dict(TINY_VIT) | expanded, shared):
        torch.save(state, tmp_path / "x.pt")
        assert "bytes would become" in refused(tmp_path / "x.pt")


def test_blocks_by_name_alone_are_not_made(tmp_path):
    names = [f"transformer.resblocks.{block}.x" for block in range(2000)]
    state = random_state_dict(TINY_VIT) | dict.fromkeys(names, torch.zeros(0))
    torch.save(state, tmp_path / "tower.pt", _use_new_zipfile_serialization=False)
    assert "holds 2000 blocks of transformer.resblocks" in refused(tmp_path / "tower.pt")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", ["sparse", "meta", "complex"])
def test_tensors_that_are_not_of_plain_numbers_are_refused(tmp_path, kind, new):
    zeros = torch.zeros(2, 2)
    odd = {"sparse": zeros.to_sparse(), "meta": zeros.to("meta"), "complex": zeros.to(torch.cfloat)}
    state = {**random_state_dict(TINY_VIT), "logit_scale": odd[kind]}
    torch.save(state, tmp_path / "odd.pt", _use_new_zipfile_serialization=new)
    words = refused(tmp_path / "odd.pt")
    assert "which no CLIP needs" in words if new else "not of plain numbers" in words


def test_modules_that_refer_to_each_other_over_and_over_are_refused(tmp_path):
    # Ten records, each with 200 attributes that are all the next one: 200**10 paths.
    content = b"\x80\x02c__torch__\nM\n)\x81"
    for record in range(10):
        content += b"q" + bytes([record]) + b"0c__torch__\nM\n)\x81}("
        for name in (f"a{attribute}".encode() for attribute in range(200)):
            content += b"X" + struct.pack("<I", len(name)) + name + b"h" + bytes([record])
        content += b"ub"
    write_zip(tmp_path / "web.pt", {"data.pkl": content + b".", "constants.pkl": b""})
    assert "more than 1000000 attributes" in refused(tmp_path / "web.pt")


# Those that would do more than hold tensors

TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
    b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
HOSTILE = {  # pickles: what each must not get to do
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\0\0\0aK\x01s\x86b.",
    "hooks of a tensor": TENSOR + b"(\x89\x89}tb.",
    "set a tensor": TENSOR + b"(NNNNtb.",
    "a list of a tensor's numbers": b"ctorch.jit._pickle\nbuild_tensorlist\n(" + TENSOR + b"tR.",
    "attributes of a class": b"c__torch__\nM\n}X\x01\0\0\0aK\x01sb.",
    "memory without bytes": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "memory of a memo": b"Nr\xff\xff\xff\x7f.",
    "a storage that is a path": TENSOR.replace(b"X\x01\0\0\x000", b"X\x0b\0\0\0/etc/passwd") + b".",
    "a storage that is no list": b"K\x01Q.",
    "a type that is none": TENSOR.replace(b"ctorch\nFloatStorage\n", b"N") + b".",
    "lazy modules of torch": b"ctorch\n_inductor\n.",
    "itself": b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "bytes of another length": b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "nothing on the stack": b"0.",
    "no end": b"N" * 1000,
}


@pytest.mark.parametrize("constants", [True, False], ids=["TorchScript", "torch.save"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_in_an_archive_gets_to_do_nothing(tmp_path, case, constants):
    entries = {"data.pkl": b"\x80\x02" + HOSTILE[case], "data/0": bytes(16)}
    write_zip(tmp_path / "hostile.pt", {**entries, **({"constants.pkl": b""} if constants else {})})
    refused(tmp_path / "hostile.pt")
    write_zip(tmp_path / "good.pt", {"data.pkl": b"\x80\x02" + TENSOR + b".", "data/0": bytes(16)})
    assert torch.equal(safe_load(tmp_path / "good.pt"), torch.zeros(4))


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "os system", "torch load", "torch.hub load", "torch.jit._pickle os.system"]
    + ["torch._utils _rebuild_tensor_v2.__globals__", "clip.archive zipfile.ZipFile"]
    + ["builtins getattr", "posix system", "subprocess Popen"],
)
def test_a_file_that_names_what_runs_programs_is_refused(name, tmp_path):
    content = b"\x80\x04" + b"".join(
        b"\x8c" + struct.pack("B", len(text)) + text.encode() for text in name.split()
    )
    write_zip(tmp_path / "hostile.pt", {"data.pkl": content + b"\x93."})
    assert f"names {name.replace(' ', '.')}, which no CLIP" in refused(tmp_path / "hostile.pt")


def test_nothing_in_a_hostile_checkpoint_is_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path, content = tmp_path / "hostile.pt", {"visual.proj": Hostile()}
    torch.save(content, path)
    refused(path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(content, protocol))
        refused(path)
    archives = [{"constants.pkl": (), "data.pkl": Hostile()}, {"constants.pkl": Hostile(),
                "data.pkl": {}}]  # fmt: skip
    for entries in archives:
        write_zip(path, {name: pickle.dumps(value, 2) for name, value in entries.items()})
        refused(path)
    assert not (tmp_path / "executed").exists()


@jit
@pytest.mark.parametrize("cut", [0, 30])
def test_torch_is_never_given_a_zip_file(tmp_path, monkeypatch, cut):
    # Until 2.5, torch.load(weights_only=True) gave what it took for TorchScript to torch.jit.load.
    path = tmp_path / "model.pt"
    traced(path, TINY_VIT)
    path.write_bytes(path.read_bytes()[: -cut or None])
    monkeypatch.setattr(files, "is_archive", lambda path: False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was given the archive"))
    with pytest.raises(ValueError, match="its end is missing" if cut else "holds no state dict"):
        clip.load(path)


def test_a_tar_file_is_not_unpacked(tmp_path):
    (tmp_path / "storages").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            (tmp_path / name).is_symlink() or (tmp_path / name).write_bytes(b"")
            archive.add(tmp_path / name, name)
    assert "it is a tar file" in refused(tmp_path / "old.pt")
