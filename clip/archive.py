"""Read the zip files of torch.save and of TorchScript without running anything in them.

Both hold `data.pkl`, a pickled structure, and `data/`, the storages of its tensors. OpenAI
published CLIP as TorchScript, whose `code/` torch.jit.load would run; it is never opened here.
The pickle can make tensors and plain containers. Nothing else that a training checkpoint names,
such as argparse.Namespace, is imported: an inert stub takes its place.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A file with one of these names was made to run a program; no checkpoint needs them.
BLOCKED_NAMES = re.compile(
    r"(__builtin__|builtins)\.(__import__|compile|eval|exec|getattr|open)$|torch\.(hub|load)\b"
    r"|(ctypes|importlib|nt|os|posix|runpy|shutil|socket|subprocess|sys)\."
)


def safe_load(path: Path) -> Any:
    """Read a zip file of torch.save or TorchScript, whose modules become dicts, to the CPU.

    Damage raises exceptions of many kinds; a file that names what can run programs a ValueError.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, or several")
        folder = pickles[0].removesuffix("data.pkl")
        with archive.open(pickles[0]) as file:
            return _RestrictedUnpickler(file, archive, folder).load()


class _ObjectStub:
    """Stands for an object of any other class: takes what it is given and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any) -> "_ObjectStub":
        return self

    append = extend = add = __setitem__ = __call__


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # which refuses to reach beyond the storage


STORAGE_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
ALLOWED_NAMES = {
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGE_DTYPES.items()},
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}


# Python's unpickler rather than C's, in which BUILD could set attributes of functions and tensors.
class _RestrictedUnpickler(pickle._Unpickler):
    """Makes tensors, plain containers and stubs."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name.startswith("__torch__."):
            return dict
        if BLOCKED_NAMES.match(full_name):
            raise ValueError(f"it names {full_name}, which no CLIP needs; nothing was run")
        return ALLOWED_NAMES.get(full_name, _ObjectStub)

    def load_build(self) -> None:
        """Set the attributes of a module; drop those of other objects, such as a dict's version."""
        state = self.stack.pop()
        if type(self.stack[-1]) is dict and isinstance(state, dict):
            self.stack[-1].update(state)
        elif not isinstance(self.stack[-1], OrderedDict | _ObjectStub):
            raise ValueError(f"it sets attributes of a {type(self.stack[-1]).__name__}")

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def persistent_load(self, pid: Any) -> Tensor:
        """Read a storage as a flat tensor; pid is ("storage", dtype, name, device, length)."""
        _, dtype, name, *_ = pid
        if (name, dtype) not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}data/{name}"))
            empty = torch.empty(0, dtype=dtype, device="cpu")
            self.storages[name, dtype] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self.storages[name, dtype]
