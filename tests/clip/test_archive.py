"""Checkpoints that lie about their sizes, or do more than hold tensors: read as data or refused."""

import pickle
import re
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict

import clip
from clip.archive import GROWTH, SLACK, read_saved


def refused(path):
    """The one sentence that a checkpoint is refused with."""
    with pytest.raises(ValueError) as caught:
        clip.load(path, device="cpu")
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence
    return sentence


def write_zip(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    base = torch.arange(24.0)
    content = {
        "state_dict": OrderedDict(
            turned=base.view(4, 6).T, part=base[5:9], scalar=torch.tensor(3),
            empty=torch.zeros(0, 2), parameter=torch.nn.Parameter(torch.ones(2)), half=base.half(),
            brain=base.bfloat16(),
        ),
        "numbers": [1, -2.5, None, True, 10**30, (3, "text")],
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "model": torch.nn.Linear(2, 3).state_dict(),
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    ours, theirs = read_saved(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert ours["numbers"] == theirs["numbers"] and ours["dtype"] is torch.float16
    assert tuple(ours["size"]) == (2, 3)
    for part in ("state_dict", "model"):
        assert list(ours[part]) == list(theirs[part])
        for name, value in theirs[part].items():
            assert ours[part][name].dtype == value.dtype
            assert torch.equal(ours[part][name], value.detach())


def resized(path, target, length, size):
    """A copy of {"x": four floats} whose pickle says that storage and tensor are larger."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"K\x04") == 2  # the storage's length, then the tensor's size
                first, second, third = content.split(b"K\x04")
                pack = lambda number: b"\x8a\x08" + struct.pack("<q", number)  # noqa: E731
                content = first + pack(length) + second + pack(size) + third
            new.writestr(name, content)


@pytest.mark.parametrize("length", [4, 5, 1000, 2**40, 2**62])
@pytest.mark.parametrize("size", [5, 1000, 2**40, 2**62])
def test_a_tensor_that_says_it_is_longer_than_its_bytes_is_refused(tmp_path, length, size):
    torch.save({"x": torch.zeros(4)}, tmp_path / "x.pt")
    resized(tmp_path / "x.pt", tmp_path / "longer.pt", length, size)
    words = "should hold" if length > 4 else "reaches entry"
    assert words in refused(tmp_path / "longer.pt")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    size = 2 * SLACK
    torch.save({"x": torch.zeros(4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        data = archive.read("x/data.pkl")
    for constants in ({}, {"constants.pkl": b""}):
        entries = {"data.pkl": data, "data/0": bytes(size), **constants}
        write_zip(tmp_path / "bomb.pt", entries, zipfile.ZIP_DEFLATED)
        assert (tmp_path / "bomb.pt").stat().st_size < size / 500
        assert re.search(r"its [\d,]+ bytes would become 33,\d+,\d+", refused(tmp_path / "bomb.pt"))


def test_a_small_file_that_expands_to_large_tensors_is_refused(tmp_path):
    state = random_state_dict(TINY_VIT)
    state["token_embedding.weight"] = torch.zeros(1, 1).expand(10**12, 64)
    torch.save(state, tmp_path / "expanded.pt")
    assert "bytes would become" in refused(tmp_path / "expanded.pt")
    shared = torch.zeros(10**6)
    torch.save({str(number): shared for number in range(GROWTH + 10)}, tmp_path / "shared.pt")
    assert "bytes would become" in refused(tmp_path / "shared.pt")


def test_blocks_by_name_alone_are_not_made(tmp_path):
    state = random_state_dict(TINY_VIT)
    for number in range(2000):
        state[f"transformer.resblocks.{number}.x"] = torch.zeros(0)
    torch.save(state, tmp_path / "tower.pt", _use_new_zipfile_serialization=False)
    assert "holds 2000 blocks of transformer.resblocks" in refused(tmp_path / "tower.pt")


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2).to(torch.cfloat)],
    ids=["sparse", "meta", "complex"],
)
@pytest.mark.parametrize("new", [True, False])
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, odd, new):
    state = {**random_state_dict(TINY_VIT), "logit_scale": odd}
    torch.save(state, tmp_path / "odd.pt", _use_new_zipfile_serialization=new)
    words = refused(tmp_path / "odd.pt")
    assert "which no CLIP needs" in words if new else "not of plain numbers" in words


def test_a_tar_file_is_not_unpacked(tmp_path):
    (tmp_path / "storages").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            (tmp_path / name).is_symlink() or (tmp_path / name).write_bytes(b"")
            archive.add(tmp_path / name, name)
    assert "it is a tar file" in refused(tmp_path / "old.pt")


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
    "builtins": b"cbuiltins\ngetattr\n.",
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
    assert torch.equal(read_saved(tmp_path / "good.pt"), torch.zeros(4))


def test_modules_that_refer_to_each_other_over_and_over_are_refused(tmp_path):
    # Ten records, each with 200 attributes that are all the next one: 200**10 paths.
    content = b"\x80\x02c__torch__\nM\n)\x81"
    for number in range(10):
        content += b"q" + bytes([number]) + b"0c__torch__\nM\n)\x81}("
        names = [f"a{attribute}".encode() for attribute in range(200)]
        for name in names:
            content += b"X" + struct.pack("<I", len(name)) + name + b"h" + bytes([number])
        content += b"ub"
    write_zip(tmp_path / "web.pt", {"data.pkl": content + b".", "constants.pkl": b""})
    assert "more than 1000000 attributes" in refused(tmp_path / "web.pt")


def test_a_flipped_bit_of_a_checkpoint_is_noticed_or_does_not_matter(tmp_path):
    path = tmp_path / "x.pt"
    state = random_state_dict({**TINY_VIT, "vision_layers": 1, "transformer_layers": 1})
    torch.save(state, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [
        *rng.choice(len(whole), 100),
        *rng.choice(5000, 100),
        *rng.choice(5000, 100) - 5000,
    ]:
        content = bytearray(whole)
        content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            model, _ = clip.load(path, device="cpu")
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert all(
                torch.equal(value, state[name]) for name, value in model.state_dict().items()
            )


@pytest.mark.parametrize("number", [5, 2**16, 2**40, 2**61])
@pytest.mark.parametrize("where", ["size", "storage", "bytes", "size storage", "storage bytes"])
def test_a_file_of_the_old_format_that_says_it_is_longer_is_refused(tmp_path, number, where):
    path = tmp_path / "old.pt"
    torch.save({"x": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    places = {  # what stands before it, and how it is written
        "size": (b"K\0", b"K\x04", b"\x8a\x08" + struct.pack("<q", number)),
        "storage": (b"cpuq\x06", b"K\x04", b"\x8a\x08" + struct.pack("<q", number)),
        "bytes": (b"a.", struct.pack("<q", 4), struct.pack("<q", number)),
    }
    for name in where.split():
        before, old, new = places[name]
        assert content.count(before + old) == 1
        content = content.replace(before + old, before + new)
    path.write_bytes(content)
    assert "is not a checkpoint that can be read safely" in refused(path)


def test_a_pickle_that_is_no_checkpoint_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x.pt").write_bytes(pickle.dumps({"x": Hostile()}, protocol))
        refused(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
