"""What processes exchange in an iteration of training: bytes and time, side by side.

    python benchmarks/communication.py [--processes 2 4] [--classes 10 100 1000] [--json FILE]

Measured: processes on this machine exchange random gradients of both towers' matrices over gloo,
and compute nothing else. `SO` and `LoRA` are main.py's `sum_gradients`: k values or whole adapters,
and the loss. `all matrices` is torch's DistributedDataParallel, with its buckets of 25 MB: a
backward pass that only writes gradients, less the same pass within `no_sync()`. `features` are
those of C classes, which main.py gathers, and their gradient on the way back; the control number
tells of a signal. Bytes are those of the tensors given to `dist.all_reduce`; exchanges take turns;
a time is that of the slowest process.

Computed, not measured: how long these all-reduces would take on 8 to 1,024 GPUs, from their bytes
and the latencies and bandwidths that the flags assume.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import BACKBONES, T, machine, print_table, write_json
from clip import CLIP
from optimizers.build import build_optimizer, mark_as_trainable
from optimizers.SampledGradients import sum_gradients
from runs.distributed import all_gather_rows, local_slice, raise_if_any_preempted

WARM_UP = 3  # rounds; DistributedDataParallel arranges its buckets after the first
RANK = 2  # of LoRA's adapters
GPUS, WITHIN = (8, 64, 256, 1024), 8  # of the computed table; in one machine

ASSUMPTIONS = """
Computed, not measured: ms of the same all-reduces, one after the other, among n GPUs. Ring:
2 (n - 1) latency + 2 (n - 1) / n bytes / bandwidth; tree: 2 log2(n) latency + 2 bytes / bandwidth.
Assumed: {1:g} us and {2:g} GB/s up to {0} GPUs, in one machine; for more, {3:g} us and {4:g} GB/s
({5:g} Gbit/s), since a step takes as long as its slowest hop, which is between two machines.
"""

Exchange = Callable[[], float]  # exchanges once; returns milliseconds, as `slowest` does


def slowest(work: Callable[[], object]) -> float:
    """Let all processes begin some work together; return the milliseconds of the slowest."""
    dist.barrier()
    start = time.perf_counter()
    work()
    each = [1e3 * (time.perf_counter() - start)] * dist.get_world_size()
    dist.all_gather_object(each, each[0])
    return max(each)


def of_gradients(optimizer: torch.optim.Optimizer) -> Exchange:
    """The exchange of `train.train`."""
    loss = torch.zeros(())

    def params() -> list[torch.Tensor]:  # by way of the optimizer: sampling ends with it
        return optimizer.param_groups[0]["params"]

    sum_gradients(params())  # there are none: all get zeros, in the layout of their gradients
    grads = [p.grad for p in params()]

    def run() -> float:
        for grad in grads:
            (grad._values() if grad.is_sparse else grad).normal_()
        return slowest(lambda: sum_gradients(params(), also=[loss]))

    return run


def of_ddp(optimizer: torch.optim.Optimizer) -> Exchange:
    """The exchange of DistributedDataParallel, without what a backward pass costs anyway."""
    module = nn.Module()
    module.matrices = nn.ParameterList(optimizer.param_groups[0]["params"])
    module.forward = lambda: sum(p.sum() for p in module.matrices)  # all gradients are ones
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    ddp.register_comm_hook(None, allreduce_hook)  # what it does without, but where it is counted

    def backward(exchanges: bool) -> float:
        ddp.zero_grad(set_to_none=False)  # gradients stay in their buckets: nothing is copied
        with nullcontext() if exchanges else ddp.no_sync():
            return slowest(ddp().backward)

    return lambda: backward(True) - backward(False)


def work(rank: int, size: int, folder: Path, args: argparse.Namespace) -> None:
    """Measure, as one of `size` processes, the first of which writes down the rows."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    config = BACKBONES[args.backbone]

    def optimizer(method: str) -> torch.optim.Optimizer:
        model = CLIP(**config)
        matrices = mark_as_trainable(model, "both", "all", method)
        settings = dict(lr=1e-4, density=args.density, T=T, rank=RANK, seed=0)
        return build_optimizer(method, model, matrices, **settings)

    def of_features(classes: int) -> Exchange:
        grad = torch.randn(classes, config["embed_dim"])
        rows = grad[local_slice(classes)].requires_grad_()
        return lambda: slowest(lambda: all_gather_rows(rows, classes).backward(grad))

    no_signal = SimpleNamespace(pending=0)
    exchanges = {
        "SO": of_gradients(optimizer("so")),
        f"LoRA, rank {RANK}": of_gradients(optimizer("lora")),
        "all matrices": of_ddp(optimizer("adam")),
        **{f"features, {classes} classes": of_features(classes) for classes in args.classes},
        "control number": lambda: slowest(lambda: raise_if_any_preempted(no_signal)),
    }
    rounds = [{k: run() for k, run in exchanges.items()} for _ in range(WARM_UP + args.repeats)]
    rows = []
    for name, run in exchanges.items():
        ms = [times[name] for times in rounds[WARM_UP:]]
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
            run()
        sizes = [call.args[0].nbytes for call in counted.call_args_list]
        measured = dict(sizes=sizes, bytes=sum(sizes), ms=ms, median_ms=median(ms))
        rows.append(dict(processes=size, exchange=name, **measured))
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of `size` processes, forked from this one, which has torch already."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, Path(folder), args), size, start_method="fork")
        return json.loads(Path(folder, "rows.json").read_text())


