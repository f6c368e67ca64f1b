"""Reads the tensors of a TorchScript archive without running any of it.

OpenAI published CLIP as TorchScript: a zip file whose `data.pkl` pickles the module's attributes,
whose `code/` holds its program, and whose `data/` holds the storages. `torch.jit.load` would run
the program's constructors. Here `code/` is never opened, and the pickle may name a handful of
harmless things and nothing else.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LISTS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist")
DEPTH = 16  # modules within modules; CLIP needs six
MODULES = 20_000  # CLIP's largest has about a thousand


class Record:
    """What a module of the archive becomes: its attributes, and no behaviour."""


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as opposed to a plain checkpoint."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.lower().endswith("constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """All tensors among the attributes of an archive's modules, named as in a state dict.

    Args:
        path: a TorchScript archive.

    Raises:
        ValueError: if the archive names anything but modules and tensors, or a tensor reaches
            beyond its storage.
        zipfile.BadZipFile: if the zip file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, or several")
        folder = pickles[0].removesuffix("data.pkl")
        with archive.open(pickles[0]) as file:
            root = _Reader(file, archive, folder).load()
    return _tensors(root)


class _Reader(pickle.Unpickler):
    """An unpickler that knows tensors, lists and inert records."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (Record,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return self.untag
        raise ValueError(f"it names {module}.{name}, which no CLIP needs; nothing was run")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor; pid is ("storage", type, entry, device, length)."""
        kind, storage_type, entry, _, length = pid
        if kind != "storage":
            raise ValueError(f"it refers to a {kind!r} instead of a storage")
        dtype = DTYPES[storage_type]
        if (entry, dtype) not in self.storages:
            name = f"{self.folder}data/{entry}"
            if name not in self.archive.NameToInfo:
                raise ValueError(f"storage {entry} is missing")
            data = bytearray(self.archive.read(name))
            count = len(data) // dtype.itemsize
            self.storages[entry, dtype] = (
                torch.frombuffer(data, dtype=dtype, count=count)
                if count
                else torch.empty(0, dtype=dtype)
            )
        storage = self.storages[entry, dtype]
        if length > len(storage):
            raise ValueError(f"storage {entry} should hold {length} numbers and has {len(storage)}")
        return storage

    @staticmethod
    def rebuild_tensor(
        storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        """A view of a storage, which must hold all of it."""
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
            raise ValueError(f"it holds a tensor of size {size}, stride {stride}, offset {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise ValueError(f"a tensor reaches entry {last} of a storage of {len(storage)}")
        return storage.as_strided(size, stride, offset)

    @staticmethod
    def untag(value: Any, _: str) -> Any:
        """A list or dict that was written with its type."""
        return value


def _tensors(root: Any) -> dict[str, Tensor]:
    """The tensors below a record, by dotted names."""
    tensors = {}
    records = [("", root)]
    for _ in range(MODULES):
        if not records:
            return tensors
        prefix, record = records.pop()
        for name, value in vars(record).items() if isinstance(record, Record) else ():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, Record) and prefix.count(".") < DEPTH:
                records.append((f"{prefix}{name}.", value))
    raise ValueError(f"it holds more than {MODULES} modules")
