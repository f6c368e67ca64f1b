"""Reads the zip files of torch.save and of TorchScript without running any of them.

Both hold a `data.pkl`, which pickles a structure, and `data/`, the storages of its tensors. OpenAI
published CLIP as TorchScript: the structure is the module's attributes, and `code/` holds its
program, whose constructors `torch.jit.load` would run. Here `code/` is never opened, and the
pickle may name a handful of harmless things. Whatever else a training checkpoint names, such as
argparse.Namespace, becomes a placeholder that does nothing, without being imported; a file that
names what runs programs is refused. Sizes are believed only as far as there are bytes for them;
older versions of torch.load read beyond a storage that says it is longer.
"""

import pickle
import sys
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
DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}
# A checkpoint that names one of these modules means to run something: refused as a whole.
BLOCKED_MODULES = {
    "builtins", "__builtin__", "ctypes", "importlib", "nt", "os", "posix", "runpy", "shutil",
    "socket", "subprocess", "sys", "torch",
}  # fmt: skip
ALLOWED_BUILTINS = {  # exceptions to them, which ordinary values need
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
    "range", "set", "slice", "str", "tuple",
}  # fmt: skip
OBJECTS = ("torch.nn.modules.", "torch.optim.")  # whose classes are left in checkpoints
LISTS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist")
MAX_DEPTH = 16  # modules within modules; CLIP needs six
ATTRIBUTES = 1_000_000  # of all modules; CLIP's largest has some ten thousand
MAX_EXPANSION_RATIO = (
    16  # times a file's size that its content may have: weights do not compress well
)
MAX_EXPANSION_BYTES = 2**24  # bytes that any file may unpack to


class Record:
    """What a module of the archive becomes: its attributes, and no behaviour."""


class Placeholder:
    """What an object of unknown kind becomes: it takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "Placeholder":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    append = extend = add


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as opposed to a plain checkpoint."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.lower().endswith("constants.pkl") for name in archive.namelist())


def read_torchscript_state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors among the attributes of an archive's modules, named as in a state dict.

    Args:
        path: a TorchScript archive.

    Raises:
        ValueError: as `safe_load`.
        zipfile.BadZipFile: if the zip file is damaged.
    """
    return _tensors(safe_load(path))


def safe_load(path: Path, placeholders: bool = False) -> Any:
    """What torch.save wrote: tensors, dicts, lists, texts and numbers.

    Args:
        path: a zip file, as torch.save writes them.
        placeholders: whether it may hold objects of other kinds, which are passed over; refused
            otherwise.

    Returns:
        The structure, with parameters as tensors, on the CPU. It may contain itself.

    Raises:
        ValueError: if the file names anything else, or what runs programs; if a tensor reaches
            beyond its storage; or if the content is far larger than the file.
        zipfile.BadZipFile: if the zip file is damaged.
        Exception: of many kinds, if the pickle is.
    """
    with zipfile.ZipFile(path) as archive:
        check_expansion_ratio(path, sum(entry.file_size for entry in archive.infolist()))
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, or several")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.NameToInfo and archive.read(order) != sys.byteorder.encode():
            raise ValueError("its numbers are in another machine's order of bytes")
        with archive.open(pickles[0]) as file:
            return _RestrictedUnpickler(file, archive, folder, placeholders).load()


def check_expansion_ratio(path: Path, size: int) -> None:
    """Refuse content that is far larger than its file: nothing else would bound the memory.

    Args:
        path: the file.
        size: bytes of the content, as the file declares them.

    Raises:
        ValueError: if they are more than GROWTH times the file's, and more than SLACK.
    """
    if size > MAX_EXPANSION_BYTES + MAX_EXPANSION_RATIO * path.stat().st_size:
        raise ValueError(f"its {path.stat().st_size:,} bytes would become {size:,}")


# Python's own unpickler rather than C's, where BUILD could not be kept from setting attributes of
# functions and tensors.
class _RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that knows tensors, plain containers, inert records and placeholders."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str, placeholders: bool):
        super().__init__(file)
        self.archive, self.folder, self.placeholders = archive, folder, placeholders
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (Record,), {})
        if module == "torch" and name in DTYPES:
            return name
        if f"{module}.{name}" in DTYPE_NAMES:
            return DTYPE_NAMES[f"{module}.{name}"]
        if module == "torch.jit._pickle" and name in LISTS:
            return self.listed
        harmless = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "Counter"): dict,
            ("torch", "Size"): self.listed,
            ("torch", "device"): str,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self.untag,
            ("torch.jit._pickle", "restore_type_tag"): self.untag,
        }
        if (module, name) in harmless:
            return harmless[module, name]
        suspect = module.partition(".")[0] in BLOCKED_MODULES and name not in ALLOWED_BUILTINS
        suspect = suspect and not module.startswith(OBJECTS)
        if suspect or "." in name or not self.placeholders:
            raise ValueError(f"it names {module}.{name}, which no CLIP needs; nothing was run")
        return Placeholder

    def load_build(self) -> None:
        """Fill a record; what a placeholder or a state dict (its versions) would get is dropped."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record) and isinstance(state, dict):
            vars(self.stack[-1]).update(state)
        elif not isinstance(self.stack[-1], OrderedDict | Placeholder):
            raise ValueError(f"it sets attributes of a {type(self.stack[-1]).__name__}")

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
    del dispatch[pickle.BYTEARRAY8[0]]  # would take the memory before it has the bytes

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
                else torch.empty(0, dtype=dtype, device="cpu")
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
    def untag(value: Any, *_: Any) -> Any:
        """What was written with its type, or with its being a parameter."""
        return value

    @staticmethod
    def listed(values: list | tuple) -> list:
        """A list of what is one already: of a tensor, it would be a tensor for each number."""
        if not isinstance(values, list | tuple):
            raise ValueError(f"it makes a list of a {type(values).__name__}")
        return list(values)


def _tensors(root: Any) -> dict[str, Tensor]:
    """The tensors below a record, by dotted names."""
    tensors: dict[str, Tensor] = {}
    records = [("", root)] if isinstance(root, Record) else []
    visited = 0
    while records:
        prefix, record = records.pop()
        visited += 1 + len(vars(record))
        if visited > ATTRIBUTES:  # each record is met as often as it is referred to
            raise ValueError(f"its modules have more than {ATTRIBUTES} attributes")
        for name, value in vars(record).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Record) and prefix.count(".") < MAX_DEPTH:
                records.append((f"{prefix}{name}.", value))
    return tensors
