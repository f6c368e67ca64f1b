"""Several processes: the numbers of one process, and one end for all of them."""

import os
import re
import signal
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT
from commands import act_after, read_losses, run
from process_helpers import run_in_processes, run_main_in_processes
from train_helpers import build, train_losses

import main
from clip.lora import set_dropout
from optimizers.build import trainable_parameters
from runs import distributed

SMALL_VIT = {**TINY_VIT, "vision_layers": 2}


def fit(grad_accum_steps=1, **case):
    """Train for four iterations; return the weights, the losses, and rows of all processes."""
    classifier, *training = build(
        position="all", lr=1e-2, total_iters=4, templates=["a {}.", "the {}."],
        **dict(config=SMALL_VIT, dtype=torch.float64) | case,
    )  # fmt: skip
    set_dropout(classifier.model, False)  # of LoRA: each rank has noise of its own
    losses = train_losses(classifier, *training, grad_accum_steps=grad_accum_steps)
    rows = torch.arange(14).view(7, 2)
    rows = distributed.all_gather_rows(rows[distributed.local_slice(7)], 7)
    weights = {name: p.detach() for name, p in trainable_parameters(classifier.model).items()}
    return weights | {"losses": torch.tensor(losses), "rows": rows}


CASES = {  # by number of processes: arguments of `fit`, relative error
    2: [
        ({}, 1e-10),
        (dict(encoder="vision", grad_accum_steps=3), 1e-10),
        (dict(config=TINY_RESNET), 1e-10),
        (dict(sparse_grad=False), 1e-10),
        (dict(method="adam"), 1e-10),
        (dict(dtype=torch.float32, precision="bf16"), 0.1),
    ],
    3: [
        (dict(grad_accum_steps=2, class_batch_size=2), 1e-10),
        (dict(method="lora", grad_accum_steps=2, class_batch_size=2), 1e-10),
    ],
    4: [(dict(encoder="text", class_batch_size=3), 1e-10)],
}


@pytest.mark.parametrize("world_size", CASES)
def test_processes_equal_one_process(world_size, tmp_path):
    def work(_):
        distributed.init_store()
        distributed.init_distributed("cpu")
        return [fit(**case) for case, _ in CASES[world_size]]

    results = run_in_processes(world_size, work, tmp_path)
    for (case, error), *by_rank in zip(CASES[world_size], *results, strict=True):
        expected = fit(**case)
        for results_of_rank in by_rank:
            for name, values in results_of_rank.items():
                assert torch.equal(values, by_rank[0][name]), (case, name)
                tolerance = max(error, 1e-6) if name == "losses" else error
                torch.testing.assert_close(values, expected[name], rtol=tolerance, atol=error)


@pytest.fixture(scope="module")
def flags(flags):
    """Arguments of a run of six iterations on batches of seven and two images."""
    extra = ["--shots", 3, "--batch_size", 7, "--early_stop_loss", -1]
    return [*flags[:-1], *extra, "--save_path"]


@pytest.fixture(scope="module")
def single(flags, tmp_path_factory):
    """The losses of the run in one process."""
    out = tmp_path_factory.mktemp("single")
    run(*flags, out)
    return read_losses(out)


def run_with_signal(to, signum, folder, argv):
    """Run main.py in two processes, of which one gets a signal after two iterations."""

    def prepare(rank):
        if rank == to:
            main.train = act_after(2, partial(os.kill, os.getpid(), signum))

    return run_main_in_processes(2, folder, *argv, prepare=prepare)


@pytest.mark.parametrize("to", [0, 1])
def test_signal_stops_all_ranks(to, flags, single, tmp_path):
    argv = [*flags, tmp_path / "out"]
    first, second = run_with_signal(to, signal.SIGTERM, tmp_path, argv)
    assert first[0] == second[0] == 143 and second[2] == ""
    assert "ended by SIGTERM; --resume continues from iteration 2" in first[2]
    assert "Resuming from iteration 2" in run(*argv, "--resume")  # in one process
    assert read_losses(tmp_path) == pytest.approx(single, rel=1e-3)


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # torch 2.4's own
def test_killed_rank_stops_all(flags, single, tmp_path):
    argv = [*flags, tmp_path / "out"]
    first, second = run_with_signal(1, signal.SIGKILL, tmp_path, argv)
    assert second == -signal.SIGKILL and first[0] == 2
    assert "ended by the loss of another process; --resume continues from" in first[2]
    first, *others = run_main_in_processes(3, tmp_path, *argv, "--resume")
    assert first[0] == 0 and "Resuming from iteration 2" in first[1]
    assert first[1].count("****") == 4 and others == [(0, "", "")] * 2
    assert read_losses(tmp_path) == pytest.approx(single, rel=1e-3)


@pytest.mark.parametrize(
    "extra, extra_of_rank_1, message",
    [
        ([], ["--lr", 7], "the processes differ in lr: "),
        ([], ["--lr", "x"], "argument --lr"),
        (["--lr", "x"], [], "argument --lr"),
        ([], None, "7.png cannot be read"),
    ],
)
def test_error_is_printed_once(extra, extra_of_rank_1, message, flags, tmp_path):
    argv = [*flags, tmp_path / "out", *extra]

    def prepare(rank):
        if rank == 1 and extra_of_rank_1 is None:
            main.build_dataset = Mock(side_effect=ValueError("7.png cannot be read"))
        return [*argv, *(extra_of_rank_1 or [])] if rank == 1 else argv

    ends = run_main_in_processes(2, tmp_path, prepare=prepare)
    assert {status for status, *_ in ends} == {2}, ends
    lines = [line for *_, err in ends for line in err.splitlines()]
    (line,) = [line for line in lines if not line.startswith("note: ")]
    assert re.search(message, line), ends
