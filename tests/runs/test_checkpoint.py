"""Checkpoints: resumed runs end as unbroken ones, whatever ended them."""

import itertools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import call_main, outcome, read_losses, refused, run, run_folder, wait_for
from process_helpers import run_main_in_processes

import clip
import main
import train
from runs.checkpoint import CheckpointSaver
from runs.signals import Preempted, SignalHandler
from utils import sha256_of_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(data):
    """Arguments of a run of eight iterations, two in each epoch."""
    return [
        "--root_path", data, "--dataset", "eurosat", "--backbone", data / "tiny vit.pt",
        "--shots", 2, "--n_iters", 4, "--batch_size", 4, "--s", 0.9, "--t", 3, "--lr", 1e-3,
        "--early_stop_loss", -1, "--eval_split", "val", "--num_workers", 0, "--threads", 1,
        "--device", "cpu", "--save_path",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """What a run leaves that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    run(*flags, out)
    return outcome(out)


@pytest.fixture
def interrupt(monkeypatch):
    """A function that stops a run after some iterations; it returns the checkpoint's path."""

    def run_and_interrupt(iterations, flags, out, *extra):
        calls = itertools.count()  # before the first iteration, then after each

        def raise_after(signals):
            if next(calls) == iterations:
                raise Preempted(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(main, "raise_if_any_preempted", raise_after)
            status, _, err = call_main(*flags, out, *extra)
        assert status == 143 and "--resume continues from iteration" in err
        return next(out.rglob("checkpoint.pt"))

    return run_and_interrupt


@pytest.fixture
def checkpoint(interrupt, flags, tmp_path):
    """The checkpoint of a run that was stopped after four iterations."""
    return interrupt(4, flags, tmp_path)


def load(checkpoint):
    return torch.load(checkpoint, weights_only=True)


# Resuming


# torch 2.4 warns about its own autocast in torch.utils.checkpoint.
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast")
@pytest.mark.parametrize(
    "extra",
    [
        "",
        "--final_model best_val --eval_every 3 --grad_accum_steps 3 --subsample base",
        "--moment_support random --grad_support magnitude --moments per_entry",
        "--moments none --precision fp16 --encoder text",
        "--method lora --class_batch_size 2 --precision bf16 --final_model best_val --eval_every 3",
        "--method adam --grad_accum_steps 2",
    ],
)
def test_resume_equals_unbroken_run(extra, flags, interrupt, tmp_path):
    out, extra = tmp_path / "resumed", extra.split()
    run(*flags, tmp_path / "unbroken", *extra)
    interrupt(3, flags, out, *extra, "--num_workers", 2)
    path = interrupt(2, flags, out, *extra, "--resume")
    assert load(path)["state"]["iteration"] == 5
    assert "Resuming from iteration 5" in run(*flags, out, *extra, "--resume")
    assert outcome(out) == outcome(tmp_path / "unbroken") and not path.exists()


def kill_on_replace(name, count):
    """Kill this process when it gives a file its final name for the count-th time."""
    replace, calls = os.replace, itertools.count(1)

    def replace_or_die(source, target):
        if Path(target).name == name and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die


def kill_on_remove(name, count):
    """Kill this process when it removes its checkpoint."""
    CheckpointSaver.remove = lambda _: os.kill(os.getpid(), signal.SIGKILL)


def test_resume_after_kills_while_writing(flags, unbroken, tmp_path):
    out = tmp_path / "out"
    for name, count, kill in (
        ("checkpoint.pt", 2, kill_on_replace),
        ("curve.csv", 1, kill_on_replace),
        ("weights.safetensors", 1, kill_on_replace),
        ("predictions.csv", 1, kill_on_replace),
        ("result.json", 1, kill_on_replace),
        ("", 0, kill_on_remove),
    ):
        argv = [*flags, out, "--checkpoint_every", 3, "--resume"]
        prepare = lambda _, kill=kill, name=name, count=count: kill(name, count)  # noqa: E731
        assert run_main_in_processes(1, tmp_path, *argv, prepare=prepare) == [-signal.SIGKILL]
        files = {path.name for path in run_folder(out).iterdir()}
        assert "checkpoint.pt" in files and ("result.json" in files) == (name == ""), name
    assert "This run is finished" in run(*argv)
    assert outcome(out) == unbroken


@pytest.mark.parametrize("function, saved", [("forward_backward", 4), ("step", 3)])
def test_resume_after_exception(function, saved, flags, unbroken, tmp_path, monkeypatch):
    owner = train if function == "forward_backward" else torch.amp.GradScaler
    original, calls = getattr(owner, function), itertools.count(1)

    def call_and_fail(*args):
        result = original(*args)
        if next(calls) == 5:
            raise RuntimeError("a bug")
        return result

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(owner, function, call_and_fail)
        call_main(*flags, tmp_path, "--checkpoint_every", 3)
    # Weights that were changed in the fifth step are not saved.
    assert f"Resuming from iteration {saved}" in run(*flags, tmp_path, "--resume")
    assert outcome(tmp_path) == unbroken


@pytest.mark.parametrize("method", ["so", "lora", "adam"])
def test_checkpoint_stores_only_changes(method, flags, interrupt, data, tmp_path):
    path = interrupt(5, flags, tmp_path, "--method", method, "--s", 0.99)
    saved = load(path)["trained"]
    model = data / "tiny vit.pt"
    if method == "so":
        weights = clip.load(model, "cpu")[0].state_dict()
        k = sum(int(0.01 * weights[name].numel()) for name in saved)
        entries = sum(len(indices) for indices, _ in saved.values())
        assert len(saved) == 24 and k < entries <= 2 * k  # of two supports
        assert path.stat().st_size < model.stat().st_size / 5
    else:  # dense where that is smaller than indices and values
        assert all(indices is None for indices, _ in saved.values())
        assert len(saved) == {"lora": 36, "adam": 24}[method]


# Signals


def test_sigterm_and_repeats_leave_checkpoint(flags, tmp_path):
    argv = [*flags, tmp_path, "--n_iters", 10**6, "--checkpoint_every", 3]
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *map(str, argv)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = wait_for("checkpoint.pt", tmp_path, process)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Zero-shot CLIP's validation accuracy" in out
    count = load(path)["state"]["iteration"]
    assert count >= 3 and err.splitlines()[-1] == (
        f"main.py: ended by SIGTERM; --resume continues from iteration {count}, saved in {path}"
    )
    files = {path.name for path in path.parent.iterdir()}
    assert files == {"checkpoint.pt", "config.yaml", "fewshot.json"}


def test_second_ctrl_c_quits():
    code = (
        "import signal; from runs.signals import SignalHandler\n"
        "with SignalHandler(force_quit_after_s=60) as signals, signals.defer():\n"
        "    signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)\n"
        "    print('deferred', flush=True); signals.force_quit_after_s = 0\n"
        "    signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT); print('no')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "deferred\n")


def test_signals_wait_while_deferred():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with SignalHandler() as signals:
            with signals.defer():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                with pytest.raises(Preempted) as stop, signals.allow():
                    pass
                assert stop.value.signum == signal.SIGINT
        with pytest.raises(Preempted) as stop, SignalHandler():
            signal.raise_signal(signal.SIGTERM)
        assert stop.value.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # until the process has ended
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Checkpoints that cannot be used


def test_checkpoint_needs_resume_or_overwrite(checkpoint, flags, unbroken, tmp_path):
    files = {path: path.read_bytes() for path in checkpoint.parent.iterdir()}
    message = refused(*flags, tmp_path)
    assert f"{checkpoint} has this run at iteration 4 of 8" in message
    assert "--resume continues" in message and "--overwrite starts anew" in message
    assert files == {path: path.read_bytes() for path in checkpoint.parent.iterdir()}
    run(*flags, tmp_path, "--overwrite")
    assert outcome(tmp_path) == unbroken


def test_damaged_checkpoint_is_refused(checkpoint, flags, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content = checkpoint.read_bytes()
    start = content.rfind(b"\x3f", 0, len(content) // 2)  # in a tensor, which torch does not check
    torch.save({"version": 4, "config": Malicious()}, tmp_path / "malicious.pt")
    for damaged in (
        content[: len(content) // 2],
        b"",
        b"\x80\x04nonsense",
        content[:start] + b"\x3e" + content[start + 1 :],
        (tmp_path / "malicious.pt").read_bytes(),
    ):
        checkpoint.write_bytes(damaged)
        message = refused(*flags, tmp_path, "--resume")
        assert f"{checkpoint} is damaged" in message and "--overwrite" in message
        assert checkpoint.read_bytes() == damaged
    assert not (tmp_path / "executed").exists()


def test_other_checkpoint_is_refused(checkpoint, flags, tmp_path):
    content = load(checkpoint)
    content.pop("digest")

    def save(**entries):
        changed = {**content, **entries}
        torch.save({**changed, "digest": sha256_of_tree(changed)}, checkpoint)

    for words, entries in (
        ("the images differ: 7 train", {"data": content["data"] | {"digest": "", "train": 7}}),
        ("the backbone differs", {"inputs": content["inputs"] | {"backbone": "0"}}),
        ("written by another version of this software", {"version": 1}),
        ("lr 0.1 there, 0.001 here", {"config": content["config"] | {"lr": 0.1}}),
    ):
        save(**entries)
        message = refused(*flags, tmp_path, "--resume")
        assert words in message and str(checkpoint) in message and "--overwrite" in message
    run(*flags, tmp_path, "--overwrite", "--resume")  # as a sweep with --overwrite is repeated


# What cannot be written or continued from


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
    argv = [*flags, tmp_path, "--lr", 1e30, "--checkpoint_every", 1]
    message = refused(*argv)
    assert "the loss became nan at iteration 2 of 8" in message and "--lr" in message
    folder = run_folder(tmp_path)
    assert len(read_losses(tmp_path)) == 2 and not (folder / "result.json").exists()
    state = load(folder / "checkpoint.pt")["state"]
    assert state["iteration"] == 1 and state["losses"].isfinite().all()


def test_changed_backbone_is_noticed(flags, data, tmp_path, monkeypatch):
    backbone = tmp_path / "tiny.pt"

    def remove_backbone(*args):
        backbone.unlink()
        yield from train.train(*args)

    monkeypatch.setattr(main, "train", remove_backbone)
    for save_weights in ("--no-save_weights", "--save_weights"):
        backbone.write_bytes((data / "tiny vit.pt").read_bytes())
        out = tmp_path / save_weights
        argv = [*flags, out, save_weights, "--backbone", backbone, "--checkpoint_every", 3]
        status, _, err = call_main(*argv)
        # Checkpoints are lost, but not the run as long as it can do without.
        assert err.count("checkpoint.pt could not be written (") == 3
        assert "tiny.pt changed during this run" in err.splitlines()[-1]
        assert status == (2 if save_weights == "--save_weights" else 0)
        assert any(out.rglob("result.json")) == (status == 0)
        assert not any(out.rglob("*.safetensors"))
