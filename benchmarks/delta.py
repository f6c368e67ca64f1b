"""File sizes of weights.safetensors and checkpoint.pt after N steps, next to full weights.

    python benchmarks/delta.py [--steps 100 1000 10000] [--density 5e-5] [--threads 1]

SO trains a backbone with random weights by random gradients at the entries that it draws. There is
no forward pass: the draws determine which entries change.
"""

import argparse
import io
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import BACKBONES, T, print_table
from clip import CLIP, build_model
from clip.lora import apply_lora
from optimizers import SO
from optimizers.build import IN_PROJ_SUFFIX, mark_as_trainable
from optimizers.delta import apply_delta, diff_state_dict, read_delta, save_delta, state_dict_sha256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--density", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        print_table(measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train, and return a row for each number of steps and for each other kind of file."""
    model = CLIP(**BACKBONES[args.backbone])
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained, sha256 = mark_as_trainable(model, "both", "all"), state_dict_sha256(base)
    optimizer = SO(list(trained.values()), density_ratio=args.density, T=T, seed=0)
    entries = sum(p.numel() for p in trained.values())
    file, rows = folder / "weights.safetensors", []
    for step in range(1, max(args.steps) + 1):
        optimizer.draw_supports()
        for p in trained.values():  # gradients of the layout that sample_gradients gives
            at = torch.stack(torch.unravel_index(optimizer.state[p]["grad_indices"], p.shape))
            values = torch.randn(at.shape[1])
            p.grad = torch.sparse_coo_tensor(at, values, p.shape, check_invariants=False)
        optimizer.step()
        if step not in args.steps:
            continue
        save_s = timeit(lambda: save_delta(file, trained, base, sha256), number=1)
        delta, copy = read_delta(file), build_model(base)
        apply_s = timeit(lambda delta=delta, copy=copy: apply_delta(copy, delta), number=1)
        assert state_dict_sha256(copy) == state_dict_sha256(model)
        changed = sum(len(change.indices) for change in delta.tensors.values())
        checkpoint = diff_state_dict(trained, base), optimizer.state_dict()
        rows.append({
            "file": f"delta after {step} steps",
            "entries changed": f"{changed:,}",
            "of all, %": f"{100 * changed / entries:.3f}",
            "MB": megabytes(file.stat().st_size),
            "compare and write, s": f"{save_s:.2f}",
            "check and apply, s": f"{apply_s:.2f}",
            "checkpoint.pt, MB": megabytes(torch_bytes(checkpoint)),
        })  # fmt: skip
    layers = [name.removesuffix(IN_PROJ_SUFFIX) for name in trained if IN_PROJ_SUFFIX in name]
    adapters = apply_lora(build_model(base), layers, rank=2)
    half = {key: t.half() if t.is_floating_point() else t for key, t in base.items()}
    others = {
        "LoRA adapter, rank 2": len(safetensors.torch.save(adapters)),
        "the matrices, whole": 4 * entries,
        "full checkpoint, float32": torch_bytes(base),
        "full checkpoint, float16": torch_bytes(half),
    }
    return rows + [{"file": name, "MB": megabytes(size)} for name, size in others.items()]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def torch_bytes(content: Any) -> int:
    """Size of what torch.save writes."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.tell()


if __name__ == "__main__":
    main()