def computed_ms(sizes: list[int], n: int, args: argparse.Namespace, by: str) -> float:
    """What all-reduces of `sizes` bytes, one after the other, would take among n GPUs."""
    latency, bandwidth = args.within if n <= WITHIN else args.between  # us, GB/s
    steps, times = (2 * (n - 1), 2 * (n - 1) / n) if by == "ring" else (2 * math.log2(n), 2)
    return sum(steps * latency / 1e3 + times * size / (bandwidth * 1e6) for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[2, 4], help="numbers of them to measure")
    add("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    add("--classes", type=int, nargs="+", default=[10, 100, 1000])
    add("--density", type=float, default=5e-5)
    add("--repeats", type=int, default=20)
    for where, default in (("within", [5, 300]), ("between", [10, 25])):
        text = f"latency of a step and bandwidth {where} machines, assumed for the computed table"
        add(f"--{where}", type=float, nargs=2, metavar=("US", "GB/S"), default=default, help=text)
    add("--json", help="write the figures to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine(torch.device("cpu")) | {"cores": mp.cpu_count()}
    rows = [row for size in args.processes for row in measure(size, args)]
    print(
        f"{args.backbone}, both encoders, all layers, density {args.density:g}, float32, gloo; "
        f"{about['device']}, {about['cores']} cores, torch {about['torch']}\n"
    )
    so = {row["processes"]: row for row in rows if row["exchange"] == "SO"}
    columns: dict[str, Callable[[dict], Any]] = {
        "processes": lambda row: row["processes"],
        "exchange": lambda row: row["exchange"],
        "all-reduces": lambda row: len(row["sizes"]),
        "bytes": lambda row: f"{row['bytes']:,}",
        "bytes / SO's": lambda row: f"{row['bytes'] / so[row['processes']]['bytes']:,.4g}",
        "ms": lambda row: f"{row['median_ms']:,.2f}",
        "least, ms": lambda row: f"{min(row['ms']):,.2f}",
        "ms / SO's": lambda row: f"{row['median_ms'] / so[row['processes']]['median_ms']:,.2f}",
    }
    print_table(columns, rows)
    sizes = {row["exchange"]: row["sizes"] for row in rows}
    del sizes["control number"]  # stays on CPUs
    computed = [
        {"GPUs": n, "algorithm": by} | {k: computed_ms(v, n, args, by) for k, v in sizes.items()}
        for n in GPUS
        for by in ("ring", "tree")
    ]
    print(ASSUMPTIONS.format(WITHIN, *args.within, *args.between, 8 * args.between[1]))
    heads = {k: lambda row, k=k: row[k] for k in ("GPUs", "algorithm")}
    print_table(heads | {k: lambda row, k=k: f"{row[k]:,.2f}" for k in sizes}, computed)
    write_json(args, machine=about, rows=rows, computed=computed)


if __name__ == "__main__":
    main()
