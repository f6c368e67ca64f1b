"""Sweeps: what is skipped, what goes on after failures, what a stop does."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import list_pending
import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from commands import calls, wait_for
from dataset_helpers import make_dataset

from run_utils import get_arguments
from runs.output_dir import get_output_dir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder, with a space in its name, that has two datasets and a random checkpoint."""
    folder = tmp_path_factory.mktemp("the data")
    make_dataset("eurosat", folder)
    make_dataset("oxford_pets", folder)
    torch.save(random_state_dict({**TINY_VIT, "context_length": 48}), folder / "tiny.pt")
    return folder


def start(data, out, *flags, **variables):
    settings = {"DATA": data, "PYTHON": sys.executable, "SHOTS": "1", "SEEDS": "1", **variables}
    environment = os.environ | {key: str(value) for key, value in settings.items()}
    command = [
        "bash", ROOT / "scripts" / "sweep.sh", *flags, "--backbone", data / "tiny.pt", "--s", 0.9,
        "--num_workers", 0, "--threads", 1, "--save_path", out,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell cannot trap what was ignored as it started, as where the tests run behind a `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def sweep(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# With main.py


def test_a_sweep_goes_on_after_failures_lists_them_and_skips_what_is_finished(data, tmp_path):
    variables = {"DATASETS": "dtd eurosat", "METHODS": "so", "JOBS": 2}
    variables["LOGS"] = tmp_path / "logs"
    out = tmp_path / "my results"
    status, text, err = sweep(data, out, "--n_iters", 2, **variables)
    assert status == 1 and "2 runs, 0 of them finished" in err
    assert "1 of 2 runs failed:" in err and "--method so --dataset dtd --shots 1 --seed 1" in err
    assert "DATASETS.md" in (text + err)  # the doctor's sentence
    (result,) = out.rglob("result.json")
    assert result.parent == out / "so/tiny/eurosat/1shots/seed1-n_iters_2-s_0.9"
    assert not list(out.rglob("*.safetensors"))  # which --save_path alone would have kept
    assert len(list((tmp_path / "logs").glob("*.txt"))) == 2
    (result.parent / "checkpoint.pt").write_bytes(b"left by a run killed at its very end")
    variables["DATASETS"] = "eurosat"
    done = sweep(data, out, "--n_iters", 2, **variables)
    assert done == (0, "", "1 run, 1 of them finished\n")
    assert not (result.parent / "checkpoint.pt").exists()


def test_a_sweep_whose_processes_are_all_stopped_twice_goes_on_from_its_checkpoint(data, tmp_path):
    variables = {"DATASETS": "eurosat oxford_pets", "METHODS": "so"}
    flags = ["--early_stop_loss", 0, "--checkpoint_every", 5, "--n_iters", 100000]
    process = start(data, tmp_path, *flags, **variables)
    checkpoint = wait_for("checkpoint.pt", tmp_path, process)
    for _ in range(2):  # as SLURM and `timeout` do, while sweep.sh passes it on, too
        os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in err and "--resume" in err
    assert not list(tmp_path.rglob("result.json")) and checkpoint.exists()
    process = start(data, tmp_path, *flags, **variables)
    while "Going on from iteration" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_unfinished_asks_for_each_datasets_data_once(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(
        list_pending, "dataset_fingerprint", lambda *names: asked.append(names) or {}
    )
    monkeypatch.setattr(list_pending, "load_finished_result", lambda folder, config, data: {})
    monkeypatch.setattr(list_pending, "remove_stale_files", lambda folder: None)
    list_pending.cached_fingerprint.cache_clear()
    lines = [f"--dataset {name} --seed {seed}" for name in ("dtd", "fgvc") for seed in (1, 2)]
    shared = ["--root_path", "/the data", "--save_path", str(tmp_path)]
    for line in lines:
        folder = get_output_dir(get_arguments([*line.split(), *shared]))
        folder.mkdir(parents=True)
        (folder / "result.json").touch()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    list_pending.main(shared)
    assert asked == [("dtd", "/the data", None), ("fgvc", "/the data", None)]
    assert capsys.readouterr().err == "4 runs, 4 of them finished\n"


@pytest.mark.parametrize("flags, status, words", [("--shotss 4", 2, "--shotss"), ("--help", 0, "")])
def test_a_wrong_flag_and_help_end_before_any_run(flags, status, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("--dataset dtd\n"))
    with pytest.raises(SystemExit) as end:
        list_pending.main(flags.split())
    out, err = capsys.readouterr()
    assert end.value.code == status and out == "" and words in err


# With a stand-in for Python


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGTERM again", "SIGTERM to all"])
def test_a_stopped_sweep_waits_for_what_its_runs_write(sent, data, tmp_path, fake_python):
    variables = {"DATASETS": "eurosat oxford_pets", "METHODS": "wait", "PYTHON": fake_python}
    process = start(data, tmp_path / "out", **variables)
    wait_for("started", tmp_path, process)
    number = signal.Signals[sent.split()[0]]
    (os.killpg if "all" in sent else os.kill)(process.pid, number)
    if "again" in sent:
        time.sleep(0.1)
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in err
    assert (tmp_path / "checkpoint.pt").read_text() == "written\n"
    assert len(calls(tmp_path)) == 1


def test_a_killed_run_costs_no_other_one(data, tmp_path, fake_python):
    variables = {"DATASETS": "eurosat dtd", "METHODS": "fail so", "PYTHON": fake_python}
    status, _, err = sweep(data, tmp_path, **variables)
    assert status == 1 and "2 of 4 runs failed" in err and err.count("--method fail") == 2
    assert len(calls(tmp_path)) == 4
    (tmp_path / "bad_flag").touch()
    assert sweep(data, tmp_path, **variables)[0] == 1 and len(calls(tmp_path)) == 4


def test_weights_are_kept_where_a_sweep_is_asked_for_them(data, tmp_path, fake_python):
    variables = {"DATASETS": "eurosat", "METHODS": "so", "PYTHON": fake_python}
    sweep(data, tmp_path, "--save_weights", **variables)
    argv = calls(tmp_path)[0].split()[1:]
    assert argv.index("--no-save_weights") < argv.index("--save_weights")


def test_each_method_may_have_a_configuration_of_its_own(data, tmp_path, fake_python):
    variables = {"DATASETS": "eurosat", "METHODS": "lora so", "CONFIG_lora": "mine.yaml"}
    sweep(data, tmp_path, **variables, PYTHON=fake_python)
    assert ["--config mine.yaml" in line for line in calls(tmp_path)] == [True, False]


def test_datasets_need_a_folder():
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "sweep.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "set DATA" in done.stderr
