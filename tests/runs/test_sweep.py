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


def list_lines(monkeypatch, text, *flags):
    """What list_pending.py says of these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return call(lambda argv: run_cli(lambda: list_pending.main(argv)), *flags)


@pytest.fixture
def eurosat(tmp_path):
    """A folder with a small EuroSAT, and the arguments of a short run on it."""
    data = tmp_path / 'it\'s "the" data $HOME;'
    make_dataset("eurosat", data)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), data / "tiny.pt")
    flags = ["--backbone", data / "tiny.pt", "--n_iters", 2, "--s", 0.9, "--num_workers", 0]
    return data, [*flags, "--threads", 1]


def test_sweep_continues_after_failures(eurosat, tmp_path):
    (data, flags), out = eurosat, tmp_path / "sonuçlar 数据"
    variables = {"DATA": data, "JOBS": 2, "LOGS": tmp_path / "logs"}
    flags += ["--save_path", out]
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


def test_arguments_override_defaults(tmp_path, fake_python):
    variables = {"METHODS": "fail so", "CONFIG_fail": "mine.yaml", "PYTHON": fake_python}
    status, _, err = sweep("--save_weights", DATASETS="digits", SEEDS="1 2", **variables)
    assert status == 1 and "2 of 4 runs failed" in err and err.count("--method fail") == 2
    killed, so, *_ = calls(tmp_path)
    assert "--config mine.yaml" in killed and "--config" not in so
    assert so.index("--no-save_weights") < so.index(" --save_weights")


def test_only_datasets_need_folder(tmp_path, fake_python):
    status, _, err = sweep(DATA="", PYTHON=fake_python)
    assert status == 2 and "set DATA" in err and len(err.splitlines()) == 1
    names = tmp_path / "photos", tmp_path / "my photos"
    names[1].mkdir()
    both = " ".join(str(name).replace(" ", "\\ ") for name in names)
    for dataset in (names[1], both):  # a blank needs a backslash where there are several
        assert sweep(DATA="", DATASETS=dataset, PYTHON=fake_python)[0] == 0
    for line, name in zip(calls(tmp_path), (names[1], *names), strict=True):
        assert f"--dataset {name} --shots 1 --seed 1" in line
    words = list_pending.split_line(r"--dataset /a/my\ photos --x it's")
    assert words == ["--dataset", "/a/my photos", "--x", "it's"]


def test_wrong_data_ends_sweep(tmp_path, monkeypatch):
    missing = tmp_path / "no"
    lines = "".join(f"--dataset {name} --root_path {missing}\n" for name in ("dtd", "sun397"))
    status, out, err = list_lines(monkeypatch, lines)
    assert status == 2 and out == "" and str(missing) in err and len(err.splitlines()) == 1


def test_reproduce_goes_from_data_to_report(eurosat, tmp_path, monkeypatch):
    (data, flags), out = eurosat, tmp_path / "results"
    common = {"script": "reproduce.sh", "DATA": data, "RESULTS": out, "INCOMPLETE": 1}
    status, text, err = sweep(*flags, DATASETS="eurosat dtd", **common)
    assert status == 1 and "get these first" in err and not out.exists()
    assert "* dtd: there is no dtd" in text and f'DTD("{data}", download=True)' in text
    assert "eurosat: not the published numbers" in text  # which INCOMPLETE bears
    status, text, _ = sweep(*flags, DATASETS="eurosat", **common)
    assert status == 0 and "EuroSAT" in text.split("== Report")[1]
    assert (out / "report/tables.md").exists()
    lines = "".join(f"--dataset eurosat --shots {shots} --seed 1\n" for shots in (1, 4))
    flags += ["--root_path", data, "--save_path", out]
    _, pending, err = list_lines(monkeypatch, lines, *flags)
    (result,) = out.rglob("result.json")
    hours = 4 * json.loads(result.read_text())["wall_seconds"] / 3600  # four times the iterations
    assert pending == "--dataset eurosat --shots 4 --seed 1\n"
    assert f"1 of them finished; the others take some {hours:.2g} hours" in err
