"""Experiment files: the runs they list, what is chosen from them, their tables and figures."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiment
import pytest
from report import pairs
from reporting import kinds
from reporting.kinds import best_rates
from reporting.numbers import find_runs, studies

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
BASE = "kind: {kind}\nsave_path: runs\nout: docs\n"


def write(folder, name, kind, text):
    path = folder / f"{name}.yaml"
    path.write_text(BASE.format(kind=kind) + text)
    return path


def finish(plan, accuracy, seconds=1.0):
    """The files of a made-up result."""
    plan.folder.mkdir(parents=True)
    with open(plan.folder / "curve.csv", "w", newline="") as file:
        rows = [("iteration", "loss", "lr", "test_accuracy"), (1, 0.5, 0.1, accuracy)]
        csv.writer(file).writerows(rows)
    result = {key: getattr(plan.config, key) for key in ("method", "backbone", "dataset")}
    result |= {"shots": plan.config.shots, "seed": plan.config.seed, "iterations": 1}
    result |= {"zero_shot_accuracy": 50.0, "final_accuracy": accuracy, "wall_seconds": seconds}
    result |= {"peak_memory_mb": 100.0, "config": {}}
    (plan.folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_that_we_ship_can_be_read(path, tmp_path, monkeypatch):
    rates = dict.fromkeys(("so", "lora", "adam"), 1e-3)
    monkeypatch.setattr(experiment, "best_rates", lambda runs: rates)
    found = experiment.read_experiment(path, root=tmp_path)
    assert len(found.runs) >= 9
    assert all(tmp_path in run.folder.parents for run in found.runs)
    opening = path.read_text()
    assert f"python scripts/experiment.py configs/experiments/{path.name}" in opening


def test_runs_are_the_product_of_their_values_in_folders_that_tell_them_apart(tmp_path):
    text = "common: {config: configs/digits.yaml, seed: [1, 2], shots: 4}\nsettings:\n"
    text += "  - {t: [5, 9]}\n  - {method: adam, lr: 1.0e-4}\n"
    found = experiment.read_experiment(write(tmp_path, "a", "compare", text), root=tmp_path)
    folders = [str(run.folder.relative_to(tmp_path / "runs")) for run in found.runs]
    tail = "ViT-Tiny-8/digits/4shots"
    assert sorted(folders) == sorted(
        [f"t{t}/so/{tail}/seed{seed}" for t in (5, 9) for seed in (1, 2)]
        + [f"adam/{tail}/seed{seed}" for seed in (1, 2)]
    )
    assert found.out == tmp_path / "docs"
    assert {run.config.lr for run in found.runs if run.config.method == "adam"} == {1e-4}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("common: {}\nsettings: [{}]\nmore: 1\n", "must have the keys"),
        ("common: {}\nsettings: []\n", "settings a list"),
        ("common: {shot: 1}\nsettings: [{}]\n", "'shot' is no flag"),
        ("common: {filename: a b}\nsettings: [{}]\n", "has spaces"),
        ("common: {}\nsettings: [{}, {}]\n", "lists 1 run twice"),
        ("common: [\n", "is not YAML"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(text, complaint, tmp_path, capsys):
    path = write(tmp_path, "bad", "grid", text)
    assert experiment.main([str(path), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert complaint in err and str(path) in err and err.count("\n") == 1
    path.write_text(path.read_text().replace("grid", "graph"))
    assert experiment.main([str(path), "--dry-run"]) == 2


RATES = """common: {config: configs/digits.yaml, eval_split: val, seed: [1, 2]}
settings:
  - {method: so, lr: [0.001, 0.01]}
  - {method: adam, lr: [0.001, 0.01]}
