"""Experiment files: the runs they list, what is chosen from them, their tables and figures."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiment
import pytest
from reporting import experiments, kinds
from reporting.experiments import best_rates, read_experiment

from runs.output_dir import get_hparams

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
BASE = "kind: {kind}\nsave_path: runs\nout: docs\n"


def write(folder, name, kind, text):
    path = folder / f"{name}.yaml"
    path.write_text(BASE.format(kind=kind) + text)
    return path


def finish(plan, accuracy):
    """The files of a made-up result."""
    plan.folder.mkdir(parents=True)
    (plan.folder / "curve.csv").write_text(
        f"iteration,loss,lr,test_accuracy\n1,0.5,0.1,{accuracy}\n"
    )
    keys = ("method", "backbone", "dataset", "shots", "seed")
    result = {key: getattr(plan.config, key) for key in keys} | {"config": get_hparams(plan.config)}
    result |= {"zero_shot_accuracy": 50.0, "final_accuracy": accuracy, "iterations": 1}
    result |= {"wall_seconds": 1.0, "peak_memory_mb": 100.0}
    (plan.folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_that_we_ship_list_runs_in_folders_of_their_own(path, tmp_path, monkeypatch):
    moments = ("so, moments none", "so, moments per_entry", "so, moment_support reset")
    rates = dict.fromkeys(("so", "lora", "adam", *moments), 1e-3)
    monkeypatch.setattr(experiments, "best_rates", lambda runs: rates)
    found = read_experiment(path, root=tmp_path)
    assert len(found.runs) >= 9 and len({run.folder for run in found.runs}) == len(found.runs)
    assert all(tmp_path in run.folder.parents for run in found.runs)
    assert f"python scripts/experiment.py configs/experiments/{path.name}" in path.read_text()
    assert {run.config.save_weights for run in found.runs} == {
        path.stem in ("digits_compare", "digits_moments")
    }


def test_runs_are_the_product_of_their_values(tmp_path):
    text = "common: {config: configs/digits.yaml, seed: [1, 2], shots: 4}\nsettings:\n"
    text += "  - {t: [5, 9]}\n  - {method: adam, lr: 1.0e-4}\n"
    found = read_experiment(write(tmp_path, "a", "compare", text), root=tmp_path)
    configs = [run.config for run in found.runs]
    assert found.out == tmp_path / "docs"
    assert sorted((c.method, c.t, c.seed) for c in configs) == [
        ("adam", 5, 1), ("adam", 5, 2), ("so", 5, 1), ("so", 5, 2), ("so", 9, 1), ("so", 9, 2),
    ]  # fmt: skip
    assert {config.lr for config in configs if config.method == "adam"} == {1e-4}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("common: {}\nsettings: [{}]\nmore: 1\n", "must have the keys"),
        ("common: {}\nsettings: []\n", "settings a list"),
        ("common: {shot: 1}\nsettings: [{}]\n", "no flag 'shot'"),
        ("common: {filename: a b}\nsettings: [{}]\n", "has spaces"),
        ("common: {}\nsettings: [{}, {}]\n", "lists 1 run twice"),
        ("common: [\n", "is not YAML"),
        ("common: {}\nsettings: [{}]\nkind: graph\n", "unknown kind 'graph'"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(text, complaint, tmp_path, capsys):
    path = write(tmp_path, "bad", "grid", text)
    assert experiment.main([str(path), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert complaint in err and str(path) in err and err.count("\n") == 1


def test_results_of_other_runs_and_means_over_more_than_the_kind_has_are_refused(tmp_path):
    text = "common: {config: configs/digits.yaml, t: [1, 5], seed: 1, shots: [1, 2]}\n"
    runs = read_experiment(
        write(tmp_path, "g", "grid", text + "settings: [{}]\n"), root=tmp_path
    ).runs
    with pytest.raises(ValueError, match="no run of this experiment is finished"):
        kinds.grid(runs, tmp_path)
    for run in runs:
        finish(run, 60.0)
    with pytest.raises(ValueError, match="no place for several shots"):
        kinds.grid(runs, tmp_path)
    path = runs[0].folder / "result.json"
    result = json.loads(path.read_text())
    result["config"]["lr"] = 7.0
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="another run's .lr 7.0 there"):
        kinds.grid(runs, tmp_path)


RATES = """common: {config: configs/digits.yaml, eval_split: val, seed: [1, 2]}
settings:
  - {method: so, lr: [0.001, 0.01]}
  - {method: adam, lr: [0.001, 0.01]}
