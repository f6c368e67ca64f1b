"""What the benchmarks share: sizes of CLIPs, made-up prompts, timing, memory, tables."""

import multiprocessing
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from runs.environment import peak_memory_mb

Result = TypeVar("Result")
T = 5  # steps between two refreshes of SO's supports
BACKBONES = {"ViT-B/16": dict(  # arguments of `CLIP`
    embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
    context_length=77, vocab_size=49408, transformer_width=512, transformer_layers=12,
)}  # fmt: skip
BACKBONES["ViT-L/14"] = BACKBONES["ViT-B/16"] | dict(
    embed_dim=768, vision_layers=24, vision_width=1024, vision_patch_size=14, transformer_width=768
)
BACKBONES["tiny"] = BACKBONES["ViT-B/16"] | dict(
    embed_dim=64, image_resolution=32, vision_layers=4, vision_width=128, vision_patch_size=8,
    vocab_size=514, transformer_width=64, transformer_layers=2,
)  # fmt: skip


def random_tokens(classes: int, vocab_size: int, context_length: int = 77) -> Tensor:
    """Random prompts (C, L) as long as "a photo of a {}." with names of one to seven tokens."""
    generator = torch.Generator().manual_seed(0)
    start, end = vocab_size - 2, vocab_size - 1
    tokens = torch.zeros(classes, context_length, dtype=torch.int64)
    for row in tokens:
        length = int(torch.randint(6, 13, (), generator=generator))
        row[0], row[length + 1] = start, end
        row[1 : length + 1] = torch.randint(1, start, (length,), generator=generator)
    return tokens


def trim_padding(tokens: Tensor) -> Tensor:
    """Prompts (C, L) up to the end of the longest one, as main.py has them: (C, l)."""
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def run_in_process(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a new process, where nothing is left of what was measured before."""
    method = "spawn" if torch.cuda.is_available() else "fork"
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply(function, args)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB: torch's on a CUDA device, else this process's.

    The ru_maxrss of a new process may be its parent's, so /proc is read if it is there.
    """
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory_mb(device)
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10


def describe_machine(device: torch.device) -> str:
    """The processor or GPU, the number of threads, and torch's version."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        match = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = match[1] if match else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table of rows by heading; the first row has all headings."""
    print(f"| {' | '.join(rows[0])} |\n|{'-|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(heading, '')) for heading in rows[0])} |")
