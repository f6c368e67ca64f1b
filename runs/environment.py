"""The machine that a run is on: device, seed, memory, versions."""

import ctypes
import platform
import random
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import torch
import torchvision

from utils import REPO_ROOT

try:
    import resource
except ImportError:  # Windows
    resource = None

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values in glibc's malloc.h


def get_default_device() -> str:
    """CUDA where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_up_device(name: str, threads: int | None) -> torch.device:
    """Set torch's number of threads, and return the device.

    Raises:
        ValueError: There is no such device.
    """
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
            seconds, now = clock.last[0], time.monotonic()
            clock.last = seconds + min(now - clock.last[1], RunClock.MAX_GAP_S), now
            del clock
            time.sleep(RunClock.TICK_S)

    def seconds(self) -> float:
        """The time so far."""
        seconds, then = self.last
        return seconds + min(time.monotonic() - then, self.MAX_GAP_S)


def keep_freed_memory() -> None:
    """Have glibc's malloc keep freed memory instead of returning it to the system.

    Otherwise each large tensor is new pages, which the system fills with zeros.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: torch's on a CUDA device, else the process's; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the processor's architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def describe_machine(device: torch.device, world_size: int) -> dict[str, float | str]:
    """What result.json says of the machine."""
    return {
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "device": device_name(device),
        "processes": world_size,
    }


def get_versions() -> dict[str, str]:
    """Versions of Python and the packages that numbers depend on."""
    packages = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    return {"python": platform.python_version(), **packages}


def get_git_sha() -> str | None:
    """The commit of this repository, with + where files differ from it; None outside git."""
    try:
        git = ["git", "-C", str(REPO_ROOT)]
        options = dict(capture_output=True, text=True, check=True, timeout=10)
        sha = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        return sha + ("+" if subprocess.run(status, **options).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None