"""


def test_the_chosen_rates_are_the_best_on_average_and_the_lower_of_equals(tmp_path, capsys):
    path = write(tmp_path, "rates", "rates", RATES)
    runs = experiment.read_experiment(path, root=tmp_path).runs
    accuracy = {("so", 0.001): (50, 61), ("so", 0.01): (60, 50)}
    accuracy |= {("adam", 0.001): (70, 70), ("adam", 0.01): (80, 60)}
    for run in runs[:-1]:
        finish(run, accuracy[run.config.method, run.config.lr][run.config.seed - 1])
    with pytest.raises(ValueError, match="1 run of the learning rates"):
        best_rates(runs)
    finish(runs[-1], accuracy[runs[-1].config.method, runs[-1].config.lr][runs[-1].config.seed - 1])
    assert best_rates(runs) == {"so": 0.001, "adam": 0.001}
    kinds.rates(runs, tmp_path / "docs")
    table = (tmp_path / "docs" / "table.md").read_text()
    assert "0.001: 55.5 (chosen)" in table and "0.01: 55.0" in table
    assert (tmp_path / "docs" / "figure.png").stat().st_size > 5000

    text = "rates: rates.yaml\ncommon: {config: configs/digits.yaml, method: [so, adam]}\n"
    text += "settings: [{}]\n"
    second = experiment.read_experiment(write(tmp_path, "b", "compare", text), root=tmp_path)
    assert {run.config.lr for run in second.runs} == {0.001}


def test_a_grid_shows_means_and_what_is_missing(tmp_path, capsys):
    text = "common: {config: configs/digits.yaml, s: [0.9, 0.99], t: [1, 5], seed: [1, 2]}\n"
    path = write(tmp_path, "grid", "grid", text + "settings: [{}]\n")
    runs = experiment.read_experiment(path, root=tmp_path).runs
    for run in runs:
        if (run.config.s, run.config.t) != (0.99, 5):
            finish(run, 60 + run.config.t + run.config.seed)
    kinds.grid(runs, tmp_path / "docs")
    table = (tmp_path / "docs" / "table.md").read_text()
    assert "| 0.1     | 62.5 ± 0.7 | 66.5 ± 0.7 |" in table
    assert "| 0.01    | 62.5 ± 0.7 |          - |" in table
    assert (tmp_path / "docs" / "figure.png").stat().st_size > 5000


def test_an_ablation_is_paired_with_so_by_seed(tmp_path, capsys):
    text = "common: {config: configs/digits.yaml, shots: 4, seed: [1, 2]}\nsettings:\n"
    text += "  - {grad_support: [random, magnitude], moment_support: [magnitude, fixed], t: 5}\n"
    text += "  - {t: 1000000}\n"
    runs = experiment.read_experiment(write(tmp_path, "a", "ablation", text), root=tmp_path).runs
    for run in runs:
        loss = {"random": 0, "magnitude": 3}[run.config.grad_support] + (run.config.t > 5)
        finish(run, 70 + 10 * run.config.seed - loss)
    kinds.ablation(runs, tmp_path / "docs")
    lines = (tmp_path / "docs" / "table.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line][2:]
    assert table[0] == ["random", "largest m", "yes", "85.0 ± 7.1", "-", "2"]  # SO itself
    assert len(table) == 5
    assert ["largest g", "first S_g", "yes", "82.0 ± 7.1", "-3.0 ± 0.0", "2"] in table
    assert ["random", "the same entries", "no", "84.0 ± 7.1", "-1.0 ± 0.0", "2"] in table
    assert (tmp_path / "docs" / "figure.png").stat().st_size > 5000


def test_pairs_are_of_the_same_seeds(tmp_path):
    text = "common: {config: configs/digits.yaml, shots: [1, 4], seed: [1, 2, 3]}\n"
    text += "settings: [{method: so}, {method: lora, lr: 0.1}]\n"
    runs = experiment.read_experiment(write(tmp_path, "p", "compare", text), root=tmp_path).runs
    for run in runs:
        if (run.config.method, run.config.seed) != ("lora", 3):
            gain = run.config.seed * (run.config.method == "so") * (run.config.shots - 2)
            finish(run, 60 + gain)
    (study,) = studies(find_runs([tmp_path / "runs"], pytest.fail))
    one, four = (pairs(study, "so", "lora", [shots]) for shots in (1, 4))
    assert (one.mean, one.better, one.worse, one.p) == (-1.5, 0, 2, 0.5)
    assert (four.mean, four.better, four.worse) == (3.0, 2, 0)
    assert four.half == pytest.approx(12.706 * 1.0, rel=1e-3)  # t of one degree, s / sqrt(2) = 1
    both = pairs(study, "so", "lora", [1, 4])
    assert (both.mean, both.better, both.equal, both.worse, both.p) == (0.75, 2, 0, 2, 1.0)
    assert pairs(study, "so", "adam", [1]) is None


def test_an_experiment_runs_goes_on_and_stops_cleanly(tmp_path):
    text = "common: {config: configs/digits.yaml, shots: 1, seed: [1, 2], n_iters: %d,\n"
    text += "  early_stop_loss: 0}\n"
    text += "settings: [{method: so}, {method: adam}]\n"
    path = write(tmp_path, "real", "compare", text % 100000)
    command = [sys.executable, "scripts/experiment.py", str(path), "--root", str(tmp_path)]
    options = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    environment = os.environ | {"JOBS": "2", "LOGS": str(tmp_path / "logs")}
    process = subprocess.Popen(command, env=environment, **options)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("config.yaml")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in err
    path.write_text(path.read_text().replace("100000", "2"))
    done = subprocess.run([*command, "--overwrite"], env=environment, **options)
    assert done.returncode == 0 and "4 runs, 0 of them finished" in done.stderr
    assert (tmp_path / "docs" / "tables.md").is_file()
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0 and "4 runs, 4 of them finished" in done.stderr
