"""The benchmarks run on tiny sizes; their baselines compute what they claim to compute."""

import argparse
import sys

import pytest
import torch
from report_helpers import read_table
from torch import nn

from benchmarks import crossover, iteration, plain, step
from benchmarks import settings as settings_of_so


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark; returns the rows of its table by heading."""

    def command(benchmark, *flags):
        monkeypatch.setattr(sys, "argv", ["", *flags])
        benchmark.main()
        header, *rows = read_table(capsys.readouterr().out)
        return [dict(zip(header, row, strict=True)) for row in rows]

    return command


def test_plain_so_equals_adam():
    a = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    b = nn.Parameter(a.detach().clone())
    so, adam = plain.PlainSO([a], density=1, lr=0.1), torch.optim.Adam([b], lr=0.1)
    for _ in range(12):
        a.grad = b.grad = torch.randn_like(a)
        so.step()
        adam.step()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "short", "sampled", "lora", "adam", "so", "so:bf16"])
def test_iteration_rows_train(name):
    args = argparse.Namespace(
        backbone="tiny", classes=3, batch=2, density=1e-3, class_batch_size=0, width=None
    )
    model, iterate = iteration.prepare(name, args, torch.device("cpu"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    iterate()
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and all("resblocks" in key for key in changed)
    assert all(("lora" in key) == (name == "lora") for key in changed)


def test_iteration_prints_ratios(run):
    size = ["--backbone=tiny", "--classes=3", "--batch=2", "--turns=1"]
    rows = run(iteration, "--threads=1", "--device=cpu", *size, "--rows", "plain", "so:bf16")
    assert [row[""] for row in rows] == ["SO, as the authors compute it", "SO, bf16"]
    assert rows[0]["times as fast"] == rows[0]["of the first"] == "1.00"


def test_step_prints_ratios(run, monkeypatch):
    monkeypatch.setitem(step.MODELS, "ViT-B/16", step.block(16))
    rows = run(step, "--density=0.01", "--windows=1", "--device=cpu")
    assert [row["optimizer"] for row in rows] == [*step.ADAMS, *step.SOS]
    assert rows[0]["of foreach's"] == "1.000" and rows[1]["of fused's"] == "1.00"


def test_crossover_times_both_ways():
    assert crossover.time_ratio(torch.randn(5, 30), torch.randn(5, 40), 0.01) > 0


def test_settings_prints_both_tasks(run, monkeypatch):
    monkeypatch.setattr(settings_of_so, "ADAM_STEPS", 2)
    rows = run(settings_of_so, "--steps", "2", "--seeds", "1", "2")
    assert [float(row["density"]) for row in rows] == list(settings_of_so.DENSITIES)
    for pair in (rows[0]["lr 0.01"], rows[-1]["Adam, 0.001"]):
        assert all(0 < float(value) < 100 for value in pair.split(", "))
