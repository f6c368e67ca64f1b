"""What the benchmarks share: sizes of CLIPs, made-up prompts, timing, memory, tables, JSON."""

import argparse
import ctypes
import json
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runs.environment import peak_memory_mb

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
    """Prompts (C, L) up to the end of the longest one, as main.py has them: (1, C, l)."""
    return tokens[None, :, : int(tokens.argmax(dim=-1).max()) + 1]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give cached memory back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB: torch's on a CUDA device, else this process's.

    The ru_maxrss of a new process may be its parent's, so /proc is read if it is there.
    """
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory_mb(device)
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10


def amortized_step_time(times: Sequence[float], steps: Sequence[int]) -> float:
    """Mean over T steps of the median step that refreshes supports and T - 1 median others.

    Args:
        times: Time of each step.
        steps: Number of each step, from 1; steps 1, T + 1, 2 T + 1, ... refresh.
    """
    refreshing, usual = [], []
    for time, step in zip(times, steps, strict=True):
        (usual if (step - 1) % T else refreshing).append(time)
    if not (refreshing and usual):
        return statistics.median(times)
    return (statistics.median(refreshing) + (T - 1) * statistics.median(usual)) / T


def machine(device: torch.device) -> dict[str, Any]:
    """Names of the processor or GPU and of torch's version, and the number of threads."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found[1] if found else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def print_table(columns: dict[str, Callable[[dict], Any]], rows: Sequence[dict]) -> None:
    """Print a Markdown table. A cell is empty if its row lacks the key.

    Args:
        columns: By heading, the function that makes a cell from a row.
        rows: The measurements.
    """
    print(f"| {' | '.join(columns)} |\n|{'-|' * len(columns)}")
    for row in rows:
        cells = []
        for cell in columns.values():
            try:
                cells.append(str(cell(row)))
            except KeyError:
                cells.append("")
        print(f"| {' | '.join(cells)} |")


def write_json(args: argparse.Namespace, **result: Any) -> None:
    """Write settings and result to --json's file, if there is one."""
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        text = json.dumps({"settings": settings, **result}, indent=2)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
