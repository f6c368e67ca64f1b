"""One run in several processes, as torchrun starts them: each one's share, and what they exchange.

All compute the same sums, so they agree on the early stop without asking. A process that fails
ends; the others then fail in their next exchange, with PeerExited. Without torchrun there is one
process, and nothing here does anything.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runs.signals import Preempted, SignalHandler

LAUNCHER_ENV_VARS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_store: "dist.Store | None" = None  # which all processes see from `init_store` to their end


class PeerExited(Preempted):
    """Another process of the run has ended."""


def init_store() -> None:
    """Connect to the other processes' store, if torchrun or another launcher started them."""
    global _store
    world_size, tasks = os.environ.get("WORLD_SIZE"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if world_size is None and tasks != "1":
        raise ValueError(
            f"srun started {tasks} processes that would train separately: give it --ntasks 1 and "
            "start torchrun --standalone --nproc_per_node N -- main.py ... there"
        )
    if world_size in (None, "1"):
        return
    if missing := [name for name in LAUNCHER_ENV_VARS if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but {' and '.join(missing)} is not set: start the "
            "processes with torchrun, or unset WORLD_SIZE for a single one"
        )
    try:
        _store, _, _ = next(dist.rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of this run cannot connect ({str(error).splitlines()[0]}): give "
            "torchrun another --master_port, or --standalone where all are on one machine"
        ) from error


def init_distributed(device: str) -> str:
    """Connect all processes, with NCCL on GPUs and gloo on CPUs; return this process's device.

    Raises:
        ValueError: This machine has more processes than GPUs, or `device` names one GPU.
        PeerExited: Another process has refused its arguments.
    """
    if _store is None:
        return device
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend, num_gpus = "gloo", torch.cuda.device_count()
    if torch.device(device).type == "cuda" and num_gpus:
        local_rank = int(os.environ.get("LOCAL_RANK", rank % num_gpus))
        if device != "cuda" or local_rank >= num_gpus:
            raise ValueError(
                "several processes need --device cuda and a GPU each: this machine has "
                f"{num_gpus}, which is torchrun's largest --nproc_per_node"
            )
        device, backend = f"cuda:{local_rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank)
    with comm_errors_as_peer_exit():
        _store.add("ready", 1)
        while _store.add("ready", 0) < world_size:
            if _store.add("errors", 0):
                raise PeerExited(signal.SIGTERM)
            time.sleep(0.02)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size)
    return device


def cleanup_distributed() -> None:
    """Close the connections of a run that has ended well."""
    if get_world_size() > 1:
        dist.destroy_process_group()


def is_first_to_report_error(together: bool = False) -> bool:
    """Whether this process is the one to print why the run ends: the first that asks.

    Where all end `together`, for the same reason, it is rank 0.
    """
    if _store is None:
        return True
    if together and os.environ["RANK"] != "0":
        return False
    try:
        return _store.add("errors", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        return False


def get_rank() -> int:
    """The number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, the process that prints and writes."""
    return get_rank() == 0


def local_slice(count: int) -> slice:
    """The part of `count` items that this process computes; parts differ by one item at most."""
    rank, world_size = get_rank(), get_world_size()
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


@contextmanager
def print_on_main_only() -> Iterator[None]:
    """Within this context, only rank 0 prints; errors are printed outside of it."""
    if is_main_process():
        yield
        return
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
        yield


@contextmanager
def comm_errors_as_peer_exit() -> Iterator[None]:
    """Within this context, a failed exchange raises PeerExited."""
    try:
        yield
    except RuntimeError as error:
        raise PeerExited(signal.SIGTERM) from error


def run_on_main(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on rank 0 only, and return its result on all ranks."""
    result = [function(*args) if is_main_process() else None]
    if get_world_size() > 1:
        with comm_errors_as_peer_exit():
            dist.broadcast_object_list(result, src=0)
    return result[0]


def share_signals(signals: SignalHandler) -> None:
    """Make a signal that has come to one rank pending on all of them."""
    pending = torch.tensor(signals.pending, device="cpu")  # gloo: no GPU is waited for
    with comm_errors_as_peer_exit():
        dist.all_reduce(pending, dist.ReduceOp.MAX)
    signals.pending = int(pending)


def check_same_on_all_ranks(**values: object) -> None:
    """Raise a ValueError where the processes were started with different values."""
    by_rank: list[dict[str, object]] = [values] * get_world_size()
    if get_world_size() > 1:
        with comm_errors_as_peer_exit():
            dist.all_gather_object(by_rank, values)
    if different := [name for name in values if any(x[name] != values[name] for x in by_rank)]:
        raise ValueError(
            f"the processes differ in {', '.join(different)}: start all of them with the same "
            "arguments, data and backbone"
        )


def all_gather_rows(rows: Tensor, count: int) -> Tensor:
    """Join the rows of all ranks, each of which has `local_slice(count)`: (count, ...).

    Gradients flow: those of the result are summed over the ranks.
    """
    if get_world_size() == 1:
        return rows
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[local_slice(count)] = rows
    return _SumOverRanks.apply(padded)


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        with comm_errors_as_peer_exit():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, grad)
