"""Several processes, one run: which part of the work is whose, and what they tell each other.

torchrun starts them, on one machine or several, and says so in the environment. A run without it
is one process, ALONE, for which nothing here does anything.

Processes compute the same numbers from the same sums, so that they agree on what to do next
without asking: on early stopping, on a loss that is not finite. What one of them alone can know, a
signal or what lies on the disk, is told to all. A process that fails, for whatever reason, ends:
its connections break, and the others meet that in their next exchange, as `Left`.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runs.signals import Preempted, SignalHandler

T = TypeVar("T")
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets


class PeerExited(Preempted):
    """Another process of the run has ended."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


class Shard(NamedTuple):
    """A process's part of some of the items, each of which has a number from 0 on."""

    items: slice  # that are taken at once
    mine: slice  # those of them that this process takes

    @property
    def rows(self) -> tuple[int, slice]:
        """How many items are taken at once, and which of these, counted from 0, are mine."""
        start = self.items.start
        return self.items.stop - start, slice(self.mine.start - start, self.mine.stop - start)


class DistInfo(NamedTuple):
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def shares(self, count: int, at_once: int = 0) -> list[Shard]:
        """Share out items, `at_once` (0: all) of them after the other; shares may be empty."""
        shares = []
        for start in range(0, count, at_once or max(count, 1)):
            stop = min(start + (at_once or count), count)
            edges = [start + (stop - start) * r // self.size for r in (self.rank, self.rank + 1)]
            shares.append(Shard(slice(start, stop), slice(*edges)))
        return shares

    def own(self, count: int, at_once: int = 0) -> list[int]:
        """The numbers of all items in this process's shares."""
        return [i for share in self.shares(count, at_once) for i in range(count)[share.mine]]

    def gather(self, rows: Tensor, own: Sequence[int], count: int) -> Tensor:
        """Put all processes' rows in their places: (len(own), ...) -> (count, ...).

        Gradients of the result, different ones in each process, are summed for each row's own.
        """
        return rows if self.size == 1 else _Gather.apply(rows, own, count)

    def first(self, work: Callable[[], T]) -> T:
        """Do some work in the first process, and give what it returns to all."""
        result = [work() if self.rank == 0 else None]
        if self.size > 1:
            with comm_errors_as_peer_exit():
                dist.broadcast_object_list(result, src=0)
        return result[0]

    def check(self, signals: SignalHandler) -> None:
        """Raise Interrupted, in all processes alike, if a signal has come to one of them."""
        if self.size == 1:
            return signals.check()
        pending = torch.tensor(signals.pending)  # on the CPU: no GPU is waited for
        with comm_errors_as_peer_exit():
            dist.all_reduce(pending, dist.ReduceOp.MAX)
        if number := int(pending):
            raise Preempted(number)

    def check_same(self, **facts: object) -> None:
        """Refuse processes that were not told the same.

        Raises:
            ValueError: One of the facts is another in some process.
        """
        told: list[dict[str, object]] = [facts] * self.size
        if self.size > 1:
            with comm_errors_as_peer_exit():
                dist.all_gather_object(told, facts)
        for rank, theirs in enumerate(told):
            for name in facts:
                if theirs[name] != told[0][name]:
                    raise ValueError(
                        f"process {rank} has {name} {theirs[name]}, process 0 has {told[0][name]}: "
                        "start all of them with the same arguments, data and backbone"
                    )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Have the first process alone print; errors are told outside of this."""
        with ExitStack() as stack:
            if not self.writes:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield


SINGLE_PROCESS = DistInfo()
_store: "dist.Store | None" = None  # what all processes of the run see, until the last of them ends


def init_store() -> DistInfo:
    """Meet the other processes that torchrun has started, if it has.

    Raises:
        ValueError: They cannot be reached, or the port is in use.
    """
    global _store
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or any(name not in os.environ for name in TORCHRUN):
        return SINGLE_PROCESS
    try:
        _store, rank, size = next(dist.rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ[name] for name in TORCHRUN[-2:])
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes of this run cannot meet at {where} ({reason}): give torchrun another "
            "--master_port, or --standalone where all are on one machine"
        ) from error
    return DistInfo(rank, size)


def init_distributed(processes: DistInfo, device: str) -> str:
    """Connect the processes, over NCCL on GPUs and gloo on CPUs; return each one's own device.

    Raises:
        ValueError: There are more processes on this machine than GPUs, or one GPU is named.
    """
    if processes.size == 1:
        return device
    backend = "gloo"
    if torch.device(device).type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device != "cuda":
            raise ValueError(f"--device {device} is one GPU: several processes take --device cuda")
        if 0 < there <= local:
            raise ValueError(
                f"this machine has fewer GPUs, {there}, than processes: give torchrun "
                f"--nproc_per_node {there}"
            )
        if there:
            device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local)
    with comm_errors_as_peer_exit():
        _store.add("ready", 1)
        while _store.add("ready", 0) < processes.size:
            if _store.add("complaints", 0):  # about its arguments
                raise PeerExited
            time.sleep(0.02)
        dist.init_process_group(
            backend, store=_store, rank=processes.rank, world_size=processes.size
        )
    return device


def cleanup_distributed(processes: DistInfo) -> None:
    """End the connections of a run that has ended well."""
    if processes.size > 1:
        dist.destroy_process_group()


@contextmanager
def comm_errors_as_peer_exit() -> Iterator[None]:
    """Within this, processes talk to each other.

    Raises:
        Left: One of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerExited from error


def is_first_to_report_error(together: bool = False) -> bool:
    """Whether this process is the one to say why it ends: the first that asks.

    Where the processes end `together` it is the one that prints, or none.
    """
    if _store is None:
        return True
    if together and os.environ["RANK"] != "0":
        return False
    try:
        return _store.add("complaints", 1) == 1
    except RuntimeError:  # what kept it has ended
        return False


class _Gather(torch.autograd.Function):
    """Rows of all processes in one tensor, by a sum with zeros elsewhere, which is exact."""

    @staticmethod
    def forward(ctx, rows: Tensor, own: Sequence[int], count: int) -> Tensor:
        ctx.own = torch.tensor(own, dtype=torch.int64, device="cpu").to(rows.device)
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[ctx.own] = rows
        with comm_errors_as_peer_exit():
            dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().clone()
        with comm_errors_as_peer_exit():
            dist.all_reduce(grad)
        return grad[ctx.own], None, None
