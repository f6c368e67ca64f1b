"""Experiment files: the runs they list, what is chosen from them, their tables and figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiment
import pytest
from report_helpers import make_run, read_lines, read_table
from reporting import experiments
from reporting.experiments import REPORTS, read_experiment, write_experiment

from runs.output_dir import get_hparams

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder with the configurations and the folder of the Greek letters."""
    (tmp_path / "data/greek").mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    """Write an experiment file; return its path."""

    def write(text, report="grid"):
        path = tmp_path / "experiment.yaml"
        path.write_text(f"report: {report}\nsave_path: runs\nout: docs\n{text}")
        return path

    return write


def finish(plan, accuracy):
    """Write the files of a made-up result."""
    config = get_hparams(plan.config)
    keys = ("method", "dataset", "shots", "seed", "backbone")
    made = make_run(plan.folder / "made", **{key: config[key] for key in keys}, accuracy=accuracy)
    for path in made.iterdir():
        path.rename(plan.folder / path.name)
    path = plan.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))


def write_and_read(path, folder):
    """Write an experiment's report; return its text."""
    write_experiment(read_experiment(path, root=folder))
    assert (folder / "docs" / "figure.png").stat().st_size > 5000
    return (folder / "docs" / "table.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_experiment_files_list_runs(path, tmp_path, here):
    found = read_experiment(path, root=tmp_path)
    assert found.report in REPORTS
    assert len(found.runs) >= 9 and len({run.folder for run in found.runs}) == len(found.runs)
    assert f"python scripts/experiment.py configs/experiments/{path.name}" in path.read_text()
    assert {run.config.save_weights for run in found.runs} == {
        path.stem in ("digits_compare", "digits_moments", "digits_greek", "digits_greek_rates")
    }


def test_learning_rates_are_the_best(here):
    page = (ROOT / "docs/digits/README.md").read_text()
    places = {"lr": ("compare", "overfitting", "moments"), "greek_lr": ("greek",)}
    for table, names in places.items():
        means = read_lines(page.split(f"<!-- {table} -->")[1])
        for name in names:
            for run in read_experiment(Path(f"configs/experiments/digits_{name}.yaml")).runs:
                variant = experiments.method_and_ablation(run.config.method, vars(run.config))
                row = {lr: mean for lr, mean in means[variant].items() if lr and mean != "-"}
                assert row[f"{run.config.lr:g}"] == max(row.values())  # one of the best


def test_runs_are_product_of_values(write, capsys):
    text = "common: {filename: a b, seed: [1, 2]}\nruns: [{flip: [true, false]}, {t: 9}, {t: 9}]\n"
    assert experiment.main([str(write(text)), "--dry-run", "--lr", "1"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [  # blanks as sweep.sh reads them
        f"main.py --filename=a\\ b --seed={seed} {flag} --lr 1 --save_path runs"
        for seed in (1, 2)
        for flag in ("--flip", "--no-flip", "--t=9")
    ]


@pytest.mark.parametrize("text, words", [
    ("common: {}\n", "with the keys"), ("common: {}\nruns: [1]\n", "with the keys"),
    ("common: [\n", "is not YAML"), ("common: {no_flag: 1}\nruns: [{}]\n", "no_flag"),
    ("common: {}\nruns: [{}]\nreport: graph\n", "unknown report 'graph'"),
])  # fmt: skip
def test_bad_files_are_one_sentence(text, words, write, capsys):
    assert experiment.main([str(write(text)), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_reports_refuse_other_settings(write, tmp_path):
    path = write(
        "common: {config: configs/digits.yaml, t: [1, 5], shots: [1, 2], seed: 1}\nruns: [{}]\n"
    )
    found = read_experiment(path, root=tmp_path)
    with pytest.raises(ValueError, match="no run of this experiment is finished"):
        write_experiment(found)
    for run in found.runs:
        finish(run, 60.0)
    with pytest.raises(ValueError, match="runs of T = 1 and 0.01 differ in other settings"):
        write_experiment(found)
    found.runs[1].config.lr = 7
    with pytest.raises(ValueError, match="another run's .lr 0.* there, 7 here.; remove it"):
        write_experiment(found)
    path = found.runs[0].folder / "result.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"{path.parent}: .*; remove it, and run it again"):
        write_experiment(found)


def test_lr_sweep_names_best_mean(write, tmp_path):
    path = write(
        "common: {config: configs/digits.yaml, eval_split: val, seed: [1, 2]}\n"
        "runs: [{method: [so, adam], lr: [0.001, 0.01]}, {moments: none, lr: [0.01, 0.1]}]\n",
        "lr_sweep",
    )  # fmt: skip
    accuracies = {("so", 0.001): (50, 61), ("so", 0.01): (60, 50), ("so", 0.1): (70, 1)}
    accuracies |= {("adam", 0.001): (70, 70), ("adam", 0.01): (80, 60)}
    for run in read_experiment(path, root=tmp_path).runs:
        finish(run, accuracies[run.config.method, run.config.lr][run.config.seed - 1])
    text = write_and_read(path, tmp_path)
    assert {name: list(line.values())[1:] for name, line in read_lines(text).items()} == {
        "SO": ["55.5", "55.0", "-"], "Adam": ["70.0", "70.0", "-"],
        "SO, moments none": ["-", "55.0", "35.5"],
    }  # fmt: skip
    assert "Best: SO 0.001; Adam 0.001; SO, moments none 0.01." in text  # the lower of equals


def test_grid_shows_missing_cells(write, tmp_path):
    path = write(
        "common: {config: configs/digits.yaml, s: [0.9, 0.99], t: [5, 1000000], seed: [1, 2]}\n"
        "runs: [{}]\n"
    )
    for run in read_experiment(path, root=tmp_path).runs:
        if (run.config.s, run.config.t) != (0.99, 5):
            finish(run, 60 + (run.config.t > 5) + run.config.seed)
    assert read_table(write_and_read(path, tmp_path)) == [
        ["", "0.01", "0.1"], ["T = 5", "-", "61.5 ± 0.7"],
        ["never refreshed", "62.5 ± 0.7", "62.5 ± 0.7"],
    ]  # fmt: skip


PYTHON = """#!/usr/bin/env bash
if [ "$1" != main.py ]; then cat; exit; fi
touch {folder}/started
[ ! -e {folder}/wait ] || {{ trap 'exit 143' TERM; while :; do sleep 0.05; done; }}
"""


def test_experiment_stops_and_reports(write, tmp_path, monkeypatch, capfd):
    """With a script in the place of Python, and results made up: main.py has tests of its own."""
    python = tmp_path / "python"
    python.write_text(PYTHON.format(folder=tmp_path))
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    text = "common: {config: configs/digits.yaml, shots: 1, seed: [1, 2]}\n"
    path = write(text + "runs: [{method: [so, adam]}]\n", "comparison")
    (tmp_path / "wait").touch()
    command = [sys.executable, "scripts/experiment.py", str(path), "--root", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "continues from here" in err
    (tmp_path / "wait").unlink()
    assert experiment.main(command[2:]) == 2 and "no run" in capfd.readouterr().err
    for run in read_experiment(path, root=tmp_path).runs:
        finish(run, 60.0)
    assert experiment.main(command[2:]) == 0
    assert "60.00 ± 0.00 (2)" in (tmp_path / "docs" / "tables.md").read_text()
