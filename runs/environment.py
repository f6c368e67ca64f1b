"""The machine that a run is on: device, seed, memory, versions."""

import ctypes
import platform
import random
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torchvision

from runs.distributed import get_world_size
from utils import REPO_ROOT

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values in glibc's malloc.h


def get_default_device() -> str:
    """CUDA where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_up_device(name: str, threads: int | None) -> torch.device:
    """Set torch's number of threads, and return the device; a ValueError if it cannot be used."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" has no values to compute with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); try --device {get_default_device()}"
        ) from error
    return device


def set_random_seed(seed: int) -> None:
    """Seed torch, and Python's `random`, from which only the few shots are drawn."""
    torch.manual_seed(seed)
    random.seed(seed)


class RunClock:
    """Seconds that this process has run since it started the clock.

    A thread looks once a second; of a longer gap, in which the process was stopped (Ctrl-Z,
    `scontrol suspend`, a sleeping laptop), only MAX_GAP_S count.
    """

    TICK_S, MAX_GAP_S = 1.0, 5.0

    def __init__(self, seconds: float = 0.0) -> None:
        self.last = seconds, time.monotonic()  # the seconds that ran until then
        threading.Thread(target=self._tick, args=[weakref.ref(self)], daemon=True).start()

    @staticmethod
    def _tick(reference: "weakref.ref[RunClock]") -> None:
        """Look at the clock until nothing else refers to it."""
        while (clock := reference()) is not None:
            clock.seconds()
            del clock
            time.sleep(RunClock.TICK_S)

    def seconds(self) -> float:
        """The time so far."""
        (seconds, then), now = self.last, time.monotonic()
        self.last = seconds + min(now - then, self.MAX_GAP_S), now
        return self.last[0]


def keep_freed_memory() -> None:
    """Have glibc's malloc keep freed memory, since the system fills new pages with zeros."""
    with suppress(OSError, TypeError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: torch's on a CUDA device, else the process's; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the processor's architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What result.json says of machine and software."""
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    return {
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "device": device_name(device),
        "processes": get_world_size(),
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": get_git_sha(),
    }


def get_git_sha() -> str | None:
    """The commit of this repository, with + where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
