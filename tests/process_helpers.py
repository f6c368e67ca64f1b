"""Processes as torchrun starts them, but forked from this one, which has imported torch already."""

import multiprocessing
import os
import sys
import traceback

import torch
import torch.distributed as dist
from commands import call_main

from runs.signals import Preempted

TIMEOUT_S = 60  # processes end within a few seconds


def run_in_processes(world_size, work, folder):
    """Run work(rank) in processes with torchrun's environment.

    Returns what `work` returned for each rank, passed through a file in `folder`, or the exit
    status of a process that failed.
    """
    context = multiprocessing.get_context("fork")
    ports = context.SimpleQueue()

    def run(rank):
        env = dict(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1",
            MASTER_PORT=ports.get(), TORCHELASTIC_USE_AGENT_STORE=True,
            TORCHELASTIC_RESTART_COUNT=0,
        )  # fmt: skip
        os.environ.update({key: str(value) for key, value in env.items()})
        try:
            torch.save(work(rank), folder / f"{rank}.pt")
        except (Exception, Preempted):
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)  # without the exit handlers, which belong to the parent

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    # torchrun's store comes last: a process that is forked beside its threads may hang.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in processes:
        ports.put(store.port)
    for process in processes:
        process.join(TIMEOUT_S)
        process.kill()  # if it hangs
        process.join()
    return [
        process.exitcode or torch.load(folder / f"{rank}.pt", weights_only=False)
        for rank, process in enumerate(processes)
    ]


def run_main_in_processes(world_size, folder, *argv, prepare=None):
    """`call_main` in processes; `prepare`, called with the rank first, may return its arguments."""

    def work(rank):
        return call_main(*(prepare and prepare(rank) or argv))

    return run_in_processes(world_size, work, folder)
