"""What the benchmarks share: sizes of CLIPs, made-up prompts, processes, tables."""

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
T = 5  # steps between two refreshes of SO's supports
BACKBONES = {"ViT-B/16": dict(  # arguments of `CLIP`
    embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
    context_length=77, vocab_size=49408, transformer_width=512, transformer_layers=12,
)}  # fmt: skip
BACKBONES["tiny"] = BACKBONES["ViT-B/16"] | dict(
    embed_dim=64, image_resolution=32, vision_layers=4, vision_width=128, vision_patch_size=8,
    vocab_size=514, transformer_width=64, transformer_layers=2,
)  # fmt: skip


def random_tokens(classes: int, vocab_size: int) -> Tensor:
    """Random prompts (C, 77) as long as "a photo of a {}." with names of one to seven tokens."""
    tokens = torch.randint(1, vocab_size - 2, (classes, 77))
    tokens[:, 0] = vocab_size - 2  # start of text
    ends = torch.randint(7, 14, (classes, 1))
    tokens[torch.arange(77) > ends] = 0
    return tokens.scatter_(1, ends, vocab_size - 1)


def run_in_process(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a new process, where nothing is left of what was measured before."""
    method = "spawn" if torch.cuda.is_available() else "fork"
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply(function, args)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table of rows by heading."""
    print(f"| {' | '.join(rows[0])} |\n|{'-|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
