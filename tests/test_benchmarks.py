"""The benchmarks run on tiny sizes; their baselines compute what they claim to compute."""

import argparse
import json
import sys

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from torch import nn

from benchmarks import common, communication, crossover, iteration, plain, step
from benchmarks import delta as delta_sizes
from benchmarks import settings as settings_of_so
from clip import CLIP, build_model
from optimizers.build import mark_as_trainable

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


def prepare(name, device="cpu", **changes):
    usual = dict(backbone="tiny", encoder="both", position="all", classes=3, batch=2)
    args = argparse.Namespace(**usual | dict(density=1e-3, class_batch_size=0) | changes)
    return iteration.prepare(name, args, torch.device(device))


# What the authors compute


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["ViT", "ResNet"])
def test_plain_features_equal_model(config):
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
    torch.testing.assert_close(texts, model.encode_text(common.trim_padding(tokens)[0]), **CLOSE)


def test_plain_so_equals_adam():
    a = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    b = nn.Parameter(a.detach().clone())
    so, adam = plain.PlainSO([a], density=1, lr=0.1), torch.optim.Adam([b], lr=0.1)
    for _ in range(12):
        a.grad = b.grad = torch.randn_like(a)
        so.step()
        adam.step()
    torch.testing.assert_close(a, b)


# Rows of an iteration


@pytest.mark.parametrize("name", ["plain", "lora", "adam", "so", "so:bf16"])
def test_rows_train_and_mark(name):
    row = prepare(name)
    before = {key: value.clone() for key, value in row.model.state_dict().items()}
    seconds = iteration.timed(row, torch.device("cpu"))
    assert list(seconds) == ["all", *iteration.PARTS]
    assert 0 < sum(seconds[part] for part in iteration.PARTS) <= seconds["all"]
    after = row.model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and all("resblocks" in key for key in changed)
    assert all(("lora" in key) == (name == "lora") for key in changed)


def test_count_flops_of_products():
    row = prepare("so", encoder="vision")
    texts, images, width, tokens = 3, 2, 128, 17
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # in_proj, attention, out_proj, MLP
    last = (2 * tokens + 10) * width**2 + 2 * tokens * width  # q, out_proj, MLP: of one token
    forward = 2 * images * (3 * block + last)
    patches = 2 * images * 16 * 3 * 8**2 * width
    head = 2 * images * 64 * (width + texts)
    # Backward: gradients of inputs only, since those of weights are sparse, and none of what enters
    # the first in_proj or the patches; attention has two gradients a product.
    attention = 2 * images * (3 * 2 * tokens**2 + 2 * tokens) * width
    backward = forward + attention - 2 * images * 3 * tokens * width**2
    assert iteration.count_flops(row) == forward + patches + backward + 2 * head


def test_amortized_step_time():
    steps = range(2, 12)
    times = [9.0 if step % 5 == 1 else 1.0 for step in steps]
    assert common.amortized_step_time(times, steps) == 13 / 5
    assert common.amortized_step_time([1.0, 2.0, 4.0], [2, 3, 4]) == 2


# Scripts


def test_iteration_prints_and_writes(run):
    text, result = run(
        iteration, "--threads=1", "--backbone=tiny", "--classes=3", "--batch=2",
        "--repeats=1", "--device=cpu", "--rows", "plain", "so", "roofline",
    )  # fmt: skip
    plain, so, roofline = result["rows"]
    assert [row["name"] for row in (plain, so, roofline)] == ["plain", "so", "roofline"]
    assert all(f"| {row['row']} |" in text and row["ms"] > 0 for row in result["rows"])
    assert all(row["peak_mb"] > 0 for row in (plain, so))
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in (plain, so))
    assert so["speedup"] > 0 and so["roofline_ratio"] > 0
    assert result["machine"]["threads"] == 1 and result["settings"]["classes"] == 3


def test_failed_row_leaves_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--backbone=tiny", "--repeats=1", "--rows", "so", "adam"])
    ask = iteration.Worker.ask
    answer = lambda worker, question: ask(worker, question) if worker.name == "so" else None  # noqa: E731
    monkeypatch.setattr(iteration.Worker, "ask", answer)
    iteration.main()
    assert "| Adam | failed |" in capsys.readouterr().out


def test_step_prints_and_writes(run, monkeypatch):
    monkeypatch.setitem(step.MODELS, "ViT-B/16", step.block(16))
    flags = "--density=0.01", "--windows=1", "--rounds=1", "--device=cpu"
    text, result = run(step, *flags)
    rows = result["rows"]
    assert [row["optimizer"] for row in rows] == [*step.ADAM_ROWS, *step.SO_ROWS]
    assert all(f"| {row['optimizer']} |" in text and row["ms"] > 0 for row in rows)
    assert rows[0]["of_foreach"] == rows[1]["of_fused"] == 1


def test_communication_counts_bytes(run):
    text, result = run(
        communication, "--backbone=tiny", "--density=1e-3", "--classes=5", "--processes=2",
        "--repeats=1",
    )  # fmt: skip
    weights = mark_as_trainable(CLIP(**common.BACKBONES["tiny"]), "both", "all").values()
    layers, width = [128] * 4 + [64] * 2, 64
    numbers = {
        "SO": sum(int(p.numel() * 1e-3) for p in weights) + 1,
        "LoRA, rank 2": sum(3 * 2 * 2 * w for w in layers) + 1,
        "all weights": sum(p.numel() for p in weights),
        "features, 5 classes": 2 * 5 * width,
    }
    assert {row["exchange"]: row["bytes"] / 4 for row in result["rows"]} == numbers
    assert all(f"| {row['exchange']} | {len(row['sizes'])} |" in text for row in result["rows"])


def test_crossover_times_both_ways():
    times = crossover.milliseconds(torch.randn(5, 30), torch.randn(5, 40), 0.01, repeats=1)
    assert len(times) == 2 and all(0 < ms < float("inf") for ms in times)


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
@pytest.mark.parametrize("name", ["plain", "so", "so:fp16"])
def test_rows_mark_on_gpu(name):
    seconds = iteration.timed(prepare(name, "cuda"), torch.device("cuda"))
    assert list(seconds) == ["all", *iteration.PARTS]
    assert all(value > 0 for value in seconds.values())


def test_delta_compares_file_sizes(run):
    flags = ["--backbone=tiny", "--steps", "10", "4", "--density=1e-3", "--threads=1"]
    first, second, _, whole, full, half = run(delta_sizes, *flags)[1]["rows"]
    assert first["entries"] < second["entries"] < 2 * first["entries"] + 1
    assert second["bytes"] < whole["bytes"] < full["bytes"] and half["bytes"] < full["bytes"]
