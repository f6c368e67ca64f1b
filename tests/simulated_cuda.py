"""A CUDA device simulated on the CPU, so that tests of the GPU's path run on every machine.

    with simulated_cuda() as device:
        torch.ones(3, device="cuda").sum().item()
    device.kernels  # a Counter of operators and the lines of the repository that called them
    device.waits    # what the host waited for the device for, and the line

A tensor on "cuda" is a CPU tensor whose storage is marked. A dispatch mode sees every operator and
reads from the marks where its operands are; what Python code asks of a device is patched.

Not simulated: speed, memory, streams, generators, and which operators lack a CUDA kernel. An
operator is one kernel; a copy is none, and no wait if it goes to the device and is non_blocking.
Tried with torch 2.4.0 and 2.14.1.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
ROOT = f"{Path(__file__).parent.parent}/"
REAL_DEVICE = torch._C.TensorBase.device
FACTORIES = _device_constructors()  # torch remembers its answer: ask before anything is patched
FROM_DATA = {"tensor", "as_tensor", "asarray", "scalar_tensor"}
WAITS = {  # the size of the result, or a value that the host needs, depends on the data
    "_local_scalar_dense", "nonzero", "argwhere", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "equal", "bincount", "_coalesce", "multinomial",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
TAKES_HOST_SCALARS = {"fill", "fill_", "masked_fill", "masked_fill_", "where", "lerp", "clamp"}
WITHOUT_KERNEL = ("empty", "new_empty", "set_", "resize_", "_coalesced_")  # and names so begun


@contextmanager
def simulated_cuda() -> Iterator["Device"]:
    """Let "cuda" mean the simulated device, in this process and for as long as this lasts."""
    device = Device()
    begin = torch.autocast.__init__

    def autocast(self, device_type, dtype=None, *args, **kwargs):
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        begin(self, device_type, dtype, *args, **kwargs)

    def on_cpu(ask):
        return lambda kind="cuda": ask(kind.replace("cuda", "cpu"))

    functions = {make.__name__: factory(make, device) for make in FACTORIES}
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        functions[name] = on_cpu(getattr(torch, name))
    stream = SimpleNamespace(is_capturing=lambda: False)
    replaced = {
        Tensor: tensor_methods(device),
        torch: functions,
        torch.cuda: cuda_functions(device),
        torch.autocast: {"__init__": autocast},
        getattr(torch, "accelerator", None): {"current_stream": lambda *_: stream},  # from 2.6 on
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, attributes in replaced.items():
            for name, value in attributes.items():
                if hasattr(owner, name):  # factories of torch.fft and torch.nested stay
                    patch.setattr(owner, name, value)
        with device:
            yield device


class Device(TorchDispatchMode):
    """Runs operators on the CPU, as strictly as CUDA takes them, and counts what they cost."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.waits: list[str] = []
        self.debug_mode = "default"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = tensors(args, kwargs)
        owned = {id(storage): storage for t in given for storage in storages(t)}
        for storage in owned.values():
            storage.location = getattr(storage, "location", "cpu")
        locations = {storage.location for storage in owned.values()}
        where = "cuda" if "cuda" in locations else "cpu" if "cpu" in locations else "either"
        if {"cuda", "cpu"} <= locations:
            self.check_devices(func, name, args, kwargs, given)
        if where == "cuda":
            refuse_generator(kwargs)
            self.record_waits(name, args, kwargs)
        out = func(*args, **kwargs)
        results = [storage for t in tensors(out) for storage in storages(t)]
        if where == "cuda" and not (name == "copy_" and "cpu" in locations):
            # Views make no storage and launch nothing. Under a mode like this one, autograd clones
            # sparse gradients that it would otherwise keep as they are.
            kept = name == "clone" and given[0].layout == torch.sparse_coo
            new = any(id(storage) not in owned for storage in results)
            if func._schema.is_mutable or new and not kept:
                self.launch(name)
        for storage in results:
            if getattr(storage, "location", "either") == "either":
                storage.location = where
        return out

    def launch(self, name: str) -> None:
        if not name.startswith(WITHOUT_KERNEL):
            self.kernels[name, calling_line()] += 1

    def wait(self, what: str) -> None:
        self.waits.append(f"{what}, {calling_line()}")
        if self.debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {self.waits[-1]}")

    def copy(self, goal: str, non_blocking: bool) -> None:
        if goal == "cpu" or not non_blocking:
            self.wait(f"copy to {goal}")

    def record_waits(self, name, args, kwargs) -> None:
        """Record a wait where CUDA's way to compute this has one."""
        if name in WAITS:
            self.wait(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")
        elif name in INDEXING:
            if any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1])):
                self.wait(f"{name} with a mask")

    def check_devices(self, func, name, args, kwargs, given) -> None:
        """Refuse operands on two devices, unless CUDA takes them together."""
        host = [t for t in given if location(t) == "cpu"]
        if name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self.copy(location(args[0]), non_blocking)
        pointwise = torch.Tag.pointwise in func.tags or name.startswith("_foreach")
        if not (pointwise or name in TAKES_HOST_SCALARS) or any(t.dim() for t in host):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name}, {calling_line()})"
            )


