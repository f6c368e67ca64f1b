"""Bytes of weights.safetensors and checkpoint.pt after so many steps, beside whole ones'.

    python benchmarks/delta.py [--steps 100 1000 10000] [--density 5e-5] [--threads 1] [--json FILE]

SO moves the matrices of a backbone with random weights, by random gradients at the entries that it
draws; there is no forward pass. What a delta holds is decided by the draws alone: an entry differs
from its base from the first step that reads a gradient there.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import BACKBONES, T, machine, print_table, write_json
from clip import CLIP, build_model
from clip.lora import apply_lora
from optimizers import SO
from optimizers.build import IN_PROJ_SUFFIX, Method, mark_as_trainable
from optimizers.delta import apply_delta, read_delta, save_delta, state_dict_sha256
from run_utils import get_arguments
from runs.checkpoint import CheckpointSaver
from runs.weights import PretrainedModel
from train import Adapted, TrainState

MB = 1e6  # bytes, as file sizes are told
RANK = 2


class Counter:
    """A file that keeps nothing but the number of bytes written to it."""

    size = 0

    def write(self, data: Any) -> int:
        """Count the bytes."""
        self.size += (n := memoryview(data).nbytes)
        return n

    def flush(self) -> None:
        """Do nothing."""


def saved_bytes(state: dict[str, Tensor]) -> int:
    """Size of a state dict as torch.save writes it."""
    counter = Counter()
    torch.save(state, counter)
    return counter.size


def random_gradients(optimizer: SO, params: Sequence[nn.Parameter], noise: torch.Generator) -> None:
    """Give each matrix a gradient at the entries that the coming step reads, as sampling does."""
    optimizer.draw_supports()
    supports = [optimizer.state[p]["grad_indices"] for p in params]
    values = torch.randn(sum(map(len, supports)), generator=noise)
    for p, at, part in zip(params, supports, values.split([*map(len, supports)]), strict=True):
        rows = torch.stack([at // p.shape[1], at % p.shape[1]])
        p.grad = torch.sparse_coo_tensor(rows, part, p.shape, check_invariants=False)


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--density", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write settings, machine and table to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    model = CLIP(**BACKBONES[args.backbone])
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    matrices = mark_as_trainable(model, "both", "all")
    params = list(matrices.values())
    full, digest = saved_bytes(base), state_dict_sha256(base)
    entries = sum(p.numel() for p in params)
    about = machine(torch.device("cpu"))
    print(
        f"{args.backbone}, {len(params)} matrices, {entries:,} entries, density "
        f"{args.density:g}, T {T}; {about['device']}, {about['threads']} threads, torch "
        f"{about['torch']}\n",
        flush=True,
    )

    optimizer = SO(params, density_ratio=args.density, T=T, seed=0)
    kept = PretrainedModel("in memory")
    kept.reload_state_dict = lambda: base
    adapted = Adapted(model, torch.zeros(0), Method(optimizer, matrices), kept)

    noise = torch.Generator().manual_seed(0)
    rows, done = [], 0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        for steps in sorted(args.steps):
            while done < steps:
                random_gradients(optimizer, params, noise)
                optimizer.step()
                done += 1
            writing = timed(lambda: save_delta(path, matrices, base, digest))
            delta = read_delta(path)
            copy = build_model(base)
            applying = timed(lambda copy=copy, delta=delta: apply_delta(copy, delta))
            assert state_dict_sha256(copy) == state_dict_sha256(model)  # exact
            changed = sum(len(change.indices) for change in delta.tensors.values())
            row = f"delta after {steps} steps"
            rows.append(dict(row=row, steps=steps, bytes=path.stat().st_size, entries=changed))
            rows[-1] |= dict(share=changed / entries, writing_s=writing, applying_s=applying)
            checkpoint = CheckpointSaver(path.parent, get_arguments([]), {}, digest)
            course = TrainState(steps, steps, losses=torch.zeros(steps))
            rows[-1]["checkpoint_s"] = timed(lambda c=checkpoint, to=course: c.save(adapted, to))
            rows[-1]["checkpoint_bytes"] = (path.parent / "checkpoint.pt").stat().st_size
    rows.append(dict(row="LoRA adapter, rank 2", bytes=adapter_bytes(base, matrices)))
    rows.append(dict(row="the matrices, whole", bytes=4 * entries))
    rows.append(dict(row="full checkpoint, float32", bytes=full))
    half = {key: t.half() if t.is_floating_point() else t for key, t in base.items()}
    rows.append(dict(row="full checkpoint, float16", bytes=saved_bytes(half)))
    columns = {
        "file": lambda row: row["row"],
        "entries changed": lambda row: f"{row['entries']:,}",
        "of all, %": lambda row: f"{100 * row['share']:.3f}",
        "MB": lambda row: f"{row['bytes'] / MB:.2f}",
        "of the full checkpoint, %": lambda row: f"{100 * row['bytes'] / full:.2f}",
        "compare and write, s": lambda row: f"{row['writing_s']:.2f}",
        "check and apply, s": lambda row: f"{row['applying_s']:.2f}",
        "checkpoint.pt, MB": lambda row: f"{row['checkpoint_bytes'] / MB:.2f}",
        "written in, s": lambda row: f"{row['checkpoint_s']:.2f}",
    }
    print_table(columns, rows)
    write_json(args, machine=about, rows=rows)


def adapter_bytes(base: dict[str, Tensor], matrices: dict[str, nn.Parameter]) -> int:
    """Size of LoRA's adapters on q, k and v of the same layers, as safetensors."""
    layers = [
        name.removesuffix(IN_PROJ_SUFFIX) for name in matrices if name.endswith(IN_PROJ_SUFFIX)
    ]
    return len(safetensors.torch.save(apply_lora(build_model(base), layers, RANK)))


if __name__ == "__main__":
    main()
