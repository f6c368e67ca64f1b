"""The machine that a run is on: device, threads, seed, memory, commit."""

import ctypes
import platform
import random
import subprocess
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

REPO_ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values in glibc's malloc.h


def get_default_device() -> str:
    """CUDA where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_up_device(name: str, threads: int | None, seed: int) -> torch.device:
    """Set torch's threads and seed, and return the device.

    Python's `random` is seeded for the few shots alone: nothing else here draws from it.

    Raises:
        ValueError: There is no such device.
    """
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers to compute with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); try --device {get_default_device()}"
        ) from error
    return device


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep what is freed instead of giving it back.

    Otherwise each large tensor is new pages from the system, which have to be filled with zeros:
    on two cores a fifth of an iteration over ViT-B/16. It costs some 5 % of memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far, in MB: torch's on a CUDA device, else the whole process's.

    0 on Windows, which does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def device_name(device: torch.device) -> str:
    """The device as its maker calls it, where that can be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def get_git_sha() -> str | None:
    """The commit of this repository, with + where files differ from it; None outside git."""
    try:
        git = ["git", "-C", str(REPO_ROOT)]
        options = dict(capture_output=True, text=True, check=True, timeout=10)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        return commit + ("+" if subprocess.run(status, **options).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None