"""


def test_the_chosen_rates_are_the_best_on_average_and_the_lower_of_equals(tmp_path, capsys):
    path = write(tmp_path, "rates", "rates", RATES)
    runs = read_experiment(path, root=tmp_path).runs
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
    second = read_experiment(write(tmp_path, "b", "compare", text), root=tmp_path)
    assert {run.config.lr for run in second.runs} == {0.001}


def test_a_grid_shows_means_and_what_is_missing(tmp_path, capsys):
    text = "common: {config: configs/digits.yaml, s: [0.9, 0.99], t: [1, 5], seed: [1, 2]}\n"
    path = write(tmp_path, "grid", "grid", text + "settings: [{}]\n")
    runs = read_experiment(path, root=tmp_path).runs
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
    runs = read_experiment(write(tmp_path, "a", "ablation", text), root=tmp_path).runs
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


def test_other_moments_have_rates_of_their_own_and_are_paired_with_so(tmp_path, capsys):
    text = "common: {config: configs/digits.yaml, shots: 2, seed: 9, lr: [0.001, 0.002]}\n"
    for name, settings in (("one", "[{}]"), ("two", "[{moments: [none, per_entry]}]")):
        rates = write(tmp_path, name, "rates", text + f"settings: {settings}\n")
        for run in read_experiment(rates, root=tmp_path).runs:
            best = {"adam": 0.002, "none": 0.001, "per_entry": 0.002}[run.config.moments]
            finish(run, 60.0 if run.config.lr == best else 50.0)
    text = "rates: [one.yaml, two.yaml]\n"
    text += "common: {config: configs/digits.yaml, shots: [1, 4], seed: [1, 2, 3]}\n"
    text += "settings: [{}, {moments: [none, per_entry]}]\n"
    path = write(tmp_path, "moments", "moments", text)
    runs = read_experiment(path, root=tmp_path).runs
    assert {(run.config.moments, run.config.lr) for run in runs} == {
        ("adam", 0.002), ("none", 0.001), ("per_entry", 0.002),
    }  # fmt: skip
    for run in runs:
        gain = {"adam": 0, "none": run.config.seed, "per_entry": -1}[run.config.moments]
        finish(run, 70 + run.config.shots + gain)
    kinds.moments(runs, tmp_path / "docs")
    lines = (tmp_path / "docs" / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert ["4", "74.0 ± 0.0", "76.0 ± 2.5", "73.0 ± 0.0"] in rows
    assert ["all", "+2.00 ± 2.48", "3 / 0 / 0", "-1.00 ± 0.00", "0 / 0 / 3"] in rows
    assert (tmp_path / "docs" / "figure.png").stat().st_size > 5000
    path.write_text(path.read_text().replace("[one.yaml, two.yaml]", "one.yaml"))
    with pytest.raises(ValueError, match="no learning rate was chosen for so, moments none"):
        read_experiment(path, root=tmp_path)


PYTHON = """#!/usr/bin/env bash
if [ "$1" != main.py ]; then cat; exit; fi
touch {folder}/started
[ ! -e {folder}/wait ] || {{ trap 'exit 143' TERM; while :; do sleep 0.05; done; }}
"""


def test_an_experiment_runs_stops_cleanly_and_reports(tmp_path, monkeypatch, capfd):
    """With a script in the place of Python, and results made up: main.py has tests of its own."""
    stand_in = tmp_path / "python"
    stand_in.write_text(PYTHON.format(folder=tmp_path))
    stand_in.chmod(0o755)
    for key, value in {"JOBS": "2", "LOGS": tmp_path / "logs", "PYTHON": stand_in}.items():
        monkeypatch.setenv(key, str(value))
    text = "common: {config: configs/digits.yaml, shots: 1, seed: [1, 2]}\n"
    text += "settings: [{method: so}, {method: adam}]\n"
    path = write(tmp_path, "real", "compare", text)
    (tmp_path / "wait").touch()
    command = [sys.executable, "scripts/experiment.py", str(path), "--root", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "continues from here" in err
    (tmp_path / "wait").unlink()
    assert experiment.main(command[2:]) == 2 and "no run" in capfd.readouterr().err
    for run in read_experiment(path, root=tmp_path).runs:
        finish(run, 60.0)
    assert experiment.main(command[2:]) == 0
    assert "60.00 ± 0.00 (2)" in (tmp_path / "docs" / "tables.md").read_text()
