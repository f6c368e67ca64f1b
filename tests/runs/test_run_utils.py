"""Flags and configuration files: the values they give, and the errors."""

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from commands import refused

from run_utils import DEMO_CONFIG, get_arguments
from runs.cli import run_cli

ROOT = Path(__file__).parents[2]


def test_defaults_are_the_papers():
    expected = dict(
        seed=3, shots=1, backbone="ViT-B/16", lr=2e-4, n_iters=2000, early_stop_loss=0.01,
        batch_size=32, s=0.99995, t=5, save_path="results", filename="weights", eval_only=False,
        precision="fp32", logit_scale=100.0, crop_scale=[0.08, 1.0], flip=True,
        encoder="both", position="all", config=None, save_weights=False,
    )  # fmt: skip
    assert expected.items() <= vars(get_arguments(["--dataset", "eurosat"])).items()


def test_flags_win_over_file(tmp_path):
    path = tmp_path / "my settings.yaml"
    path.write_text(
        "dataset: eurosat\nlr: 1e-4\nshots: 4\nflip: false\ncrop_scale: [0.5, 1]\nthreads: null\n"
        "logit_scale: checkpoint\ntemplate: ['a {}.', 'my {}']\n"
    )
    expected = dict(
        dataset="eurosat", lr=1e-4, shots=8, t=7, flip=False, crop_scale=[0.5, 1.0], threads=None,
        logit_scale="checkpoint", template=["a {}.", "my {}"], batch_size=32,
    )  # fmt: skip
    args = get_arguments(["--config", str(path), "--shots", "8", "--t", "7"])
    assert expected.items() <= vars(args).items()


def test_shipped_configs_are_valid():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.read_text().startswith("#")
        args = get_arguments(["--config", str(path), "--dataset", "eurosat"])
        assert yaml.safe_load(path.read_text()).keys() <= vars(args).keys()


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--root x --data eurosat", {"root_path": "x", "dataset": "eurosat"}),
        ("--s 0.9 --sh 4", {"s": 0.9, "shots": 4}),
        ("--sparsity 0.9 --early_stop_loss -1", {"s": 0.9, "early_stop_loss": -1.0}),
        ("--save_path w", {"save_weights": True}),
        ("--save_path w --no-save_weights", {"save_weights": False}),
        ("--shots 4 --method lora", {"dataset": "digits", "n_iters": 50, "shots": 4}),
        ("--config configs/so_paper.yaml", {"dataset": "dtd", "n_iters": 2000}),
        ("--root_path .", {"dataset": "dtd", "n_iters": 2000, "logit_scale": 100.0}),
        ("--backbone ViT-Tiny/8", {"dataset": "dtd"}),
        ("--dataset digits --n_iters 0", {"n_iters": 0, "logit_scale": 100.0}),
    ],
)
def test_flags_give_these_values(argv, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert expected.items() <= vars(get_arguments(argv.split())).items()


def test_demo_has_rates_of_study():
    page = (ROOT / "docs/digits/README.md").read_text()
    (line,) = re.findall(r"^Best: (SO \S+; LoRA \S+; Adam \S+);", page, re.MULTILINE)
    for method, lr in (choice.split() for choice in line.split("; ")):
        argv = ["--method", method.lower()]
        assert get_arguments(argv).lr == float(lr)
        assert get_arguments(["--config", DEMO_CONFIG, *argv]).lr == float(lr)
        assert get_arguments([*argv, "--lr", "0.3"]).lr == 0.3
        assert get_arguments([*argv, "--dataset", "dtd"]).lr == 2e-4


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--dataset eurosta", ["eurosta", "did you mean 'eurosat'", "oxford_pets"]),
        ("--backbone ViT-B16", ["ViT-B16", "ViT-B/16"]),
        ("--position botom", ["botom", "half-up"]),
        ("--s 1", ["--s", "0 <= x < 1"]),
        ("--lr nan", ["--lr", "0 < x", "nan"]),
        ("--crop_scale 0.9 0.1", ["--crop_scale", "MIN is above MAX"]),
        ("--datset x", ["unrecognized arguments: --datset"]),
        ("--final_model best_val", ["--final_model", "--eval_every"]),
        ("--method adam --moments none", ["--moments", "--method so"]),
        ("--device meta --n_iters 0", ["--device meta cannot be used", "--device c"]),
    ],
)
def test_bad_flags_are_named(argv, words):
    message = refused(*argv.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, words",
    [
        ("dataste: eurosat", ["dataste", "dataset", "n_iters"]),
        ("shots: many", ["shots", "whole number", "many"]),
        ("flip: 3", ["flip", "true or false"]),
        ("lr: {a: 1}", ["lr", "must be a number"]),
        ("template: []", ["template", "expected at least one argument"]),
        ("[" * 1000, ["as YAML"]),
        ("!!python/object/apply:os.system ['touch executed']", ["as YAML"]),
    ],
    ids=range(7),
)
def test_bad_config_is_named(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    message = refused("--config", "mine.yaml", "--dataset", "eurosat")
    assert "mine.yaml" in message and all(word in message for word in words), message
    assert not (tmp_path / "executed").exists()


def test_run_cli_explains_memory_errors(capsys):
    cpu_error = RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")
    for error in (MemoryError(), cpu_error):
        assert run_cli(Mock(side_effect=error)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "memory" in line and "--batch_size" in line
    with pytest.raises(RuntimeError):  # a bug keeps its traceback
        run_cli(Mock(side_effect=RuntimeError("a bug")))
