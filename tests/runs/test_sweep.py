"""Sweeps: finished runs are skipped, failures are listed, a stop waits for checkpoints."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import list_pending
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import call, calls, wait_for
from dataset_helpers import make_dataset

from runs.cli import run_cli

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def start(*flags, script="sweep.sh", **variables):
    defaults = {"PYTHON": sys.executable, "SHOTS": 1, "SEEDS": 1, "METHODS": "so"}
    return subprocess.Popen(
        ["bash", SCRIPTS / script, *map(str, flags)], text=True, start_new_session=True,
        env=os.environ | {key: str(value) for key, value in (defaults | variables).items()},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell cannot trap what was ignored as it started, as where the tests run behind a `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def sweep(*flags, **variables):
    process = start(*flags, **variables)
    out, err = process.communicate()
    return process.returncode, out, err


def test_sweep_continues_after_failures(tmp_path):
    data, out = tmp_path / 'it\'s "the" data $HOME;', tmp_path / "sonuçlar 数据"
    make_dataset("eurosat", data)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), data / "tiny.pt")
    variables = {"DATA": data, "JOBS": 2, "LOGS": tmp_path / "logs"}
    flags = ["--backbone", data / "tiny.pt", "--n_iters", 2, "--s", 0.9, "--num_workers", 0]
    flags += ["--threads", 1, "--save_path", out]
    status, text, err = sweep(*flags, DATASETS="dtd eurosat", **variables)
    assert status == 1 and "2 runs, 0 of them finished" in err
    assert "1 of 2 runs failed:" in err and "--method so --dataset dtd --shots 1 --seed 1" in err
    assert "DATASETS.md" in text  # why it failed
    (result,) = out.rglob("result.json")
    assert result.parent == out / "so/tiny/eurosat/1shots/seed1-n_iters_2-s_0.9"
    assert not list(out.rglob("*.safetensors"))
    assert len(list((tmp_path / "logs").glob("*.txt"))) == 2
    (result.parent / "checkpoint.pt").write_bytes(b"left by a run killed at its very end")
    again = sweep(*flags, DATASETS="eurosat", **variables)
    assert again == (0, "", "1 run, 1 of them finished\n")
    assert not (result.parent / "checkpoint.pt").exists()


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGINT to all", "SIGTERM to all"])
def test_stop_waits_for_checkpoints(sent, tmp_path, fake_python):
    process = start(PYTHON=fake_python, DATASETS="digits", METHODS="wait so")
    wait_for("started", tmp_path, process)
    (os.killpg if "all" in sent else os.kill)(process.pid, signal.Signals[sent.split()[0]])
    _, err = process.communicate()
    assert process.returncode == 130 and "continues from here" in err
    assert (tmp_path / "checkpoint.pt").read_text() == "written\n"
    assert len(calls(tmp_path)) == 1


def test_killed_run_is_listed(tmp_path, fake_python):
    status, _, err = sweep(PYTHON=fake_python, DATASETS="digits", METHODS="fail so", SEEDS="1 2")
    assert status == 1 and "2 of 4 runs failed" in err and err.count("--method fail") == 2
    assert len(calls(tmp_path)) == 4


def test_arguments_override_defaults(tmp_path, fake_python):
    variables = {"METHODS": "lora so", "CONFIG_lora": "mine.yaml", "PYTHON": fake_python}
    sweep("--save_weights", DATASETS="digits", **variables)
    lora, so = calls(tmp_path)
    assert "--config mine.yaml" in lora and "--config" not in so
    assert so.index("--no-save_weights") < so.index(" --save_weights")


def test_datasets_need_folder(fake_python):
    status, _, err = sweep(DATA="", PYTHON=fake_python)
    assert status == 2 and "set DATA" in err and len(err.splitlines()) == 1


def test_folders_need_no_data(tmp_path, fake_python):
    names = tmp_path / "photos", tmp_path / "my photos"
    names[1].mkdir()
    assert sweep(DATA="", DATASETS=names[0], PYTHON=fake_python)[0] == 0
    assert sweep(DATA="", DATASETS=names[1], PYTHON=fake_python)[0] == 0
    both = " ".join(str(name).replace(" ", "\\ ") for name in names)
    assert sweep(DATA="", DATASETS=both, PYTHON=fake_python, SEEDS=2)[0] == 0
    wanted = [(names[0], 1), (names[1], 1), (names[0], 2), (names[1], 2)]
    for line, (name, seed) in zip(calls(tmp_path), wanted, strict=True):
        assert f"--dataset {name} --shots 1 --seed {seed}" in line
    assert list_pending.split_line(r"--dataset /a/my\ photos --x it's") == [
        "--dataset", "/a/my photos", "--x", "it's",
    ]  # fmt: skip


def test_wrong_data_ends_sweep(tmp_path, monkeypatch, capsys):
    lines = "".join(
        f"--dataset {name} --root_path {tmp_path / 'no'}\n" for name in ("dtd", "sun397")
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = call(lambda argv: run_cli(lambda: list_pending.main(argv)))
    assert status == 2 and out == "" and str(tmp_path / "no") in err
    assert len(err.splitlines()) == 1


def test_reproduce_goes_from_data_to_report(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "results"
    make_dataset("eurosat", data)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), data / "tiny.pt")
    flags = ["--backbone", data / "tiny.pt", "--n_iters", 2, "--s", 0.9, "--num_workers", 0]
    common = {"script": "reproduce.sh", "DATA": data, "RESULTS": out, "INCOMPLETE": 1}
    status, text, err = sweep(*flags, DATASETS="eurosat dtd", **common)
    assert status == 1 and "get these first" in err and not out.exists()
    assert "* dtd: there is no dtd" in text and f'DTD("{data}", download=True)' in text
    assert "eurosat: not the published numbers" in text  # which INCOMPLETE bears
    status, text, _ = sweep(*flags, DATASETS="eurosat", **common)
    assert status == 0 and "EuroSAT" in text.split("== Report")[1]
    assert (out / "report/tables.md").exists()
    lines = "".join(f"--dataset eurosat --shots {shots} --seed 1\n" for shots in (1, 4))
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    flags += ["--root_path", data, "--save_path", out]
    _, pending, err = call(lambda argv: run_cli(lambda: list_pending.main(argv)), *flags)
    (result,) = out.rglob("result.json")
    hours = 4 * json.loads(result.read_text())["wall_seconds"] / 3600  # four times the iterations
    assert pending == "--dataset eurosat --shots 4 --seed 1\n"
    assert f"1 of them finished; the others take some {hours:.2g} hours" in err
