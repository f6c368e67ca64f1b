"""A CUDA device simulated on the CPU, so that tests of the GPU's path run on every machine.

    with simulated_cuda() as device:
        torch.ones(3, device="cuda").sum().item()
    device.kernels  # a Counter of operators and the lines of the repository that called them
    device.waits    # what the host waited for the device for, and the line

A tensor on "cuda" is a CPU tensor whose storage is marked. A dispatch mode sees every operator and
reads from the marks where its operands are; what Python code asks of a device is patched.

Not simulated: speed, memory, streams, numerics, and which operators lack a CUDA kernel. An operator
counts as one kernel, a copy between host and device as none. Tried with torch 2.4.0 and 2.14.1.
"""

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
ROOT = f"{Path(__file__).parent.parent}/"
STAGED = 2**16  # bytes; a larger copy from memory that is not pinned may wait for the stream
DEBUG_MODES = {"default": 0, "warn": 1, "error": 2}
REAL_DEVICE = torch._C.TensorBase.device
FACTORIES = _device_constructors()  # torch remembers its answer: ask before anything is patched
FROM_DATA = {"tensor", "as_tensor", "asarray", "scalar_tensor"}

GENERATORS = WeakValueDictionary()  # by address: a mode gets them in other Python objects
WAITS = {  # the size of the result, or a value that the host needs, depends on the data
    "_local_scalar_dense", "nonzero", "argwhere", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "equal", "bincount", "_coalesce", "multinomial",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
TAKES_HOST_SCALARS = {"fill", "fill_", "masked_fill", "masked_fill_", "where", "lerp", "clamp"}
WITHOUT_KERNEL = ("empty", "new_empty", "set_", "resize_", "_coalesced_")  # and names so begun


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


def is_pinned(t: Tensor, device: Any = None) -> bool:
    return getattr(storages(t)[0], "pinned", False)


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


def check_generator(generator: torch.Generator | None, where: str) -> None:
    if generator is not None:
        found = GENERATORS.get(generator._cdata, generator).device.type
        if where not in (found, "either"):
            raise RuntimeError(f"Expected a '{where}' device for generator but found '{found}'")


class Device(TorchDispatchMode):
    """Runs operators on the CPU, as strictly as CUDA takes them, and counts what they cost."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.waits: list[str] = []
        self.debug_mode = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = tensors(args, kwargs)
        owned = {id(storage): storage for t in given for storage in storages(t)}
        for storage in owned.values():
            storage.location = getattr(storage, "location", "cpu")
        locations = {storage.location for storage in owned.values()}
        where = "cuda" if "cuda" in locations else "cpu" if "cpu" in locations else "either"
        check_generator(kwargs.get("generator"), where)
        if {"cuda", "cpu"} <= locations:
            self.check_devices(func, name, args, kwargs, given)
        if where == "cuda":
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
        """Count a kernel."""
        if not name.startswith(WITHOUT_KERNEL):
            self.kernels[name, calling_line()] += 1

    def wait(self, what: str, noticed: bool = True) -> None:
        """Record that the host waits; `noticed` is whether CUDA's debug mode sees it."""
        self.waits.append(f"{what}, {calling_line()}")
        if noticed and self.debug_mode == DEBUG_MODES["error"]:
            raise RuntimeError(f"called a synchronizing CUDA operation: {self.waits[-1]}")

    def copy(self, source: Tensor, goal: str, non_blocking: bool, pinned: bool) -> None:
        """Record what a copy waits for; `pinned` is whether the host's memory is."""
        size = source.numel() * source.element_size()
        if not non_blocking:
            self.wait(f"copy to {goal} without non_blocking")
        elif not pinned and (goal == "cpu" or size > STAGED):
            self.wait(f"copy to {goal} without pinned memory", noticed=False)

    def record_waits(self, name, args, kwargs) -> None:
        """Record a wait where CUDA's way to compute this has one."""
        if name in WAITS:
            self.wait(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")
        elif name in INDEXING:
            value, *accumulate = args[2:4] or (None,)
            filled = value is not None and value.numel() == 1 and location(value) != "cuda"
            masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
            if masks and (any(accumulate) or not filled):  # x[mask] = 0 becomes masked_fill_
                self.wait(f"{name} with a mask")

    def check_devices(self, func, name, args, kwargs, given) -> None:
        """Refuse operands on two devices, unless CUDA takes them together."""
        host = [t for t in given if location(t) == "cpu"]
        if name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self.copy(args[1], location(args[0]), non_blocking, is_pinned(host[0]))
        if name in INDEXING and location(args[0]) == "cuda":
            indices = {id(t) for t in tensors(args[1]) if location(t) == "cpu"}
            if all(id(t) in indices or t.dim() == 0 for t in host):
                return self.wait("copy of indices") if indices else None
        arguments = func._schema.arguments
        bound = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        written = [bound.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
        pointwise = torch.Tag.pointwise in func.tags or name.startswith("_foreach")
        lenient = (pointwise or name in TAKES_HOST_SCALARS) and all(t.dim() == 0 for t in host)
        if not lenient or any(location(t) == "cpu" for t in tensors(written)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name}, {calling_line()})"
            )


# What Python code calls


class Generator(torch._C.Generator):
    """A generator that may belong to the device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = super().__new__(cls)
        self.owner = torch.device(device)
        GENERATORS[self._cdata] = self
        return self

    device = property(lambda self: self.owner)


class Event(SimpleNamespace):
    """torch.cuda.Event, on the host's clock."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)


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
        pinned = goal.type == "cpu" or is_pinned(self)  # torch pins the memory that it makes
        device.copy(self, goal.type, non_blocking, pinned)
        with _disable_current_modes():
            return mark(real["to"](self, **rest, copy=True), goal.type, over=())

    def pin_memory(self, device=None):
        pinned = mark(self.clone(), "cpu")
        storages(pinned)[0].pinned = True
        return pinned

    def tolist(self):
        if location(self) == "cuda":
            device.wait("tolist")
        return real["tolist"](self)

    def numpy(self, **kwargs):
        if location(self) == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return real["numpy"](self, **kwargs)

    return dict(
        to=to, pin_memory=pin_memory, is_pinned=is_pinned, tolist=tolist, numpy=numpy,
        cpu=lambda self, **kwargs: self.to("cpu", **kwargs),
        cuda=lambda self, device=None, non_blocking=False: self.to(CUDA, non_blocking=non_blocking),
        device=property(lambda self: CUDA if self.is_cuda else REAL_DEVICE.__get__(self)),
        is_cuda=property(lambda self: location(self) == "cuda"),
        is_cpu=property(lambda self: location(self) in ("cpu", "either")),
        get_device=lambda self: 0 if self.is_cuda else -1,
    )  # fmt: skip


def factory(make: Callable[..., Tensor], device: Device) -> Callable[..., Tensor]:
    """Let one of torch's factories make tensors on the device."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        goal = kwargs.get("device")
        goal = None if goal is None else torch.device(goal).type
        if goal not in (None, "cpu", "cuda"):
            return make(*args, **kwargs)
        check_generator(kwargs.get("generator"), goal or "cpu")
        kwargs |= {"device": "cpu"} if goal else {}
        if make.__name__ in FROM_DATA and args and isinstance(args[0], Tensor):
            result = mark(make(*args, **kwargs), location(args[0]))
            return result.to(goal) if goal else result
        result = make(*args, **kwargs)
        if goal == "cuda" and make.__name__ in FROM_DATA:
            device.copy(result, goal, non_blocking=False, pinned=False)
        elif goal == "cuda" and location(result) != "cuda":  # a sparse one of the device's parts is
            device.launch(make.__name__)
        return mark(result, goal or "cpu", over=() if goal else (None, "either"))

    return made


def cuda_functions(device: Device) -> dict[str, Any]:
    """What replaces attributes of torch.cuda."""
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_name="simulated",
        get_device_capability=(9, 0), is_bf16_supported=True, is_current_stream_capturing=False,
        empty_cache=None, reset_peak_memory_stats=None, max_memory_allocated=0,
    )  # fmt: skip
    functions = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    return functions | dict(
        Event=Event,
        synchronize=lambda *_: device.wait("synchronize", noticed=False),
        set_sync_debug_mode=lambda mode: setattr(device, "debug_mode", DEBUG_MODES.get(mode, mode)),
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
    )


@contextmanager
def simulated_cuda() -> Iterator[Device]:
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
        torch: functions | {"Generator": Generator},
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
