"""Checkpoints: resumed runs end as unbroken ones, whatever ended them."""

import itertools
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import call_main, outcome, refused, run, run_folder, wait_for
from process_helpers import run_main_in_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(flags):
    """Arguments of a run of eight iterations, two in each epoch."""
    extra = ["--n_iters", 4, "--batch_size", 4, "--t", 3, "--early_stop_loss", -1]
    return [*flags[:-1], *extra, "--eval_split", "val", "--save_path"]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """What a run leaves that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    run(*flags, out)
    return outcome(out)


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "--final_model best_val --eval_every 3 --grad_accum_steps 3 --subsample base",
        "--moment_support random --grad_support magnitude --bias_correction entry",
        "--moments none --precision fp16 --encoder text",
        "--method lora --class_batch_size 2 --precision bf16 --final_model best_val --eval_every 3",
        "--method adam --grad_accum_steps 2",
    ],
)
def test_resume_equals_unbroken_run(extra, flags, interrupt, tmp_path):
    out, extra = tmp_path / "resumed", extra.split()
    run(*flags, tmp_path / "unbroken", *extra)
    interrupt(3, flags, out, *extra, "--num_workers", 2)
    path = interrupt(5, flags, out, *extra, "--resume")
    assert torch.load(path, weights_only=True)["state"]["iteration"] == 5
    assert "Resuming from iteration 5" in run(*flags, out, *extra, "--resume")
    assert outcome(out) == outcome(tmp_path / "unbroken") and not path.exists()


def kill_on_replace(name, rank):
    """Kill this process when it gives a file its final name."""
    replace = os.replace

    def replace_or_die(source, target):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def test_resume_after_kills_while_writing(flags, unbroken, tmp_path):
    argv = [*flags, tmp_path / "out", "--checkpoint_every", 3, "--resume"]
    for name in ("checkpoint.pt", "curve.csv", "weights.safetensors", "result.json"):
        prepare = partial(kill_on_replace, name)
        ends = run_main_in_processes(1, tmp_path, *argv, prepare=prepare)
        assert ends == [-signal.SIGKILL] and not any(tmp_path.rglob("result.json"))
        assert any(tmp_path.rglob("checkpoint.pt")) == (name != "checkpoint.pt")
    assert "Resuming from iteration 8" in run(*argv)
    assert outcome(tmp_path) == unbroken


@pytest.mark.parametrize(
    "owner, function, saved",
    [
        (torch.nn.functional, "cross_entropy", 4),
        (torch.amp.GradScaler, "update", 3),  # the weights of the fifth step are changed already
    ],
)
def test_resume_after_exception(owner, function, saved, flags, unbroken, tmp_path, monkeypatch):
    original, calls = getattr(owner, function), itertools.count(1)

    def fail_in_fifth_call(*args, **options):
        if next(calls) == 5:
            raise RuntimeError("a bug")
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(owner, function, fail_in_fifth_call)
        call_main(*flags, tmp_path, "--checkpoint_every", 3)
    assert f"Resuming from iteration {saved}" in run(*flags, tmp_path, "--resume")
    assert outcome(tmp_path) == unbroken


def test_sigterm_and_repeats_leave_checkpoint(flags, tmp_path):
    argv = [*flags, tmp_path, "--n_iters", 10**6, "--checkpoint_every", 3]
    command = [sys.executable, ROOT / "main.py", *map(str, argv)]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    path = wait_for("checkpoint.pt", tmp_path, process)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    count = torch.load(path, weights_only=True)["state"]["iteration"]
    assert process.returncode == 143 and count >= 3
    note = f"--resume continues from iteration {count}, saved in {path}"
    assert err.splitlines()[-1] == f"main.py: ended by SIGTERM; {note}"
    names = {path.name for path in path.parent.iterdir()}
    assert names == {"checkpoint.pt", "config.yaml", "fewshot.json"}


def test_signals_wait_while_deferred():
    code = """
from signal import SIGINT, SIGTERM, raise_signal
from runs.signals import Preempted, SignalHandler
with SignalHandler(force_quit_after_s=60) as signals, signals.defer():
    for signum in (SIGTERM, SIGINT, SIGINT):
        raise_signal(signum)
    try:
        with signals.defer(False):
            print("allowed")
    except Preempted as stop:
        print(stop.signum, flush=True)
    signals.force_quit_after_s = 0
    raise_signal(SIGTERM)
    raise_signal(SIGINT)
    print("not quit")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGINT, ["15"])


def test_checkpoint_needs_resume_or_overwrite(interrupt, flags, unbroken, tmp_path):
    checkpoint = interrupt(4, flags, tmp_path)
    content, message = checkpoint.read_bytes(), refused(*flags, tmp_path)
    assert f"{checkpoint} has this run at iteration 4 of 8" in message
    assert "--resume continues" in message and "--overwrite starts anew" in message
    assert checkpoint.read_bytes() == content
    run(*flags, tmp_path, "--overwrite")
    assert outcome(tmp_path) == unbroken


def test_unusable_checkpoint_is_refused(interrupt, flags, tmp_path):
    checkpoint = interrupt(4, flags, tmp_path)
    raw, content = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    losses = content["state"]["losses"].numpy()
    changed = raw.replace(losses.tobytes(), (losses + 1).tobytes())
    for damaged in (raw[: len(raw) // 2], b"", b"\x80\x04nonsense", changed):
        checkpoint.write_bytes(damaged)
        assert f"{checkpoint} cannot be used" in refused(*flags, tmp_path, "--resume")
        assert checkpoint.read_bytes() == damaged
    for words, entries in (
        ("images that few shots", {"data": content["data"] | {"digest": ""}}),
        ("the backbone's weights", {"inputs": content["inputs"] | {"backbone": "0"}}),
        ("another version of this software wrote it", {"version": 1}),
        ("lr 0.1 there, 0.001 here", {"config": content["config"] | {"lr": 0.1}}),
    ):
        torch.save(content | entries, checkpoint)
        message = refused(*flags, tmp_path, "--resume")
        assert words in message and str(checkpoint) in message and "--overwrite" in message
    # As a sweep with --overwrite is repeated.
    status, out, err = call_main(*flags, tmp_path, "--overwrite", "--resume")
    assert status == 0 and "note: there is no usable checkpoint in" in out
    assert f"note: {checkpoint} is not used (it belongs to another run: lr 0.1" in err


def test_full_disk_costs_only_checkpoints(flags, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes in a file
    try:
        status, _, err = call_main(*flags, tmp_path, "--checkpoint_every", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert err.count("checkpoint.pt could not be written") >= 2
    assert status == 2 and "weights.safetensors" in err.splitlines()[-1]
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"config.yaml", "curve.csv", "fewshot.json"}


def test_nonfinite_loss_keeps_good_checkpoint(flags, tmp_path):
    argv = [*flags, tmp_path, "--lr", 1e18, "--checkpoint_every", 1]
    message = refused(*argv)
    assert "the loss became nan at iteration 2 of 8" in message and "--lr" in message
    folder = run_folder(tmp_path)
    assert not (folder / "result.json").exists()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert state["iteration"] == 1 and state["losses"].isfinite().all()
