"""Sweeps: what is skipped, what goes on after failures, what a stop and a job array do."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict
from dataset_helpers import make_dataset

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


def start(script, data, out, *flags, n_iters=2, **variables):
    settings = {"DATA": data, "PYTHON": sys.executable, "SHOTS": "1", "SEEDS": "1", **variables}
    environment = os.environ | {key: str(value) for key, value in settings.items()}
    command = [
        "bash", ROOT / "scripts" / script, *flags, "--backbone", data / "tiny.pt", "--n_iters",
        n_iters, "--s", 0.9, "--num_workers", 0, "--threads", 1, "--save_path", out,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell cannot trap what was ignored as it started, as where the tests run behind a `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def sweep(*args, script="sweep.sh", **kwargs):
    process = start(script, *args, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def results(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("result.json"))


def test_a_sweep_goes_on_after_failures_lists_them_and_skips_what_is_finished(data, tmp_path):
    variables = {"DATASETS": "dtd eurosat", "METHODS": "so adam", "JOBS": 2}
    variables["LOGS"] = tmp_path / "logs"
    out = tmp_path / "my results"
    status, text, err = sweep(data, out, **variables)
    assert status == 1 and "4 runs, 0 of them finished" in err
    assert "2 of 4 runs failed:" in err and "--method so --dataset dtd --shots 1 --seed 1" in err
    assert "DATASETS.md" in (text + err)  # the doctor's sentence
    made = results(out)
    assert len(made) == 2 and "so/tiny/eurosat/1shots/seed1/result.json" in made
    times = [path.stat().st_mtime_ns for path in sorted(out.rglob("result.json"))]
    (out / "so" / "tiny" / "eurosat" / "1shots" / "seed1" / "result.json").unlink()
    status, text, err = sweep(data, out, **variables)
    assert status == 1 and "4 runs, 1 of them finished" in err and results(out) == made
    again = [path.stat().st_mtime_ns for path in sorted(out.rglob("result.json"))]
    assert sum(a != b for a, b in zip(times, again, strict=True)) == 1
    assert len(list((tmp_path / "logs").glob("*.txt"))) == 4


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_stops_its_run_and_continues_when_started_again(sent, data, tmp_path):
    out = tmp_path / "out"
    variables = {"DATASETS": "eurosat oxford_pets", "METHODS": "so"}
    long = ["--early_stop_loss", "0", "--checkpoint_every", "5"]
    process = start("sweep.sh", data, out, *long, n_iters=100000, **variables)
    deadline = time.monotonic() + 120
    while not list(out.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)  # which ends when its run has ended, too
    assert process.returncode == 130 and "goes on from here" in err
    assert results(out) == []
    assert list(out.rglob("checkpoint.pt"))  # from which the same command would go on
    variables["DATASETS"] = "eurosat"
    status, _, err = sweep(data, out, **variables)
    assert status == 1 and "n_iters 100000 there, 2 here" in err and results(out) == []
    status, _, err = sweep(data, out, "--overwrite", **variables)
    assert status == 0 and len(results(out)) == 1, err


def test_a_sweep_that_is_finished_ends_at_once_and_one_with_a_wrong_flag_before_it_begins(
    data, tmp_path
):
    variables = {"DATASETS": "eurosat", "METHODS": "so"}
    folder = tmp_path / "so" / "tiny" / "eurosat" / "1shots" / "seed1"
    assert sweep(data, tmp_path, **variables)[0] == 0
    (folder / "checkpoint.pt").write_bytes(b"left by a run killed at its very end")
    status, out, err = sweep(data, tmp_path, **variables)
    assert (status, out, err) == (0, "", "1 run, 1 of them finished\n")
    assert not (folder / "checkpoint.pt").exists()
    status, out, err = sweep(data, tmp_path, "--shot", "4", **variables)
    assert status == 2 and err.count("\n") == 1 and "--shot" in err and out == ""
    status, out, err = sweep(data, tmp_path, "--help", **variables)
    assert status == 0 and "--shots" in err and out == ""


def test_a_killed_run_costs_no_other_one(data, tmp_path):
    variables = {"DATASETS": "eurosat oxford_pets", "METHODS": "so"}
    process = start("sweep.sh", data, tmp_path, n_iters=300, **variables)
    deadline = time.monotonic() + 120
    while not (locks := list(tmp_path.rglob(".lock"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int(locks[0].read_text().split()[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "1 of 2 runs failed" in err
    assert len(results(tmp_path)) == 1
    status, _, err = sweep(data, tmp_path, n_iters=300, **variables)
    assert status == 0 and len(results(tmp_path)) == 2, err


def test_each_method_may_have_a_configuration_of_its_own(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("# mine\nrank: 3\n")
    variables = {"DATASETS": "eurosat", "METHODS": "lora", "CONFIG_lora": tmp_path / "mine.yaml"}
    status, out, err = sweep(data, tmp_path / "out", **variables)
    assert status == 0 and "LoRA of rank 3" in out, err


def test_a_job_array_runs_each_task_and_shows_their_commands_beforehand(data, tmp_path):
    variables = {"DATASETS": "eurosat dtd", "SEEDS": "1 2", "METHODS": "so"}
    out = tmp_path / "my out"
    options = dict(script="slurm_sweep.sh", **variables)
    status, text, err = sweep(data, out, "--dry-run", **options)
    assert status == 0, err
    header, *tasks = text.splitlines()
    assert "4 tasks" in header and "--array=0-3" in header
    command = shlex.split(tasks[1].partition(": ")[2])
    assert command[command.index("--save_path") + 1] == str(out)
    assert command[command.index("--seed") + 1] == "2"
    assert results(out) == []
    assert sweep(data, out, **options, SLURM_ARRAY_TASK_ID=1, SLURM_SUBMIT_DIR=ROOT)[0] == 0
    assert results(out) == ["so/tiny/eurosat/1shots/seed2/result.json"]
    assert sweep(data, out, **options, SLURM_ARRAY_TASK_ID=2)[0] == 2
    assert sweep(data, out, **options, SLURM_ARRAY_TASK_ID=4)[0] == 0
    status, _, err = sweep(data, out, **options)
    assert status != 0 and "sbatch" in err


def test_datasets_need_a_folder():
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "sweep.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "set DATA" in done.stderr