# Where a tensor is: its storage's mark, "cuda", "cpu", or "either" for what C++ code made


def storages(t: Tensor) -> list[torch.UntypedStorage]:
    if t.layout != torch.sparse_coo:
        return [t.untyped_storage()]
    with torch.no_grad(), _disable_current_modes():
        return [t._values().untyped_storage(), t._indices().untyped_storage()]


def location(t: Tensor) -> str:
    real = REAL_DEVICE.__get__(t).type
    return getattr(storages(t)[0], "location", "cpu") if real == "cpu" else real


def mark(t: Tensor, where: str, over: tuple = (None, "either")) -> Tensor:
    """Mark t's storages if their mark is one of `over`, in which None means no mark."""
    if REAL_DEVICE.__get__(t).type == "cpu":
        for storage in storages(t):
            if not over or getattr(storage, "location", None) in over:
                storage.location = where
    return t


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def calling_line() -> str:
    """The nearest line of the repository that led here."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__ and "site-packages" not in file:
            return f"{file[len(ROOT) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line outside the repository"


def refuse_generator(kwargs: dict[str, Any]) -> None:
    """Refuse a generator: each is the host's."""
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


# What Python code calls


def tensor_methods(device: Device) -> dict[str, Any]:
    """What replaces attributes of Tensor."""
    real = {name: getattr(Tensor, name) for name in ("to", "tolist", "numpy")}

    def to(self, *args, copy=False, **kwargs):
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        goal, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        rest = {"dtype": dtype or self.dtype} | ({"memory_format": layout} if layout else {})
        if goal is None or goal.type == location(self):
            return real["to"](self, **rest, copy=copy)
        device.copy(goal.type, non_blocking)
        with _disable_current_modes():
            return mark(real["to"](self, **rest, copy=True), goal.type, over=())

    def tolist(self):
        if location(self) == "cuda":
            device.wait("tolist")
        return real["tolist"](self)

    def numpy(self, **kwargs):
        if location(self) == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return real["numpy"](self, **kwargs)

    return dict(
        to=to, tolist=tolist, numpy=numpy, pin_memory=lambda self: self,
        cpu=lambda self, **kwargs: self.to("cpu", **kwargs),
        cuda=lambda self, device=None, non_blocking=False: self.to(CUDA, non_blocking=non_blocking),
        device=property(lambda self: CUDA if self.is_cuda else REAL_DEVICE.__get__(self)),
        is_cuda=property(lambda self: location(self) == "cuda"),
        is_cpu=property(lambda self: location(self) in ("cpu", "either")),
    )  # fmt: skip


def factory(make: Callable[..., Tensor], device: Device) -> Callable[..., Tensor]:
    """Let one of torch's factories make tensors on the device."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        goal = kwargs.get("device")
        goal = None if goal is None else torch.device(goal).type
        if goal not in (None, "cpu", "cuda"):
            return make(*args, **kwargs)
        if goal == "cuda":
            refuse_generator(kwargs)
        kwargs |= {"device": "cpu"} if goal else {}
        result = make(*args, **kwargs)
        if goal == "cuda" and make.__name__ in FROM_DATA:
            device.copy(goal, non_blocking=False)
        elif goal == "cuda" and location(result) != "cuda":  # a sparse one of the device's parts is
            device.launch(make.__name__)
        return mark(result, goal or "cpu", over=() if goal else (None, "either"))

    return made


def cuda_functions(device: Device) -> dict[str, Any]:
    """What replaces attributes of torch.cuda."""
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_name="simulated",
        is_current_stream_capturing=False, max_memory_allocated=0,
    )  # fmt: skip
    functions = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    return functions | dict(
        synchronize=lambda *_: device.wait("synchronize"),
        set_sync_debug_mode=lambda mode: setattr(device, "debug_mode", mode),
    )
