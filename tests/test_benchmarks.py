"""The benchmarks run on tiny sizes; their baselines compute what they are said to compute."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, communication, iteration, plain, step, workers
from benchmarks import settings as settings_of_so
from benchmarks.floor import floor_flops
from clip import CLIP, build_model
from optimizers.build import mark_as_trainable

FOLDER = Path(common.__file__).parent
CLOSE = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a benchmark; returns its standard output, and what it wrote."""

    def command(benchmark, *flags):
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["", *flags, f"--json={path}"])
        benchmark.main()
        return capsys.readouterr().out, json.loads(path.read_text())

    return command


def settings(**changes):
    """The arguments of iteration.py that make a row."""
    usual = dict(backbone="tiny", encoder="both", position="all", classes=3, batch=2)
    return argparse.Namespace(**usual | dict(density=1e-3, class_batch_size=0) | changes)


def prepared(name, **changes):
    return iteration.prepare(name, settings(**changes), torch.device("cpu"))


# What the authors compute


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["ViT", "ResNet"])
def test_plain_features_are_the_models(config):
    model = build_model(random_state_dict({**config, "context_length": 77})).double()
    side = config["image_resolution"]
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    tokens = common.random_tokens(9, config["vocab_size"])
    assert len(tokens.argmax(dim=-1).unique()) > 2  # texts of different lengths
    torch.testing.assert_close(
        plain.encode_image(model, images), model.encode_image(images), **CLOSE
    )
    texts = plain.encode_text(model, tokens)
    torch.testing.assert_close(texts, model.encode_text(tokens), **CLOSE)
    torch.testing.assert_close(texts, model.encode_text(common.cut(tokens)[0]), **CLOSE)


def test_plain_so_of_density_one_is_adam():
    a = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    b = nn.Parameter(a.detach().clone())
    so, adam = plain.PlainSO([a], density=1, lr=0.1), torch.optim.Adam([b], lr=0.1)
    for _ in range(12):
        a.grad = b.grad = torch.randn_like(a)
        so.step()
        adam.step()
    torch.testing.assert_close(a, b)


# Rows of an iteration


@pytest.mark.parametrize("name", ["plain:fp32", "lora:fp32", "adam:fp32", "so:fp32", "so:bf16"])
def test_rows_train_and_mark_their_parts(name):
    row = prepared(name)
    before = {key: value.clone() for key, value in row["model"].state_dict().items()}
    seconds = iteration.timed(row["iterate"], torch.device("cpu"))
    assert list(seconds) == ["all", *iteration.PARTS]
    assert 0 < sum(seconds[part] for part in iteration.PARTS) <= seconds["all"]
    after = row["model"].state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and all("resblocks" in key for key in changed)
    assert all(("lora" in key) == (name == "lora:fp32") for key in changed)


@pytest.mark.parametrize("position", ["all", "bottom", "top"])
@pytest.mark.parametrize("tower", ["ViT both", "ViT text", "ViT vision", "ResNet text"])
def test_the_floor_counts_the_products_that_so_computes(tower, position, monkeypatch):
    kind, encoder = tower.split()
    config = {"ViT": TINY_VIT, "ResNet": TINY_RESNET}[kind]
    monkeypatch.setitem(common.BACKBONES, "tiny", {**config, "context_length": 77})
    row = prepared("so:fp32", encoder=encoder, position=position)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        row["iterate"](lambda part: None)
    assert counter.get_total_flops() == floor_flops(row["model"], 2, row["prompts"])


def test_launches_are_counted_between_waits():
    launch, wait = "cudaLaunchKernel", "cudaStreamSynchronize"
    names = [launch, wait, launch, "aten::add", "cuLaunchKernelEx", launch, "cudaMemcpy", launch]
    assert iteration.launches(names) == (5, 3)
    assert iteration.launches([]) == (0, 0)


def test_draws_are_shared_out_over_their_window():
    steps = range(2, 12)
    assert common.per_step([9.0 if step % 5 == 1 else 1.0 for step in steps], steps) == 13 / 5
    assert common.per_step([1.0, 2.0, 4.0], [2, 3, 4]) == 2


# Scripts


def check_rows(text, rows):
    """Each row is a line of the table, and has positive figures."""
    for row in rows:
        assert f"| {row['row']} |" in text
        assert row["peak_mb"] > 0
    assert all(value > 0 for row in rows for value in row.get("seconds", {}).values())


