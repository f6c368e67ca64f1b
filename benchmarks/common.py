"""Parts that the benchmarks share: sizes of CLIPs, prompts, timing, the machine's name, tables."""

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

T = 5  # steps between two draws
VIT_B_16 = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 16,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_layers": 12,
}
VIT_L_14 = dict(
    VIT_B_16, embed_dim=768, vision_layers=24, vision_width=1024, vision_patch_size=14,
    transformer_width=768,
)  # fmt: skip
TINY = dict(
    VIT_B_16, embed_dim=64, image_resolution=32, vision_layers=4, vision_width=128,
    vision_patch_size=8, vocab_size=514, transformer_width=64, transformer_layers=2,
)  # fmt: skip
BACKBONES = {  # arguments of `CLIP`
    "ViT-B/32": {**VIT_B_16, "vision_patch_size": 32},
    "ViT-B/16": VIT_B_16,
    "ViT-L/14": VIT_L_14,
    "tiny": TINY,
}


def random_tokens(classes: int, vocabulary: int, context: int = 77) -> Tensor:
    """Made-up tokens, as many as "a photo of a {}." has for names of one to seven tokens: (C, L).

    Real ones would need the tokenizer's merges file; what a token is costs nothing.
    """
    generator = torch.Generator().manual_seed(0)
    start, end = vocabulary - 2, vocabulary - 1  # the end has the highest id
    tokens = torch.zeros(classes, context, dtype=torch.int64)
    for row in tokens:
        length = int(torch.randint(6, 13, (), generator=generator))
        row[0], row[length + 1] = start, end
        row[1 : length + 1] = torch.randint(1, start, (length,), generator=generator)
    return tokens


def cut(tokens: Tensor) -> Tensor:
    """Tokens as main.py would have them, without what lies behind the longest text: (1, C, L)."""
    return tokens[None, :, : int(tokens.argmax(dim=-1).max()) + 1]


def synchronise(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back_memory(device: torch.device) -> None:
    """Give the system what this process keeps for its next tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(c := ctypes.CDLL(None), "malloc_trim"):
        c.malloc_trim(0)


def peak_mb(device: torch.device) -> float:
    """The most memory used so far, in MB: torch's on a CUDA device, else this process's.

    Of a process just started ru_maxrss tells its parent's peak, where that is higher.
    """
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory_mb(device)
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10


def per_step(values: Sequence[float], steps: Sequence[int]) -> float:
    """Time of a step, draws shared out: medians of the steps that draw and of those that do not.

    Args:
        values: One for each step.
        steps: Their numbers, counted from 1; steps 1, T + 1, 2 T + 1, ... draw.
    """
    drawing, usual = [], []
    for value, step in zip(values, steps, strict=True):
        (usual if (step - 1) % T else drawing).append(value)
    if not (drawing and usual):
        return statistics.median(values)
    return (statistics.median(drawing) + (T - 1) * statistics.median(usual)) / T


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: processor or GPU, threads, torch."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found[1] if found else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def print_table(columns: dict[str, Callable[[dict], Any]], rows: Sequence[dict]) -> None:
    """Print a Markdown table; a column that a row knows nothing of stays empty.

    Args:
        columns: By heading, what makes a cell from a row.
        rows: What was measured.
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
    """Write settings and result to the file that --json names, if it names one."""
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "worker", "folder")}
        text = json.dumps({"settings": settings, **result}, indent=2)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
