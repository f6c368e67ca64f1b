"""What processes exchange in a training iteration: bytes and milliseconds, side by side.

    python benchmarks/communication.py [--processes 2 4] [--classes 10 100 1000]

Processes on this machine exchange random gradients of both towers' weights over gloo, and compute
nothing else. `SO` and `LoRA` are main.py's `sum_gradients`: k values of each weight, or adapters,
and the loss. `all weights` is torch's DistributedDataParallel with its buckets of 25 MB: a backward
pass that only writes gradients, less the same pass within `no_sync()`. `features` are main.py's
text features of C classes, gathered, and their gradient. Bytes are those given to
`dist.all_reduce`. Exchanges take turns; a time is that of the slowest process.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import BACKBONES, T, describe_machine, print_table
from clip import CLIP
from optimizers.build import build_optimizer, mark_as_trainable
from optimizers.SampledGradients import sum_gradients
from runs.distributed import all_gather_rows, local_slice

WARM_UP = 3  # rounds; DistributedDataParallel arranges its buckets after the first
RANK = 2  # of LoRA's adapters

Exchange = Callable[[], float]  # exchanges once; returns milliseconds, as `time_slowest` does


def time_slowest(work: Callable[[], object]) -> float:
    """Let all processes begin some work together; return the milliseconds of the slowest."""
    dist.barrier()
    start = time.perf_counter()
    work()
    times = [1e3 * (time.perf_counter() - start)] * dist.get_world_size()
    dist.all_gather_object(times, times[0])
    return max(times)


def sum_all_gradients(optimizer: torch.optim.Optimizer) -> Exchange:
    """The exchange of `train.train_step`."""
    params, loss = optimizer.param_groups[0]["params"], torch.zeros(())
    sum_gradients(params)  # there are none yet: each gets zeros in the layout of its gradients

    def run() -> float:
        for p in params:
            (p.grad._values() if p.grad.is_sparse else p.grad).normal_()
        return time_slowest(lambda: sum_gradients(params, extra=[loss]))

    return run


def ddp_all_reduce(params: list[nn.Parameter]) -> Exchange:
    """The exchange of DistributedDataParallel, without the time of the backward pass itself."""
    module = nn.Module()
    module.weights = nn.ParameterList(params)
    module.forward = lambda: sum(p.sum() for p in module.weights)  # all gradients are ones
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    ddp.register_comm_hook(None, allreduce_hook)  # DDP's default, but through dist.all_reduce

    def backward(sync: bool) -> float:
        ddp.zero_grad(set_to_none=False)  # gradients stay in their buckets: nothing is copied
        with nullcontext() if sync else ddp.no_sync():
            return time_slowest(ddp().backward)

    return lambda: backward(True) - backward(False)


def gather_features(classes: int, width: int) -> Exchange:
    """The exchange of `train.encode_classes_together`, and of its gradient."""
    grad = torch.randn(classes, width)
    rows = grad[local_slice(classes)].requires_grad_()
    return lambda: time_slowest(lambda: all_gather_rows(rows, classes).backward(grad))


def work(rank: int, size: int, folder: Path, args: argparse.Namespace) -> None:
    """Measure, as one of `size` processes; the first writes the rows to a file."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    config = BACKBONES[args.backbone]

    def optimizer(method: str) -> torch.optim.Optimizer:
        model = CLIP(**config)
        weights = mark_as_trainable(model, "both", "all", method)
        settings = dict(lr=1e-4, density=args.density, T=T, rank=RANK, seed=0)
        return build_optimizer(method, model, weights, **settings)

    so, lora, adam = map(optimizer, ("so", "lora", "adam"))
    width = config["embed_dim"]
    exchanges = {
        "SO": sum_all_gradients(so),
        f"LoRA, rank {RANK}": sum_all_gradients(lora),
        "all weights": ddp_all_reduce(adam.param_groups[0]["params"]),
        **{f"features, {n} classes": gather_features(n, width) for n in args.classes},
    }
    rounds = [{k: run() for k, run in exchanges.items()} for _ in range(WARM_UP + args.repeats)]
    rows = []
    for name, run in exchanges.items():
        ms = [times[name] for times in rounds[WARM_UP:]]
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            run()
        sizes = [call.args[0].nbytes for call in all_reduce.call_args_list]
        rows.append({
            "processes": size,
            "exchange": name,
            "all-reduces": len(sizes),
            "bytes": f"{sum(sizes):,}",
            "ms": f"{median(ms):,.2f}",
            "least, ms": f"{min(ms):,.2f}",
        })  # fmt: skip
    if rank == 0:
        torch.save(rows, folder / "rows.pt")
    dist.destroy_process_group()


def measure(size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of `size` processes, forked from this one."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, Path(folder), args), size, start_method="fork")
        return torch.load(Path(folder, "rows.pt"), weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes to measure")
    add("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    add("--classes", type=int, nargs="+", default=[10, 100, 1000])
    add("--density", type=float, default=5e-5)
    add("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for size in args.processes for row in measure(size, args)]
    print(
        f"{args.backbone}, both encoders, all layers, density {args.density:g}, float32, gloo; "
        f"{mp.cpu_count()} cores, {describe_machine(torch.device('cpu'))}\n"
    )
    print_table(rows)


if __name__ == "__main__":
    main()