def test_iteration_prints_and_writes(run):
    text, result = run(
        iteration, "--threads=1", "--backbone=tiny", "--classes=3", "--batch=2",
        "--repeats=1", "--device=cpu", "--rows", "plain", "so", "floor",
    )  # fmt: skip
    *rows, floor = result["rows"]
    assert [row["method"] for row in rows] == ["plain", "so"]
    check_rows(text, rows)
    assert all(row["ms"] > 0 for row in (*rows, floor))
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in rows)
    assert rows[1]["speedup"] > 0 and rows[1]["floor_ratio"] > 0
    assert result["machine"]["threads"] == 1 and result["settings"]["classes"] == 3


def test_a_row_that_ends_early_leaves_the_others(monkeypatch, capsys):
    start = workers.Worker.__init__
    answers = {"plain": 'echo \'{"error": "out of memory"}\'', "so": "exit 3"}  # to any question

    def start_false(worker, command):
        start(worker, ["sh", "-c", "read question; " + answers[command[-1].partition(":")[0]]])

    monkeypatch.setattr(workers.Worker, "__init__", start_false)
    monkeypatch.setattr(sys, "argv", ["", "--rows", "plain", "so:bf16", "--device=cpu"])
    iteration.main()
    lines = capsys.readouterr().out.splitlines()
    assert "out of memory" in lines[-2] and "ended with status 3" in lines[-1]


def test_step_prints_and_writes(run, monkeypatch):
    monkeypatch.setattr(step, "WIDTHS", {"vision": 16})
    text, rows = run(step, "--density=0.01", "--windows=1", "--threads=1", "--device=cpu")
    assert all(f"| {row['optimizer']} |" in text and row["ms"] > 0 for row in rows)


def test_exchange_counts_the_bytes_exchanged_and_computes_the_time_of_others(run):
    text, result = run(
        communication, "--backbone=tiny", "--density=1e-3", "--classes=5", "--processes=2",
        "--repeats=1", "--within", "5", "300",
    )  # fmt: skip
    matrices = mark_as_trainable(CLIP(**common.BACKBONES["tiny"]), "both", "all").values()
    layers, width = [128] * 4 + [64] * 2, 64
    numbers = {
        "SO": sum(int(p.numel() * 1e-3) for p in matrices) + 1,
        "LoRA, rank 2": sum(3 * 2 * 2 * w for w in layers) + 1,
        "all matrices": sum(p.numel() for p in matrices),
        "features, 5 classes": 2 * 5 * width,
        "control number": 2,  # of 4 bytes
    }
    assert {row["exchange"]: row["bytes"] / 4 for row in result["rows"]} == numbers
    assert all(f"| {row['exchange']} | {len(row['sizes'])} |" in text for row in result["rows"])
    ring, tree = result["computed"][:2]
    parts = text.split("Computed, not measured")
    assert "| 2 | SO |" in parts[0] and "| 8 | ring |" in parts[1]
    assert ring["SO"] == pytest.approx(14 * 5e-3 + 14 / 8 * 4 * numbers["SO"] / 300e6)
    assert tree["features, 5 classes"] == pytest.approx(2 * 6 * 5e-3 + 2 * 2560 / 300e6)


def test_settings_prints_and_writes(run):
    text, result = run(settings_of_so, "--steps", "2", "--seeds", "1", "2", "--adam_steps=2")
    rows = result["rows"]
    assert len(rows) == 2 * (1 + len(settings_of_so.DENSITIES) * len(settings_of_so.LRS))
    assert all(0 <= value <= 100 for row in rows for value in row["accuracies"])
    assert all(row["reach"] == row["reads"] * row["lr"] for row in rows)
    assert text.count("| Adam |") == 2 and "* shifted, reach:" in text


def test_rank_correlation_of_repeated_values():
    assert settings_of_so.rank_correlation([1, 1, 2, 3], [5, 5, 7, 9]) == pytest.approx(1)
    assert settings_of_so.rank_correlation([1, 2, 3], [9, 7, 5]) == pytest.approx(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain:fp32", "so:fp32", "so:fp16"])
def test_rows_mark_their_parts_on_a_gpu(name):
    row = iteration.prepare(name, settings(), torch.device("cuda"))
    seconds = iteration.timed(row["iterate"], torch.device("cuda"))
    assert list(seconds) == ["all", *iteration.PARTS]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.gpu
def test_kernels_are_counted_on_a_gpu(monkeypatch):
    monkeypatch.setattr(iteration, "PROFILED", 2)
    row = iteration.prepare("so:fp32", settings(), torch.device("cuda"))
    kernels = iteration.count_kernels(row, torch.device("cuda"))
    assert 0 < kernels["longest_run"] <= kernels["kernels"]
