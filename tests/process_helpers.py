"""Several processes as torchrun starts them, but forked from this one, which has torch already."""

import multiprocessing
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
from commands import call_main

from runs.signals import Preempted

TIMEOUT = 60  # seconds that processes may take, which end within a few


def in_processes(count, work, folder):
    """Run work(rank) in processes that can meet; return what each returns, or its exit status."""
    context = multiprocessing.get_context("fork")
    ports = context.SimpleQueue()

    def run(rank):
        told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1")
        told.update(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
        told.update(MASTER_PORT=ports.get())
        os.environ.update({key: str(value) for key, value in told.items()})
        try:
            result = work(rank)
        except (Exception, Preempted):
            traceback.print_exc()
            os._exit(1)
        torch.save(result, folder / f"{rank}.pt")
        sys.stdout.flush()
        os._exit(0)  # as what this process has inherited is not its own to tidy

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    # torchrun's part, last: a process that is forked beside its threads may wait for ever.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in processes:
        ports.put(store.port)
    ends = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
    if waiting := [process for process in processes if process.is_alive()]:
        for process in waiting:
            process.kill()
            process.join()
        raise TimeoutError(f"{len(waiting)} of {count} processes did not end")
    return [
        torch.load(folder / f"{rank}.pt", weights_only=False)
        if process.exitcode == 0
        else process.exitcode
        for rank, process in enumerate(processes)
    ]


def main_in_processes(count, folder, *argv, prepare=None):
    """main.py in processes: (status, standard output, standard error) of each.

    `prepare(rank)`, if given, is called in each first; it may return other arguments.
    """

    def work(rank):
        other = prepare(rank) if prepare else None
        return call_main(*(other or argv))

    return in_processes(count, work, folder)
